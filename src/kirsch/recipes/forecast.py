"""Forecast of a run: stages, costs, time, disk space and missing packages."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kirsch import files
from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill, fit
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.recipes.job import Job
from kirsch.recipes.manifest import PLAN, RECIPE
from kirsch.recipes.metrics import goal_text
from kirsch.recipes.models import random_weights
from kirsch.recipes.runner import materials_of
from kirsch.recipes.stages import check_objectives, check_threads, plan_for, stages_of

if TYPE_CHECKING:
    from pathlib import Path

    from kirsch.recipes.recipe import Recipe

TRIAL_BATCHES = 3
"""Training steps that are timed to estimate the time of a stage."""

EXPORT_SECONDS = 3.0
"""Estimated time of an export, which depends little on the model and is not measured."""


def forecast(recipe: Recipe, *, base: Path, folder: Path | None = None) -> dict[str, Any]:
    """Return the stages of a recipe with their models, costs and times, from a few timed steps of each.

    Args:
        recipe: recipe to forecast.
        base: folder that the recipe's references are relative to.
        folder: if given, recipe.yaml and plan.json are written to it.

    Returns:
        JSON-able: "name", "goal", "data", "stages" (key, model, parameters, macs, seconds), "plan" (groups, cost before
        and after), "plan_weights" (description of the weights that the plan was made from; if they are trained before
        pruning, the run removes other units, and with a global ranking its cost may differ within the goal),
        "disk_bytes", "seconds", "missing" (packages), "notes".

    Raises:
        KirschError: the run would fail before its first long step.
    """
    check_threads(recipe)
    materials = materials_of(recipe, base)
    scratch = folder or base
    job = Job(recipe, scratch, materials.data, materials.make_teacher, materials.make_student, _ignore, _never)
    teacher = materials.make_teacher()
    start = (materials.make_student or materials.make_teacher)()  # not the same object as the teacher
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
    """Return a description of the weights that the plan of a forecast is made from."""
    if recipe.student is not None:
        return f"the weights of {recipe.student.model} before training"
    if recipe.teacher.train is not None:
        return f"the weights of {recipe.teacher.model} before training"
    if recipe.teacher.model.startswith("timm:"):
        return f"random weights: {recipe.teacher.model} is neither pretrained nor trained"
    return f"the weights that {recipe.teacher.model} comes with"


def _seconds(job: Job, key: str, teacher: Any, start: Any) -> float:
    """Return the estimated time of a stage, from a few timed training steps."""
    recipe = job.recipe
    distillation = recipe.section_of(key)
    section = recipe.teacher.train if key == "teacher" else distillation.train if distillation else None
    if key == "measure" and recipe.measure is not None:
        return EXPORT_SECONDS + 0.04 * recipe.measure.rounds
    if section is None:
        return EXPORT_SECONDS if key == "export" else 1.0
    data = job.data.batches(recipe.data.batch_size)
    train, count = job.data.train, TRIAL_BATCHES * data.batch_size
    part = ArrayData(train.inputs[:count], train.labels[:count], data.batch_size, data.augment)
    once, quiet = Training(epochs=1, learning_rate=1e-6), TrainingHooks(event=_ignore)
    objective = recipe.objective_of(key)

    def trial() -> None:
        if key == "teacher":
            fit(teacher, part, training=once, objective=objective)
        else:
            distill(start, teacher, part, objective=objective, training=once, hooks=quiet, check_teacher=False)

    trial()  # warm-up
    started = time.perf_counter()
    trial()
    return (time.perf_counter() - started) / len(part) * len(data) * section.epochs


def _ignore(event: dict[str, Any]) -> None:
    """Drop an event."""


def _never() -> None:
    """Never stop."""
