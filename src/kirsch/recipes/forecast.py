"""What a recipe would do, before it does it: stages, costs, time, disk, and what is missing."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kirsch import files
from kirsch.distillation.distill import distill, fit
from kirsch.frameworks.data import ArrayData
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.recipes.job import Job
from kirsch.recipes.metrics import goal_text
from kirsch.recipes.models import random_weights
from kirsch.recipes.runner import materials_of
from kirsch.recipes.seal import PLAN, RECIPE
from kirsch.recipes.stages import check_objectives, check_threads, plan_for, stages_of

if TYPE_CHECKING:
    from pathlib import Path

    from kirsch.recipes.recipe import Recipe

TRIAL_BATCHES = 3
"""Training steps that are timed to foretell a stage."""

EXPORT_SECONDS = 3.0
"""An export takes some seconds whatever the model; it is not tried out."""


def forecast(recipe: Recipe, *, base: Path, folder: Path | None = None) -> dict[str, Any]:
    """The stages of a recipe with their models, costs and times, by trying a few steps of each.

    Args:
        recipe: what would be done.
        base: folder that its files are relative to.
        folder: gets recipe.yaml and plan.json if given, and nothing else.

    Returns:
        As JSON: "name", "goal", "data", "stages" (key, model, parameters, macs, seconds), "plan" (groups, cost before
        and after), "plan_weights" (in words, the weights that the plan was made by; where these are trained before the
        cut, other units go then, and the cost can be another one within the goal where all layers are ranked together),
        "disk_bytes", "seconds", "missing", "notes".

    Raises:
        KirschError: whatever would stop the job before its first long step.
    """
    check_threads(recipe)
    materials = materials_of(recipe, base)
    scratch = folder or base
    job = Job(recipe, scratch, materials.data, materials.make_teacher, materials.make_student, _ignore, _never)
    teacher = materials.make_teacher()
    start = (materials.make_student or materials.make_teacher)()  # a model of its own: none learns from itself
    costs = {"teacher": job.count(teacher)}
    if materials.make_student:
        costs["distill"] = job.count(start)
    check_objectives(job, teacher, start)
    plan = None
    if recipe.prune is not None:
        _, plan = plan_for(job, start, recipe.prune)
        costs["prune"] = costs["recover"] = (plan.after.parameters, plan.after.macs)
    models = {"teacher": recipe.teacher.model, "distill": recipe.student.model if recipe.student else None}
    stages = [
        {
            "key": stage.key,
            "model": models.get(stage.key),
            "parameters": costs[stage.key][0] if stage.key in costs else None,
            "macs": costs[stage.key][1] if stage.key in costs else None,
            "seconds": _seconds(job, stage.key, teacher, start),
        }
        for stage in stages_of(recipe)
    ]
    if folder is not None:
        files.check_writable(folder)
        files.write_text(folder / RECIPE, recipe.to_yaml())
        if plan is not None:
            files.write_text(folder / PLAN, plan.to_json())
    sentence = random_weights(recipe.teacher.model, recipe.seed) if recipe.teacher.train is None else ""
    return {
        "name": recipe.name,
        "goal": goal_text(job),
        "data": {
            "name": materials.data.name,
            "train": len(materials.data.train),
            "validation": len(materials.data.validation),
            "test": len(materials.data.test),
        },
        "stages": stages,
        "plan": json.loads(plan.to_json()) if plan is not None else None,
        "plan_weights": _weights(recipe) if plan is not None else None,
        "disk_bytes": sum(4 * parameters * 4 for parameters, _ in costs.values()) + 1_000_000,
        "seconds": sum(stage["seconds"] for stage in stages),
        "missing": [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None],
        "notes": [sentence] if sentence else [],
    }


def _weights(recipe: Recipe) -> str:
    """The weights that the plan of a forecast is made by, in words."""
    if recipe.student is not None:
        return f"the weights of {recipe.student.model} before training"
    if recipe.teacher.train is not None:
        return f"the weights of {recipe.teacher.model} before training"
    if recipe.teacher.model.startswith("timm:"):
        return f"random weights: {recipe.teacher.model} is neither pretrained nor trained"
    return f"the weights that {recipe.teacher.model} comes with"


def _seconds(job: Job, key: str, teacher: Any, start: Any) -> float:
    """How long a stage would take: its steps, timed on a few."""
    recipe = job.recipe
    taught = {"distill": recipe.student.distill if recipe.student else None, "recover": recipe.recover}.get(key)
    section = recipe.teacher.train if key == "teacher" else taught.train if taught else None
    if key == "measure" and recipe.measure is not None:
        return EXPORT_SECONDS + 0.04 * recipe.measure.rounds
    if section is None:
        return EXPORT_SECONDS if key == "export" else 1.0
    whole = job.data.batches(recipe.data.batch_size)
    train, few = job.data.train, TRIAL_BATCHES * whole.batch_size
    part = ArrayData(train.inputs[:few], train.labels[:few], whole.batch_size, whole.augment)
    once, quiet = Training(epochs=1, learning_rate=1e-6), TrainingHooks(event=_ignore)
    learned = recipe.objective_of(key)

    def trial() -> None:
        if key == "teacher":
            fit(teacher, part, training=once, objective=learned)
        else:
            distill(start, teacher, part, objective=learned, training=once, hooks=quiet, check_teacher=False)

    trial()
    begun = time.perf_counter()
    trial()
    return (time.perf_counter() - begun) / len(part) * len(whole) * section.epochs


def _ignore(event: dict[str, Any]) -> None:
    """A forecast tells nothing on the way."""


def _never() -> None:
    """A forecast is not stopped."""
