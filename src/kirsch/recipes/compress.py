"""Compression of a model in memory, from distillation to the report."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kirsch import files, strict_json
from kirsch.annotations import Count
from kirsch.arguments import checked
from kirsch.data.annotations import Model
from kirsch.data.dataset import DataSet
from kirsch.deploy.export import Artifact
from kirsch.distillation.objective import Objective
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.training import Training
from kirsch.graph.plan import Goal
from kirsch.recipes.job import RECORD
from kirsch.recipes.layout import stage_line, verdict_lines
from kirsch.recipes.manifest import CHECKPOINTS, MODEL, REPORT
from kirsch.recipes.recipe import Train, recipe_of
from kirsch.recipes.runner import GIVEN, Materials, new_folder_name, run
from kirsch.recipes.stages import WEIGHTS
from kirsch.tables import Part, Printable


@dataclass(frozen=True)
class Compressed(Printable):
    """Result of `kirsch.compress`.

    Args:
        model: compressed model.
        artifact: exported file.
        report: path of the report.
        metrics: content of metrics.json.
        met: whether all goals are met.
        folder: run folder.
    """

    model: Any
    artifact: Artifact
    report: Path
    metrics: dict[str, Any]
    met: bool
    folder: Path

    def __repr__(self) -> str:
        """Return one line."""
        goals = "goals met" if self.met else "a goal is missed"
        return f"<kirsch.Compressed: {type(self.model).__name__}, {goals}, in {self.folder}>"

    def parts(self) -> list[Part]:
        """Return a line for each stage, and the lines on the goals, the report and the duration."""
        items = self.metrics["goal"]["items"]
        verdict = {
            "met": self.met,
            "text": " · ".join(item["text"] for item in items),
            "significance": " · ".join(item["significance"] for item in items if item["significance"]),
            "report": str(self.report),
            "seconds": self.metrics["seconds"],
        }
        return [*map(stage_line, self.metrics["stages"]), [], *verdict_lines(verdict)]


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
    """Compress a trained model: distill it if a student is given, prune, recover, export, measure and report.

    Args:
        model: trained model. It is the teacher of all training, and is not changed.
        data: data set with training, validation and test part.
        goal: limits of the pruned model, as fractions of the model before pruning.
        student: small untrained model that learns from the model and is then pruned; by default the model itself is
            pruned.
        max_drop: largest allowed drop of accuracy compared with the model, as a fraction below 1: 0.01 is one
            percentage point.
        distill: training of the student.
        recover: training after pruning.
        temperature: temperature of the soft targets in both trainings, if no objective is given; 4 by default.
        objective: objective of both trainings in place of soft targets and labels: an objective, or the name of a
            preset.
        batch_size: samples per training step.
        folder: run folder; by default a new folder under runs/.
        name: name of the model in the report.
        listen: called with each event.

    Raises:
        UsageError: `distill` is given without a student, or `max_drop` is not a fraction.
        KirschError: a stage failed; the run folder keeps the finished stages.
    """
    if distill is not None and student is None:
        raise UsageError("`distill` of kirsch.compress needs a student.", fix="Give student=..., or remove distill.")
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
        origin=_weights_hash(model) + ("" if student is None else _weights_hash(student)),
    )
    run_folder = Path(folder) if folder is not None else Path("runs") / new_folder_name(recipe)
    outcome = run(recipe, run_folder, listen=listen, materials=materials)
    exported = strict_json.read(run_folder / CHECKPOINTS / "export" / "done" / RECORD)["artifact"]
    del exported["usage"]  # code for the report
    return Compressed(
        model=outcome.model,
        artifact=Artifact.of_dict(run_folder / MODEL, exported),
        report=run_folder / REPORT,
        metrics=outcome.metrics,
        met=outcome.exit_code == 0,
        folder=run_folder,
    )


def _section(training: Training | None, temperature: float | None, objective: Objective | str | None) -> dict[str, Any]:
    """Return the recipe section of a training; the seed is a key of the recipe itself."""
    plain = objective if objective is None or isinstance(objective, str) else objective.to_dict()
    section = {
        "temperature": temperature,
        "objective": json.loads(json.dumps(plain)),
    }  # tuples become lists
    if training is None:
        return section
    return section | {"train": {field: getattr(training, field) for field in Train.model_fields}}


def _weights_hash(model: Any) -> str:
    """Return a hash over the weights of a model, so that a run folder of another model is not continued."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / WEIGHTS
        framework_of(model).inference.save_weights(model, weights)
        return files.sha256(weights)
