"""The whole job for models and data given as objects."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.errors import UsageError
from kirsch.recipes.recipe import (
    Data,
    Distil,
    Export,
    Measure,
    Prune,
    PruneGoal,
    Recipe,
    Student,
    Teacher,
    Train,
    Wanted,
)
from kirsch.recipes.runner import Materials, new_folder_name, run
from kirsch.recipes.stages import MODEL

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.frameworks.training import Training
    from kirsch.graph.plan import Goal
    from kirsch.recipes.tasks.data import DataSet

GIVEN = "given"
"""In place of a reference, for a model that was given as an object."""


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


def compress(
    model: Any,
    data: DataSet,
    goal: Goal,
    *,
    student: Any = None,
    max_drop: float | None = None,
    distil: Training | None = None,
    recover: Training | None = None,
    temperature: float = 4.0,
    batch_size: int = 64,
    folder: str | Path | None = None,
    name: str = "model",
    listen: Callable[[dict[str, Any]], None] = lambda _event: None,
) -> Compressed:
    """A trained model made small: distilled if a student is given, pruned, recovered, exported, measured, reported.

    Args:
        model: trained; it is the teacher throughout, and is left as it is.
        data: the data set, in three parts.
        goal: of the removal, as fractions of what is pruned.
        student: a small untrained model that learns from the model; if left out, the model itself is pruned.
        max_drop: accuracy that may be lost against the model, as a fraction.
        distil: training of the student.
        recover: training after the removal.
        temperature: of the soft targets in both.
        batch_size: samples a step.
        folder: the run folder; a new one under runs/ if left out.
        name: for the report.
        listen: is given each event.

    Raises:
        UsageError: `distil` is given without a student.
        KirschError: whatever a stage raises; the run folder has what was done until then.
    """
    if distil is not None and student is None:
        raise UsageError("distil is given without a student.", mend="Give student=..., or leave distil out.")
    recipe = Recipe(
        name=name,
        data=Data(source=GIVEN, batch_size=batch_size),
        teacher=Teacher(model=GIVEN),
        student=Student(model=GIVEN, distil=_section(distil, temperature)) if student is not None else None,
        prune=Prune(goal=PruneGoal(**goal.to_dict())),
        recover=_section(recover, temperature),
        export=Export(),
        measure=Measure(),
        goal=Wanted(max_drop=max_drop),
    )
    materials = Materials(
        make_teacher=lambda: copy.deepcopy(model),
        make_student=(lambda: copy.deepcopy(student)) if student is not None else None,
        data=data,
        origin=GIVEN,
    )
    place = Path(folder) if folder is not None else Path("runs") / new_folder_name(recipe)
    outcome = run(recipe, place, listen=listen, materials=materials)
    return Compressed(
        model=outcome.model,
        artifact=place / MODEL,
        report=place / "report.html",
        metrics=outcome.metrics,
        met=outcome.exit_code == 0,
        folder=place,
    )


def _section(training: Training | None, temperature: float) -> Distil:
    """Settings of a training run as a recipe has them; its seed is the recipe's."""
    if training is None:
        return Distil(temperature=temperature)
    values = {field: getattr(training, field) for field in Train.model_fields}
    return Distil(temperature=temperature, train=Train(**values))
