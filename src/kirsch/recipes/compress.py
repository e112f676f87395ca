"""The whole job for models and data given as objects."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kirsch import files
from kirsch.annotations import Count
from kirsch.arguments import checked
from kirsch.distillation.objective import Objective
from kirsch.errors import UsageError
from kirsch.frameworks.annotations import Model
from kirsch.frameworks.port import framework_of
from kirsch.frameworks.training import Training
from kirsch.graph.plan import Goal
from kirsch.recipes.recipe import Train, recipe_of
from kirsch.recipes.runner import GIVEN, Materials, new_folder_name, run
from kirsch.recipes.seal import MODEL, REPORT
from kirsch.recipes.stages import WEIGHTS
from kirsch.recipes.tasks.data import DataSet


@dataclass(frozen=True)
class Compressed:
    """What `kirsch.compress` gives back.

    Args:
        model: the small model.
        artifact: path of the exported file.
        report: path of the report.
        metrics: every number, as in metrics.json.
        met: whether all goals are met.
        folder: the run folder.
    """

    model: Any
    artifact: Path
    report: Path
    metrics: dict[str, Any]
    met: bool
    folder: Path


@checked
def compress(
    model: Model,
    data: DataSet,
    goal: Goal,
    *,
    student: Model | None = None,
    max_drop: float | None = None,
    distill: Training | None = None,
    recover: Training | None = None,
    temperature: float | None = None,
    objective: Objective | str | None = None,
    batch_size: Count = 64,
    folder: str | Path | None = None,
    name: str = "model",
    listen: Callable[[dict[str, Any]], Any] = lambda _event: None,
) -> Compressed:
    """A trained model made small: distilled if a student is given, pruned, recovered, exported, measured, reported.

    Args:
        model: trained; it is the teacher throughout, and is left as it is.
        data: the data set, in three parts.
        goal: of the removal, as fractions of what is pruned.
        student: a small untrained model that learns from the model; if left out, the model itself is pruned.
        max_drop: accuracy that may be lost against the model, as a fraction below 1: 0.01 is one percentage point.
        distill: training of the student.
        recover: training after the removal.
        temperature: of the soft targets in both, without an objective; 4 if left out.
        objective: what is learned in both, instead of soft targets and labels: an objective, or a preset by its name.
        batch_size: samples a step.
        folder: the run folder; a new one under runs/ if left out.
        name: for the report.
        listen: is given each event.

    Raises:
        UsageError: `distill` is given without a student.
        KirschError: whatever a stage raises; the run folder has what was done until then.
    """
    if distill is not None and student is None:
        raise UsageError("distill is given without a student.", fix="Give student=..., or leave distill out.")
    if max_drop is not None and not 0 <= max_drop < 1:
        raise UsageError(
            f"`max_drop` of kirsch.compress is {max_drop:g}; expected a fraction of at least 0 and below 1.",
            fix="For a loss of at most one percentage point of accuracy write max_drop=0.01.",
        )
    recipe = recipe_of(
        {
            "name": name,
            "data": {"source": GIVEN, "batch_size": batch_size},
            "teacher": {"model": GIVEN},
            "student": {"model": GIVEN, "distill": _section(distill, temperature, objective)}
            if student is not None
            else None,
            "prune": {"goal": goal.to_dict()},
            "recover": _section(recover, temperature, objective),
            "goal": {"max_drop": max_drop},
        },
        "call of kirsch.compress",
    )
    materials = Materials(
        make_teacher=lambda: copy.deepcopy(model),
        make_student=(lambda: copy.deepcopy(student)) if student is not None else None,
        data=data,
        origin=_fingerprint(model) + ("" if student is None else _fingerprint(student)),
    )
    place = Path(folder) if folder is not None else Path("runs") / new_folder_name(recipe)
    outcome = run(recipe, place, listen=listen, materials=materials)
    return Compressed(
        model=outcome.model,
        artifact=place / MODEL,
        report=place / REPORT,
        metrics=outcome.metrics,
        met=outcome.exit_code == 0,
        folder=place,
    )


def _section(training: Training | None, temperature: float | None, objective: Objective | str | None) -> dict[str, Any]:
    """Settings of a training run as a recipe has them; its seed is the recipe's."""
    stated = objective if objective is None or isinstance(objective, str) else objective.to_dict()
    section = {"temperature": temperature, "objective": json.loads(json.dumps(stated))}  # lists, as a file has them
    if training is None:
        return section
    return section | {"train": {field: getattr(training, field) for field in Train.model_fields}}


def _fingerprint(model: Any) -> str:
    """A hash over the weights of a model: a folder with the run of another one must not pass for its own."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / WEIGHTS
        framework_of(model).save_weights(model, weights)
        return files.sha256(weights)
