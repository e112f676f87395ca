"""Steps of a job that export its model and measure the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from kirsch import figures
from kirsch.annotations import Count, Rounds
from kirsch.deploy.export import EXPORTERS, export, usage
from kirsch.deploy.measure import compare_latencies
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.jobs.job import ARTIFACTS, LOGITS
from kirsch.jobs.step import STEPS, Step
from kirsch.measurement.agreement import agreement
from kirsch.measurement.latency import contradicting_medians
from kirsch.measurement.machine import usable_cores
from kirsch.options import FieldsError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from kirsch.jobs.job import Job, Record

EXPORTED = f"{ARTIFACTS}/model."
"""Beginning of the path of the exported file in the run folder; the rest is the name of the format."""


RUNTIME = "onnxruntime"
"""Runtime on which the step `Measure` times the exported file."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@STEPS.register("export")
class Export(Step):
    """Write the model to a file, and evaluate the file on the test part."""

    repeatable: ClassVar[bool] = False
    changes_model: ClassVar[bool] = False

    format: str = Field("onnx", description="format of the file: onnx, or the name of another registered exporter")

    def check(self) -> None:
        """Check that an exporter for the format is registered."""
        try:
            EXPORTERS[self.format]
        except UnknownNameError as error:
            raise FieldsError([(("format",), error)]) from error

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages of the ONNX exporter; those of other exporters are not known."""
        return ONNX_PACKAGES if self.format == "onnx" else ()

    def seconds(self, job: Job) -> float | None:
        """Return None: the time of an export is between a second and minutes, and known only after an export."""
        del job
        return None

    def run(self, job: Job, folder: Path) -> Record:
        """Export the model, run the file on the test part, and compare the outputs.

        Only ONNX files can be run. The quality of another file is that of the model, with which its exporter compares
        the file.
        """
        inference, target = framework_of(job.model).inference, job.folder / f"{EXPORTED}{self.format}"
        target.parent.mkdir(exist_ok=True)
        artifact = export(job.model, target, example_inputs=inference.from_numpy(job.example), format=self.format)
        inputs, size = job.data.test.inputs, job.evaluation_batch_size
        logits = inference.predict(job.model, inputs, batch_size=size)
        block: dict[str, Any] = {"file": f"{ARTIFACTS}/{target.name}", "bytes": artifact.bytes}
        block |= {"sha256": artifact.sha256, "format": self.format}
        cells = [self.format]
        if self.format == "onnx":
            reference, logits = logits, OnnxSession(target).predict(inputs, batch_size=size)
            agreed = agreement(reference, logits)
            same = _count_equal(*map(job.task.decode, (reference, logits)))
            block |= {"same_labels": same, "n": agreed.n, "max_error": agreed.max_error}
            block |= {"format": f"ONNX opset {artifact.details['opset']}", "usage": usage(artifact)}
            cells = [f"{same}/{agreed.n} same labels"]
        np.save(folder / LOGITS, logits, allow_pickle=False)
        quality = job.quality(logits)
        return {
            "model": "exported",
            "did": target.name,
            **job.cost(job.model, job.goal.cost),
            "bytes": artifact.bytes,
            **quality,
            "artifact": artifact.to_dict(),
            "export": block,
            "cells": [
                figures.interval(*(quality["accuracy"][name] for name in ("value", "low", "high"))),
                *cells,
                figures.bytes_(artifact.bytes),
            ],
        }

    def outside_files(self, record: Record) -> dict[str, str]:
        """Return the path and sha256 of the exported file."""
        return {record["export"]["file"]: record["export"]["sha256"]}


@STEPS.register("measure")
class Measure(Step):
    """Measure the latencies of the exported file and of the models before compression."""

    needs: ClassVar[str] = "export"
    repeatable: ClassVar[bool] = False
    changes_model: ClassVar[bool] = False

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
        paths["exported"] = job.folder / f"{EXPORTED}onnx"
        result = compare_latencies(paths, job.example, reference="teacher", threads=self.threads, rounds=self.rounds)
        speedup, first, last = result.speedups["exported"], result.latencies["teacher"], result.latencies["exported"]
        ratio = figures.ratio(speedup.value, speedup.low, speedup.high)
        of_medians = contradicting_medians(first, last, speedup)
        for text in result.notes():
            job.note(text)
        return {
            "did": RUNTIME,
            "race": result.to_dict(),
            "names": {**{key: name for name, (key, _) in job.trained.items()}, "export": "exported"},
            "onnx_bytes": {name: path.stat().st_size for name, path in paths.items()},
            "cells": [
                f"teacher {figures.micros(first.median_us)} → {figures.micros(last.median_us)}",
                ratio if of_medians is None else f"{ratio}, of the medians {figures.ratio(of_medians)}",
                f"A/A {figures.digits(result.aa.value)}",
            ],
        }


def _count_equal(first: NDArray[Any], second: NDArray[Any]) -> int:
    """Return the number of samples with equal predictions; the samples lie on the first axis."""
    return int((first == second).reshape(len(first), -1).all(1).sum())
