"""Forecast of a run: steps, costs, time, disk space and missing packages."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kirsch import files
from kirsch.pruning.step import plan_file
from kirsch.recipes.goals import expected_items, goal_texts
from kirsch.recipes.manifest import RECIPE
from kirsch.recipes.models import random_weights
from kirsch.recipes.recipe import is_of_teacher
from kirsch.recipes.runner import job_of, materials_of, preflight
from kirsch.steps import Train

if TYPE_CHECKING:
    from pathlib import Path

    from kirsch.recipes.recipe import Recipe

COPIES = 4
"""Copies of the weights on disk for each step: the result, two checkpoints, the optimizer."""


def forecast(recipe: Recipe, *, base: Path, folder: Path | None = None) -> dict[str, Any]:
    """Return the steps of a recipe with their models, costs and times, from a few timed training steps of each.

    Args:
        recipe: recipe to forecast.
        base: folder that the recipe's references are relative to.
        folder: if given, recipe.yaml and the plans are written to it.

    Returns:
        JSON values: "name", "goals", "expected" (for each limit of the cost, the cost that the steps reach), "data",
        "steps" (key, model, parameters, macs, size and memory if the goal of the job limits them, and seconds, which is
        None if the time cannot be estimated), "plans" (key of a step → plan), "plan_weights",
        "disk_bytes", "seconds", "missing", "notes".

        "model" of a step is the reference of the teacher or of the student in the first step that uses it, otherwise
        None. "seconds" is the sum over the steps whose time can be estimated; the times of the others are not included.
        "missing" lists the packages that the steps need and that are not installed.

        "plan_weights" describes the weights that the plans were made from. If the run trains these weights before it
        prunes, it removes other units than the forecast. With a global ranking, the cost may then differ as well,
        within the limits of the goal.

    Raises:
        KirschError: the run would fail before its first long step.
    """
    job = job_of(recipe, base, materials_of(recipe, base))  # nothing is written to the folder of the job
    preflight(job, recipe.all_steps)
    job.build()
    references = _references(recipe)
    steps: list[dict[str, Any]] = []
    for key, step in recipe.all_steps.items():
        job.key = key
        step.preview(job)
        steps.append(
            {
                "key": job.key,
                "model": references[key],
                **(job.cost(job.teacher) if is_of_teacher(step) else job.cost(job.model, job.goal.cost)),
                "seconds": step.seconds(job),
            }
        )
    if folder is not None:
        files.check_writable(folder)
        files.write_text(folder / RECIPE, recipe.to_yaml())
        for key, plan in job.plans.items():
            files.write_text(folder / plan_file(key), plan.to_json())
    trains = any(isinstance(step, Train) for step in recipe.steps)
    sentence = "" if trains or recipe.teacher.model is None else random_weights(recipe.teacher.model, recipe.seed)
    return {
        "name": recipe.name,
        "goals": goal_texts(job, recipe.all_steps),
        "expected": [item["text"] for item in expected_items(job, recipe.all_steps, steps[-1])],
        "data": {
            "name": job.data.name,
            **job.data.sizes,
        },
        "steps": steps,
        "plans": {key: json.loads(plan.to_json()) for key, plan in job.plans.items()},
        "plan_weights": _weights(recipe) if job.plans else None,
        "disk_bytes": sum(4 * step["parameters"] * COPIES for step in steps) + 1_000_000,
        "seconds": sum(step["seconds"] or 0.0 for step in steps),
        "missing": _missing_packages(recipe),
        "notes": [sentence] if sentence else [],
    }


def _references(recipe: Recipe) -> dict[str, str | None]:
    """Return, by key of a step, the reference of the model that this step is the first to use; otherwise None."""
    unused = {"teacher": recipe.teacher.model, "student": recipe.student.model if recipe.student else None}
    steps = recipe.all_steps.items()
    return {key: unused.pop("teacher" if is_of_teacher(step) else "student", None) for key, step in steps}


def _missing_packages(recipe: Recipe) -> list[str]:
    """Return the optional packages that the steps of a recipe need and that are not installed."""
    packages = dict.fromkeys(package for step in recipe.steps for package in step.packages)
    return [package for package in packages if find_spec(package) is None]


def _weights(recipe: Recipe) -> str:
    """Return a description of the weights that the plans of a forecast are made from."""
    if recipe.student is not None:
        return f"the weights of {recipe.student.model} before training"
    teacher = recipe.teacher.model
    if any(isinstance(step, Train) for step in recipe.steps):
        return f"the weights of {teacher} before training"
    if teacher is not None and teacher.startswith("timm:"):
        return f"random weights: {teacher} is neither pretrained nor trained"
    return f"the weights that {teacher} comes with"
