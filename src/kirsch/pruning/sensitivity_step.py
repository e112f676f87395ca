"""Step of a job that measures the sensitivity of its model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

from kirsch import figures, files
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.trace import trace
from kirsch.jobs.job import without_masks
from kirsch.jobs.step import STEPS, Step
from kirsch.pruning.sensitivity import passes_of, sensitivity
from kirsch.pruning.sensitivity_options import SensitivityOptions
from kirsch.pruning.step import validation_of

if TYPE_CHECKING:
    from pathlib import Path

    from kirsch.jobs.job import Job, Record
    from kirsch.pruning.quality import Quality

FILE = "sensitivity.json"
"""File in the folder of the step with the result."""


@STEPS.register("sensitivity")
class MeasureSensitivity(SensitivityOptions, Step):
    """Measure the quality without a part of the units of each group, on the validation part; nothing is changed.

    The options are those of `kirsch.sensitivity`. The report shows the result as a figure and a table.
    """

    changes_model: ClassVar[bool] = False

    def preview(self, job: Job) -> None:
        """Check the options, the labels and the metric on the model before training."""
        self._passes(job)

    def _passes(self, job: Job) -> tuple[Quality, int]:
        """Return the evaluation of the models, and the number of models that are evaluated."""
        measured = validation_of(job, self.metric, self.class_weights)
        graph = trace(without_masks(job.model), framework_of(job.model).inference.from_numpy(job.example))
        return passes_of(graph, measured["validation"], self, measured["metric"], measured["class_weights"])

    def seconds(self, job: Job) -> float | None:
        """Return the estimated time, from one evaluation of the model."""
        quality, passes = self._passes(job)
        start = time.monotonic()
        _ = quality.original
        return passes * (time.monotonic() - start)

    def run(self, job: Job, folder: Path) -> Record:
        """Measure the sensitivity, and write it as JSON."""
        graph = trace(without_masks(job.model), framework_of(job.model).inference.from_numpy(job.example))
        options = {name: getattr(self, name) for name in SensitivityOptions.model_fields}
        options |= validation_of(job, self.metric, self.class_weights)
        found = sensitivity(graph, options.pop("validation"), **options, seed=job.seed, progress=False)
        files.write_text(folder / FILE, found.to_json())
        for text in found.notes:
            job.note(text)
        counted = [figures.counted(len(found.groups), "group")] * bool(found.groups)
        counted += [figures.counted(len(found.blocks), "block")] * bool(found.blocks)
        cells = ["", "", "", f"{found.metric} {found.value_text(found.original)} on {found.samples} samples"]
        return {"did": ", ".join(counted), "cells": cells, "sensitivity": found.to_dict()}

    def load(self, job: Job, folder: Path, record: Record) -> None:
        """Do nothing: the record contains the result."""
