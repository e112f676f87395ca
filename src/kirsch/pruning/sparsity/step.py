"""Step of a job that sets weights of its model to zero, and holds them there in all later steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from kirsch import figures
from kirsch.annotations import Seed
from kirsch.frameworks.find import framework_of
from kirsch.jobs.job import WEIGHTS
from kirsch.jobs.step import STEPS, Step, model_cells
from kirsch.pruning.sparsity.options import SparsityOptions
from kirsch.pruning.sparsity.sparsify import sparsify

if TYPE_CHECKING:
    from pathlib import Path

    from kirsch.jobs.job import Job, Record
    from kirsch.pruning.sparsity.sparsified import Sparsified

CALIBRATION, PREVIEW = 256, 8
"""Number of training samples for the importances from inputs; and before the job starts."""


@STEPS.register("sparsify")
class Sparsify(SparsityOptions, Step):
    """Set weights of the model to zero without a change of shapes; all later steps keep the zeros.

    The options are those of `kirsch.sparsify`. A further step raises the sparsity.
    """

    seed: Seed | None = Field(None, description='seed of the importance "random"; null: the seed of the recipe')  # type: ignore[assignment]

    def preview(self, job: Job) -> None:
        """Check that the options fit the model, and mask weights of the model before training."""
        job.model = self._sparsified(job, PREVIEW).model

    def run(self, job: Job, folder: Path) -> Record:
        """Mask the weights, and write the model with its masks."""
        result = self._sparsified(job, CALIBRATION)
        job.model = result.model
        for text in result.notes:
            job.note(text)
        record: Record = {"model": "sparsified", "did": f"{figures.percent(result.sparsity)} zeros"}
        record |= job.save_and_evaluate(job.model, folder)
        record["sparsity"] = result.to_dict()
        size = f", {figures.bytes_(result.after.compressed_bytes)} compressed" if result.before else ""
        record["cells"] = [*model_cells(record), f"{figures.counted(len(result.layers), 'weight')}{size}"]
        return record

    def load(self, job: Job, folder: Path, record: Record) -> None:
        """Load the weights and masks into a copy of the model."""
        framework = framework_of(job.model)
        model = framework.masking.fold(job.model)
        shapes = {layer["name"]: tuple(layer["shape"]) for layer in record["sparsity"]["layers"]}
        framework.masking.hold(model, {name: np.ones(shape, bool) for name, shape in shapes.items()})
        patterns = {layer["name"]: layer["pattern"] for layer in record["sparsity"]["layers"]}
        framework.masking.set_patterns(model, patterns)
        framework.inference.load_weights(model, folder / WEIGHTS)
        job.model = framework.inference.inference_mode(model)

    def _sparsified(self, job: Job, samples: int) -> Sparsified:
        """Return the model of the job with masks; the samples are taken from the training part."""
        options: dict[str, Any] = {name: getattr(self, name) for name in SparsityOptions.model_fields}
        options["seed"] = job.seed if self.seed is None else self.seed
        if self.needs_inputs:
            training = framework_of(job.model).training
            options["data"] = training.seeded(lambda: job.data.calibration_batches(samples), job.seed)
        return sparsify(job.model, **options)
