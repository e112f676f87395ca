"""The stages of a job. Each makes or loads models, and leaves a record and files in its own folder."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import files
from kirsch.deploy.export import export, usage
from kirsch.deploy.measure import race
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.distillation.checks import first_batch
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.distiller import Distiller
from kirsch.errors import UsageError
from kirsch.frameworks.port import trace
from kirsch.frameworks.steadiness import require_steady
from kirsch.graph.plan import Goal, Plan
from kirsch.measurement.agreement import agreement
from kirsch.measurement.machine import usable_cores
from kirsch.pruning.choose import plan as choose
from kirsch.pruning.prune import prune_with_verification
from kirsch.pruning.store import load, save
from kirsch.recipes.job import LOGITS, Job
from kirsch.recipes.seal import MODEL, PLAN
from kirsch.report import figures

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kirsch.frameworks.training import Trained
    from kirsch.graph.graph import Graph
    from kirsch.recipes.recipe import Distill, Prune, Recipe
    from kirsch.recipes.section import Section

Record = dict[str, Any]
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Stage:
    """One step of a job.

    Args:
        key: its name.
        section: of the recipe; a change in it makes the stage anew.
        work: does it, with a folder for what it leaves; gives the record.
        load: takes up what a finished stage left.
    """

    key: str
    section: Section | None
    work: Callable[[Job, Path], Record]
    load: Callable[[Job, Path, Record], None]


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages that a recipe asks for, in order."""
    student, nothing = recipe.student, _load_nothing
    wanted = [
        Stage("teacher", recipe.teacher, _teacher, _load_teacher),
        Stage("distill", student, _distill, _load_student) if student else None,
        Stage("prune", recipe.prune, _prune, _load_pruned) if recipe.prune else None,
        Stage("recover", recipe.recover, _recover, _load_recovered) if recipe.recover else None,
        Stage("export", recipe.export, _export, nothing) if recipe.export else None,
        Stage("measure", recipe.measure, _measure, nothing) if recipe.export and recipe.measure else None,
    ]
    return [stage for stage in wanted if stage is not None]


# ------------------------------------------------------------------------------------------------ models


def _teacher(job: Job, folder: Path) -> Record:
    model = job.make_teacher().eval()
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
            f"The teacher {job.recipe.teacher.model} has random weights: a recipe loads no pretrained ones, and "
            "teacher.train is null. Name a callable that gives it with its weights, or train it."
        )
    record = _described(job, model, folder, "trained" if section else "given", history)
    load = f"Load trained weights in {job.recipe.teacher.model}, or train the teacher: state teacher.train."
    job.check_alive("teacher", record, *([] if section else [load]))
    job.models["teacher"] = job.models["result"] = model
    return record


def _load_teacher(job: Job, folder: Path, _record: Record) -> None:
    model = job.make_teacher()
    job.framework(model).load_weights(model, folder / WEIGHTS)
    job.models["teacher"] = job.models["result"] = model.eval()


def _distill(job: Job, folder: Path) -> Record:
    section = job.recipe.student
    if section is None or job.make_student is None:
        raise RuntimeError("a recipe without a student has no stage to distill one")
    trained = _taught(job, "distill", job.make_student(), section.distill)
    record = _described(job, trained.model, folder, "student", trained.history)
    record["first_batch"] = trained.first_batch
    record["cells"].append(_share(trained))
    job.check_alive("distill", record)
    job.models["student"] = job.models["result"] = trained.model
    return record


def _load_student(job: Job, folder: Path, _record: Record) -> None:
    if job.make_student is None:
        raise RuntimeError("a recipe without a student has none to load")
    model = job.make_student()
    job.framework(model).load_weights(model, folder / WEIGHTS)
    job.models["student"] = job.models["result"] = model.eval()


def _taught(job: Job, key: str, model: Any, section: Distill) -> Any:
    return distill(
        model,
        job.models["teacher"],
        job.data.batches(job.recipe.data.batch_size),
        objective=job.recipe.objective_of(key),
        training=section.train.settings(job.recipe.seed),
        validation=job.validation(),
        hooks=job.hooks(key),
    )


def _share(trained: Trained) -> str:
    """How much of the gradient is due to the teacher, by its largest term: at first, or at last where it warms up."""
    for shares in (trained.first_batch.get("gradient_shares", {}), trained.history[-1]["gradient_shares"]):
        terms = {name: share for name, share in shares.items() if name != "label"}
        if terms:
            name = max(terms, key=lambda name: terms[name])
            return f"{'KD' if name == 'kd' else name} {100 * terms[name]:.0f} % of gradient"
    return ""


def check_objectives(job: Job, teacher: Any, model: Any) -> None:
    """Make sure, before any training, that what the objectives compare is there in both models, and can be compared.

    Raises:
        UsageError: a place, a name or a shape does not fit, a model does not run on the data, or puts out
            probabilities.
        NumericError: a model gives other outputs at each run.
    """
    recipe = job.recipe
    for candidate in (teacher, *([model] if model is not teacher else [])):
        require_steady(candidate, (job.example,))
    first = first_batch(job.framework(model), job.data.batches(recipe.data.batch_size))
    student = model if model is not teacher else copy.deepcopy(model)
    for stage in ("distill", "recover"):
        if recipe.section_of(stage) is not None:
            Distiller(student, teacher, recipe.objective_of(stage), first).close()  # looks at the labels, too


def _described(job: Job, model: Any, folder: Path, did: str, history: list[Any]) -> Record:
    """The record of a stage that makes a whole model, whose weights go to the folder."""
    job.framework(model).save_weights(model, folder / WEIGHTS)
    record = {"did": did, "history": history, "bytes": (folder / WEIGHTS).stat().st_size, **job.judge(model, folder)}
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
    """The plan of a recipe for a model."""
    graph = trace(model, job.framework(model).tensor(job.example))
    plan = choose(
        graph,
        Goal(**section.goal.model_dump()),
        section.importance,
        section.scope,
        section.round_to,
        section.exclude,
        section.granularity,
        uniform=section.uniform,
        norm=section.norm,
        min_keep=section.min_keep,
        seed=job.recipe.seed,
    )
    return graph, plan


def _prune(job: Job, folder: Path) -> Record:
    section = job.recipe.prune
    if section is None:
        raise RuntimeError("a recipe without a section to prune has no such stage")
    before = job.models["result"]
    graph, plan = plan_for(job, before, section)
    pruned = prune_with_verification(before, plan)
    save(pruned.model, folder / "model")
    files.write_text(job.folder / PLAN, pruned.plan.to_json())
    notes = [*plan.notes, *pruned.warnings]
    for text in notes:
        job.note(text)
    record = {"did": _saved(plan), **job.judge(pruned.model, folder)}
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
    """What a plan removes, group by group and layer by layer, and what holds the rest, as JSON."""
    going = {removal.name: removal for removal in plan.groups}
    whole, left = graph.keep({}), plan.keep(graph)
    before, after = graph.prices.by_owner(whole), graph.prices.by_owner(left)
    groups, layers = [], []
    for group in graph.groups:
        removal = going.get(group.name)
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
                mask = graph.kept(graph.axes[name, 0], left)
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
    sealed, shown = folder / "model" / "plan.json", job.folder / PLAN
    if not shown.is_file() or shown.read_bytes() != sealed.read_bytes():
        files.write_bytes(shown, sealed.read_bytes())


def _before_pruning(job: Job) -> Callable[[], Any]:
    return job.make_student or job.make_teacher


def _recover(job: Job, folder: Path) -> Record:
    section = job.recipe.recover
    if section is None:
        raise RuntimeError("a recipe without a section to recover has no such stage")
    model = copy.deepcopy(job.models["result"])  # without a student or pruning it is the teacher itself
    trained = _taught(job, "recover", model, section)
    record = _described(job, trained.model, folder, "", trained.history)
    record["first_batch"] = trained.first_batch
    job.check_alive("recover", record)
    job.models["result"] = trained.model
    return record


def _load_recovered(job: Job, folder: Path, _record: Record) -> None:
    model = copy.deepcopy(job.models["result"])  # it is also the pruned one, or the student, or the teacher
    job.framework(model).load_weights(model, folder / WEIGHTS)
    job.models["result"] = model


# ------------------------------------------------------------------------------------------------ deployment


def _export(job: Job, folder: Path) -> Record:
    section, model = job.recipe.export, job.models["result"]
    if section is None:
        raise RuntimeError("a recipe without a section to export has no such stage")
    framework = job.framework(model)
    target = job.folder / MODEL
    target.parent.mkdir(exist_ok=True)
    artifact = export(model, target, example_inputs=framework.tensor(job.example), format=section.format)
    if "pruned" in job.models:
        save(model, target.parent / "model")
    session = OnnxSession(target)
    logits = session.predict(job.data.test.inputs, batch_size=job.most)
    np.save(folder / LOGITS, logits, allow_pickle=False)
    agreed = agreement(framework.predict(model, job.data.test.inputs, batch_size=job.most), logits)
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
    """Make sure, before any work, that the machine has the cores to time on.

    Raises:
        UsageError: it has fewer.
    """
    wanted, cores = recipe.measure.threads if recipe.measure and recipe.export else 1, usable_cores()
    if wanted > cores:
        raise UsageError(f"measure.threads is {wanted}; this machine has {cores}.", fix="Lower measure.threads.")


def _measure(job: Job, folder: Path) -> Record:
    section = job.recipe.measure
    if section is None:
        raise RuntimeError("a recipe without a section to measure has no such stage")
    contenders: dict[str, Path] = {}
    for name in ("teacher", "student"):
        if name in job.models:
            model = job.models[name]
            inputs = job.framework(model).tensor(job.example)
            contenders[name] = export(model, folder / f"{name}.onnx", example_inputs=inputs).path
    contenders["exported"] = job.folder / MODEL
    found = race(contenders, job.example, reference="teacher", threads=section.threads, rounds=section.rounds)
    sizes = {name: path.stat().st_size for name, path in contenders.items()}
    gain = found.speedups["exported"]
    slow, fast = (figures.micros(found.latencies[name].median_us) for name in ("teacher", "exported"))
    return {
        "did": section.runtime,
        "race": found.to_dict(),
        "onnx_bytes": sizes,
        "cells": [
            f"teacher {slow} → {fast}",
            figures.ratio(gain.value, gain.low, gain.high),
            f"A/A {figures.digits(found.aa.value)}",
        ],
    }


def _load_nothing(job: Job, folder: Path, record: Record) -> None:
    """The artifact lies in the run folder already; nothing is taken up from the stage itself."""
