"""Steps of a job that export its model and measure the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from kirsch import figures
from kirsch.annotations import Count, Rounds
from kirsch.deploy.export import export, usage
from kirsch.deploy.measure import compare_latencies
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of
from kirsch.jobs.job import ARTIFACTS, LOGITS
from kirsch.jobs.step import STEPS, Step
from kirsch.measurement.agreement import agreement
from kirsch.measurement.latency import contradicting_medians
from kirsch.measurement.machine import usable_cores

if TYPE_CHECKING:
    from pathlib import Path

    from kirsch.jobs.job import Job, Record

MODEL = f"{ARTIFACTS}/model.onnx"
"""Exported file in the run folder."""


ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@STEPS.register("export")
class Export(Step):
    """Write the model to a file, and evaluate the file on the test part."""

    repeatable: ClassVar[bool] = False
    changes_model: ClassVar[bool] = False

    format: Literal["onnx"] = Field("onnx", description="format of the file")

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages of the ONNX exporter; those of other exporters are not known."""
        return ONNX_PACKAGES if self.format == "onnx" else ()

    def seconds(self, job: Job) -> float | None:
        """Return None: the time of an export is between a second and minutes, and known only after an export."""
        del job
        return None

    def run(self, job: Job, folder: Path) -> Record:
        """Export the model, run the file on the test part, and compare the outputs."""
        inference, target = framework_of(job.model).inference, job.folder / MODEL
        target.parent.mkdir(exist_ok=True)
        artifact = export(job.model, target, example_inputs=inference.from_numpy(job.example), format=self.format)
        inputs = job.data.test.inputs
        logits = OnnxSession(target).predict(inputs, batch_size=job.evaluation_batch_size)
        np.save(folder / LOGITS, logits, allow_pickle=False)
        agreed = agreement(inference.predict(job.model, inputs, batch_size=job.evaluation_batch_size), logits)
        quality = job.quality(logits)
        parameters, macs = job.count(job.model)
        return {
            "model": "exported",
            "did": target.name,
            "parameters": parameters,
            "macs": macs,
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


@STEPS.register("measure")
class Measure(Step):
    """Measure the latencies of the exported file and of the models before compression."""

    needs: ClassVar[str] = "export"
    repeatable: ClassVar[bool] = False
    changes_model: ClassVar[bool] = False

    runtime: Literal["onnxruntime"] = Field("onnxruntime", description="runtime of the exported file")
    threads: Count = Field(1, description="threads of the runtime")
    rounds: Rounds = Field(30, description="number of rounds; in each round, all models are timed in turn")

    def preview(self, job: Job) -> None:
        """Check that the machine has a core for each thread.

        Raises:
            UsageError: the machine has fewer usable cores.
        """
        cores = usable_cores()
        if self.threads > cores and not job.is_done():  # the result of an earlier run on another machine is kept
            raise UsageError(
                f"The step {job.key!r} has threads={self.threads}; this machine has {cores} usable cores.",
                fix="Lower threads.",
            )

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages of the ONNX exporter and of the runtime."""
        return ONNX_PACKAGES

    def seconds(self, job: Job) -> float | None:
        """Return None, as for an export: the models before compression are exported, too."""
        del job
        return None

    def run(self, job: Job, folder: Path) -> Record:
        """Measure the exported file, the teacher and the student in interleaved rounds."""
        paths: dict[str, Path] = {}
        for name, (_, model) in job.trained.items():
            inputs = framework_of(model).inference.from_numpy(job.example)
            paths[name] = export(model, folder / f"{name}.onnx", example_inputs=inputs).path
        paths["exported"] = job.folder / MODEL
        result = compare_latencies(paths, job.example, reference="teacher", threads=self.threads, rounds=self.rounds)
        speedup, first, last = result.speedups["exported"], result.latencies["teacher"], result.latencies["exported"]
        ratio = figures.ratio(speedup.value, speedup.low, speedup.high)
        of_medians = contradicting_medians(first, last, speedup)
        for text in result.notes():
            job.note(text)
        return {
            "did": self.runtime,
            "race": result.to_dict(),
            "names": {**{key: name for name, (key, _) in job.trained.items()}, "export": "exported"},
            "onnx_bytes": {name: path.stat().st_size for name, path in paths.items()},
            "cells": [
                f"teacher {figures.micros(first.median_us)} → {figures.micros(last.median_us)}",
                ratio if of_medians is None else f"{ratio}, of the medians {figures.ratio(of_medians)}",
                f"A/A {figures.digits(result.aa.value)}",
            ],
        }
