"""Stages of a run. Each stage builds or loads models, and writes a record and files to its folder."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import figures, files
from kirsch.deploy.export import export, usage
from kirsch.deploy.measure import race
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.distillation.checks import first_batch
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.distiller import Distiller
from kirsch.errors import UsageError
from kirsch.frameworks.determinism import require_deterministic
from kirsch.frameworks.trace import trace
from kirsch.graph.plan import Goal, Plan
from kirsch.measurement.agreement import agreement
from kirsch.measurement.machine import usable_cores
from kirsch.pruning.choose import plan as choose
from kirsch.pruning.prune import prune_with_verification
from kirsch.pruning.store import load, save
from kirsch.recipes.job import LOGITS, Job
from kirsch.recipes.manifest import MODEL, PLAN

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kirsch.frameworks.training import Trained
    from kirsch.graph.graph import Graph
    from kirsch.recipes.recipe import Distill, Prune, Recipe
    from kirsch.recipes.section import Section

Record = dict[str, Any]
WEIGHTS = "weights.safetensors"
CALIBRATION = 256
"""Training samples on which residual blocks are ranked."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        key: name of the stage.
        section: section of the recipe; the stage is run again if the section changes.
        run: runs the stage, writes its files to the given folder, and returns its record.
        load: loads the results of the finished stage.
    """

    key: str
    section: Section | None
    run: Callable[[Job, Path], Record]
    load: Callable[[Job, Path, Record], None]


def stages_of(recipe: Recipe) -> list[Stage]:
    """Return the stages of a recipe, in order."""
    student, nothing = recipe.student, _load_nothing
    stages = [
        Stage("teacher", recipe.teacher, _teacher, _load_teacher),
        Stage("distill", student, _distill, _load_student) if student else None,
        Stage("prune", recipe.prune, _prune, _load_pruned) if recipe.prune else None,
        Stage("recover", recipe.recover, _recover, _load_recovered) if recipe.recover else None,
        Stage("export", recipe.export, _export, nothing) if recipe.export else None,
        Stage("measure", recipe.measure, _measure, nothing) if recipe.export and recipe.measure else None,
    ]
    return [stage for stage in stages if stage is not None]


# ------------------------------------------------------------------------------------------------ models


def _teacher(job: Job, folder: Path) -> Record:
    model = job.in_inference_mode(job.make_teacher())
    section = job.recipe.teacher.train
    history: list[Any] = []
    if section is not None:
        trained = fit(
            model,
            job.data.batches(job.recipe.data.batch_size),
            training=section.settings(job.recipe.seed),
            validation=job.validation(),
            hooks=job.hooks("teacher"),
            objective=job.recipe.objective_of("teacher"),
        )
        model, history = trained.model, trained.history
    elif job.recipe.teacher.model.startswith("timm:"):
        job.note(
            f"The teacher {job.recipe.teacher.model} has random weights: a recipe does not load pretrained weights, "
            "and teacher.train is null. Refer to a callable that returns the model with its weights, or train it."
        )
    record = _model_record(job, model, folder, "trained" if section else "given", history)
    load = f"Load trained weights in {job.recipe.teacher.model}, or train the teacher: state teacher.train."
    job.check_alive("teacher", record, *([] if section else [load]))
    job.models["teacher"] = job.models["result"] = model
    return record


def _load_teacher(job: Job, folder: Path, _record: Record) -> None:
    model = job.make_teacher()
    job.framework(model).inference.load_weights(model, folder / WEIGHTS)
    job.models["teacher"] = job.models["result"] = job.in_inference_mode(model)


def _distill(job: Job, folder: Path) -> Record:
    section = job.recipe.student
    if section is None or job.make_student is None:
        raise RuntimeError("a recipe without a student has no distillation stage")
    trained = _train_on_teacher(job, "distill", job.make_student(), section.distill)
    record = _model_record(job, trained.model, folder, "student", trained.history)
    record["first_batch"] = trained.first_batch
    record["cells"].append(_gradient_share(trained))
    job.check_alive("distill", record)
    job.models["student"] = job.models["result"] = trained.model
    return record


def _load_student(job: Job, folder: Path, _record: Record) -> None:
    if job.make_student is None:
        raise RuntimeError("a recipe without a student has no student to load")
    model = job.make_student()
    job.framework(model).inference.load_weights(model, folder / WEIGHTS)
    job.models["student"] = job.models["result"] = job.in_inference_mode(model)


def _train_on_teacher(job: Job, key: str, model: Any, section: Distill) -> Any:
    return distill(
        model,
        job.models["teacher"],
        job.data.batches(job.recipe.data.batch_size),
        objective=job.recipe.objective_of(key),
        training=section.train.settings(job.recipe.seed),
        validation=job.validation(),
        hooks=job.hooks(key),
    )


def _gradient_share(trained: Trained) -> str:
    """Return the largest share of a teacher term in the gradient.

    The share is that of the first batch, or of the last epoch if all terms start with weight 0.
    """
    for shares in (trained.first_batch.get("gradient_shares", {}), trained.history[-1]["gradient_shares"]):
        terms = {name: share for name, share in shares.items() if name != "label"}
        if terms:
            name = max(terms, key=lambda name: terms[name])
            return f"{'KD' if name == 'kd' else name} {100 * terms[name]:.0f} % of gradient"
    return ""


def check_objectives(job: Job, teacher: Any, model: Any) -> None:
    """Check before any training that both models have the layers of the objectives, and that their shapes fit.

    Raises:
        UsageError: a layer, a name or a shape does not fit, a model does not run on the data, or returns
            probabilities.
        NumericError: a model returns different outputs for the same inputs.
    """
    recipe = job.recipe
    for candidate in (teacher, *([model] if model is not teacher else [])):
        require_deterministic(candidate, (job.example,))
    first = first_batch(job.framework(model).training, job.data.batches(recipe.data.batch_size))
    student = model if model is not teacher else copy.deepcopy(model)
    for stage in ("distill", "recover"):
        if recipe.section_of(stage) is not None:
            Distiller(student, teacher, recipe.objective_of(stage), first).close()  # checks the labels, too


def _model_record(job: Job, model: Any, folder: Path, did: str, history: list[Any]) -> Record:
    """Write the weights of a model to the folder of its stage, and return the record of the stage."""
    job.framework(model).inference.save_weights(model, folder / WEIGHTS)
    record = {"did": did, "history": history, "bytes": (folder / WEIGHTS).stat().st_size, **job.evaluate(model, folder)}
    return record | {"cells": _cells(record)}


def _cells(record: Record) -> list[str]:
    quality = record["accuracy"]
    return [
        figures.interval(quality["value"], quality["low"], quality["high"]),
        f"{figures.count(record['macs'])} MACs",
        f"{figures.count(record['parameters'])} params",
        *([f"balanced {figures.percent(record['balanced_accuracy'])}"] if "balanced_accuracy" in record else []),
    ]


# ------------------------------------------------------------------------------------------------ pruning


def plan_for(job: Job, model: Any, section: Prune) -> tuple[Graph, Plan]:
    """Return the graph of a model, and the plan that a recipe makes for it."""
    graph = trace(model, job.framework(model).inference.from_numpy(job.example))
    options = section.model_dump(exclude={"goal", "seed"})
    seed = job.recipe.seed if section.seed is None else section.seed
    data = job.framework(model).inference.from_numpy(job.data.train.inputs[:CALIBRATION]) if section.of_blocks else None
    plan = choose(graph, Goal(**section.goal.model_dump()), data=data, seed=seed, **options)
    return graph, plan


def _prune(job: Job, folder: Path) -> Record:
    section = job.recipe.prune
    if section is None:
        raise RuntimeError("a recipe without a prune section has no such stage")
    before = job.models["result"]
    graph, plan = plan_for(job, before, section)
    pruned = prune_with_verification(before, plan)
    save(pruned.model, folder / "model")
    files.write_text(job.folder / PLAN, pruned.plan.to_json())
    notes = [*plan.notes, *pruned.warnings]
    for text in notes:
        job.note(text)
    record = {"did": _saved(plan), **job.evaluate(pruned.model, folder)}
    record["bytes"] = (folder / "model" / "model.safetensors").stat().st_size
    record["verification"] = pruned.verification.to_dict() if pruned.verification else None
    record["removed"] = removed(graph, plan)
    record["plan"] = json.loads(pruned.plan.to_json())
    record["notes"] = notes
    error = pruned.verification.error if pruned.verification else float("nan")
    record["cells"] = [*_cells(record), f"{len(plan.groups)} groups, verified ({error:.0e})"]
    job.models["before"], job.models["pruned"], job.models["result"] = before, pruned.model, pruned.model
    return record


def _saved(plan: Plan) -> str:
    if "macs" in plan.goal or not plan.goal:
        return f"−{figures.percent(1 - plan.after.macs / max(plan.before.macs, 1))} MACs"
    return f"−{figures.percent(1 - plan.after.parameters / max(plan.before.parameters, 1))} params"


def removed(graph: Graph, plan: Plan) -> dict[str, Any]:
    """Return the units that a plan removes by group and by layer, and the blockers of the graph, JSON-able."""
    removals = {removal.name: removal for removal in plan.groups}
    kept = plan.keep(graph)
    before, after = graph.prices.by_owner(graph.keep({})), graph.prices.by_owner(kept)
    groups, layers = [], []
    for group in graph.groups:
        removal = removals.get(group.name)
        units = list(removal.removed) if removal else []
        alone = graph.prices.price(graph.keep({group.name: tuple(units)}))
        groups.append(
            {
                "name": group.name,
                "kind": group.kind,
                "size": group.size,
                "removed": units,
                "reason": removal.reason if removal else "kept",
                "layers": list(group.layers),
                "parameters": graph.cost.parameters - alone.parameters,
                "macs": graph.cost.macs - alone.macs,
            }
        )
        for name, axis in group.footprint:
            if axis == 0 and name.endswith("weight") and len(graph.tensors[name].shape) > 1:
                layer = name.rpartition(".")[0]
                mask = graph.kept(graph.axes[name, 0], kept)
                size = graph.tensors[name].shape[0]
                layers.append(
                    {
                        "name": layer,
                        "group": group.name,
                        "before": size,
                        "after": size if mask is None else int(mask.sum()),
                        "parameters_before": before[layer][0],
                        "parameters_after": after[layer][0],
                    }
                )
    blockers = [
        {"reason": b.reason, "where": b.where, "source": b.source, "operation": b.operation, "share": b.share}
        for b in graph.blockers
    ]
    return {"groups": groups, "layers": layers, "blockers": blockers}


def _load_pruned(job: Job, folder: Path, _record: Record) -> None:
    job.models["before"] = job.models["result"]
    job.models["pruned"] = job.models["result"] = load(folder / "model", _before_pruning(job))
    stored, shown = folder / "model" / "plan.json", job.folder / PLAN
    if not shown.is_file() or shown.read_bytes() != stored.read_bytes():
        files.write_bytes(shown, stored.read_bytes())


def _before_pruning(job: Job) -> Callable[[], Any]:
    return job.make_student or job.make_teacher


def _recover(job: Job, folder: Path) -> Record:
    section = job.recipe.recover
    if section is None:
        raise RuntimeError("a recipe without a recover section has no such stage")
    model = copy.deepcopy(job.models["result"])  # may be the same object as the teacher
    trained = _train_on_teacher(job, "recover", model, section)
    record = _model_record(job, trained.model, folder, "", trained.history)
    record["first_batch"] = trained.first_batch
    job.check_alive("recover", record)
    job.models["result"] = trained.model
    return record


def _load_recovered(job: Job, folder: Path, _record: Record) -> None:
    model = copy.deepcopy(job.models["result"])  # may be the same object as an earlier model
    job.framework(model).inference.load_weights(model, folder / WEIGHTS)
    job.models["result"] = model


# ------------------------------------------------------------------------------------------------ deployment


def _export(job: Job, folder: Path) -> Record:
    section, model = job.recipe.export, job.models["result"]
    if section is None:
        raise RuntimeError("a recipe without an export section has no such stage")
    framework = job.framework(model)
    target = job.folder / MODEL
    target.parent.mkdir(exist_ok=True)
    artifact = export(model, target, example_inputs=framework.inference.from_numpy(job.example), format=section.format)
    if "pruned" in job.models:
        save(model, target.parent / "model")
    session = OnnxSession(target)
    logits = session.predict(job.data.test.inputs, batch_size=job.evaluation_batch_size)
    np.save(folder / LOGITS, logits, allow_pickle=False)
    agreed = agreement(
        framework.inference.predict(model, job.data.test.inputs, batch_size=job.evaluation_batch_size), logits
    )
    quality = job.quality(logits)
    last = next(record for key, record in reversed(job.records.items()) if "macs" in record)
    return {
        "did": target.name,
        "parameters": last["parameters"],
        "macs": last["macs"],
        "bytes": artifact.bytes,
        **quality,
        "artifact": artifact.to_dict() | {"usage": usage(artifact)},
        "agreement": agreed.to_dict(),
        "cells": [
            figures.interval(*(quality["accuracy"][name] for name in ("value", "low", "high"))),
            f"{agreed.same_labels}/{agreed.n} same labels",
            figures.bytes_(artifact.bytes),
        ],
    }


def check_threads(recipe: Recipe) -> None:
    """Check that the machine has a core for each thread that the recipe measures with.

    Raises:
        UsageError: the machine has fewer usable cores.
    """
    threads, cores = recipe.measure.threads if recipe.measure and recipe.export else 1, usable_cores()
    if threads > cores:
        raise UsageError(
            f"measure.threads is {threads}; this machine has {cores} usable cores.", fix="Lower measure.threads."
        )


def _measure(job: Job, folder: Path) -> Record:
    section = job.recipe.measure
    if section is None:
        raise RuntimeError("a recipe without a measure section has no such stage")
    contenders: dict[str, Path] = {}
    for name in ("teacher", "student"):
        if name in job.models:
            model = job.models[name]
            inputs = job.framework(model).inference.from_numpy(job.example)
            contenders[name] = export(model, folder / f"{name}.onnx", example_inputs=inputs).path
    contenders["exported"] = job.folder / MODEL
    result = race(contenders, job.example, reference="teacher", threads=section.threads, rounds=section.rounds)
    sizes = {name: path.stat().st_size for name, path in contenders.items()}
    speedup = result.speedups["exported"]
    before, after = (figures.micros(result.latencies[name].median_us) for name in ("teacher", "exported"))
    return {
        "did": section.runtime,
        "race": result.to_dict(),
        "onnx_bytes": sizes,
        "cells": [
            f"teacher {before} → {after}",
            figures.ratio(speedup.value, speedup.low, speedup.high),
            f"A/A {figures.digits(result.aa.value)}",
        ],
    }


def _load_nothing(job: Job, folder: Path, record: Record) -> None:
    """Load nothing: later stages do not use the results of these stages."""
