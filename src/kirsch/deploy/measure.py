"""Measure the size, latency and accuracy of models and exported files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import figures
from kirsch.annotations import Count, Rounds
from kirsch.arguments import checked
from kirsch.data.annotations import Inputs, Labeled, Model
from kirsch.data.arrays import host
from kirsch.data.batches import Batch, SeededData
from kirsch.data.dataset import Split
from kirsch.deploy.export import Artifact, export
from kirsch.deploy.onnx_inputs import require_inputs
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import DataError, NumericError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.measurement.latency import Latency, Ratio, disturbances, interleaved
from kirsch.measurement.machine import cpu, load, usable_cores
from kirsch.tables import Cell, Part, Piece, Printable, Table
from kirsch.tasks.classification import accuracy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kirsch.measurement.statistics import Rate


@dataclass(frozen=True)
class LatencyComparison:
    """Latencies of several files, measured in interleaved rounds on one runtime.

    Args:
        latencies: latency of one call by name.
        speedups: latency of the reference divided by the latency of the file, by name.
        aa: speedup of the reference over itself (A/A), which shows the noise of the measurement.
        reference: name of the reference.
        runtime: name and version of the runtime.
        threads: number of threads of the runtime.
        batch: number of samples per call.
        machine: name of the processor.
        load_before, load_after: load average of the machine; None if the operating system does not report it.
    """

    latencies: dict[str, Latency]
    speedups: dict[str, Ratio]
    aa: Ratio
    reference: str
    runtime: str
    threads: int
    batch: int
    machine: str
    load_before: float | None
    load_after: float | None

    def notes(self) -> list[str]:
        """Return a sentence for each sign that other processes disturbed the measurement."""
        return disturbances(self.latencies, self.speedups, self.aa, self.reference)

    def to_dict(self) -> dict[str, Any]:
        """Return the latencies, speedups and conditions as JSON."""
        return {
            "latencies": {name: latency.to_dict() for name, latency in self.latencies.items()},
            "speedups": {name: ratio.to_dict() for name, ratio in self.speedups.items()},
            "aa": self.aa.to_dict(),
            "reference": self.reference,
            "runtime": self.runtime,
            "threads": self.threads,
            "batch": self.batch,
            "machine": self.machine,
            "load_before": self.load_before,
            "load_after": self.load_after,
            "notes": self.notes(),
        }


def compare_latencies(
    paths: Mapping[str, Path], inputs: Any, *, reference: str, threads: int = 1, rounds: int = 30
) -> LatencyComparison:
    """Measure the latencies of several ONNX files in interleaved rounds on the same inputs.

    Args:
        paths: paths of the files by name.
        inputs: one batch, as an array, a tuple of arrays in the order of the files' inputs, or a dict by their names.
        reference: name of the file with which the others are compared.
        threads: number of threads of ONNX Runtime, 1 to the number of usable cores.
        rounds: number of interleaved rounds.

    Raises:
        UsageError: the number of threads is out of range.
        LoadError: a file cannot be loaded or has no inputs.
        ShapeError: a file does not accept the inputs.
    """
    cores = usable_cores()
    if not 1 <= threads <= cores:
        raise UsageError(
            f"`threads` is {threads}; expected 1 to {cores}, the cores of this machine.",
            "More threads than cores increase the latency.",
            "Give threads=1.",
        )
    before = load()
    sessions = {name: OnnxSession(path, threads) for name, path in paths.items()}
    for session in sessions.values():
        require_inputs(session)
    arrays = {name: session.arrays(inputs) for name, session in sessions.items()}
    calls = {name: session.call(*arrays[name]) for name, session in sessions.items()}
    timing = interleaved(calls, reference=reference, rounds=rounds)
    version = next(iter(sessions.values())).version
    return LatencyComparison(
        latencies=timing.latencies,
        speedups=timing.speedups,
        aa=timing.aa,
        reference=reference,
        runtime=f"onnxruntime {version}",
        threads=threads,
        batch=len(arrays[reference][0]),
        machine=cpu()[0],
        load_before=before,
        load_after=load(),
    )


@dataclass(frozen=True)
class Measurement(Printable):
    """Size, latency and accuracy of a model or an exported file.

    Args:
        parameters: number of parameters; None for a file.
        macs: multiply-accumulates of one call with `batch` samples, counted during a run of the model; None for a file.
        bytes: size of the ONNX file in bytes.
        latency: latency of one call.
        batch: number of samples per call; 1 unless the batch size of the file is fixed.
        accuracy: accuracy on the given data; None without data.
        aa: speedup of the file over itself (A/A), which shows the noise of the measurement.
        runtime, threads: runtime with its version, and its number of threads.
        not_measured: names of the quantities that were not measured, each with the reason.
    """

    parameters: int | None
    macs: int | None
    bytes: int
    latency: Latency
    batch: int
    accuracy: Rate | None
    aa: Ratio
    runtime: str
    threads: int
    not_measured: tuple[str, ...]

    def __repr__(self) -> str:
        """Return one line."""
        accuracy = f", accuracy {figures.percent(self.accuracy.value)}" if self.accuracy is not None else ""
        size, latency = figures.bytes_(self.bytes), figures.micros(self.latency.median_us)
        return f"<kirsch.Measurement: {size}, {latency} on {self.runtime}{accuracy}>"

    def parts(self) -> list[Part]:
        """Return size, latency, accuracy, runtime and noise as a table."""
        return [self.table()]

    def table(self, inputs: str = "") -> Table:
        """Return the table of the measurement, with a row for the shapes of the inputs if `inputs` is not empty."""
        latency, aa = self.latency, self.aa
        sizes = [f"{figures.bytes_(self.bytes)} as ONNX"]
        if self.parameters is not None and self.macs is not None:
            sizes = [f"{figures.count(self.parameters)} parameters", f"{figures.count(self.macs)} MACs", *sizes]
        times = (
            f"{figures.micros(latency.median_us)}"
            f" [p10 {figures.micros(latency.p10_us)} – p90 {figures.micros(latency.p90_us)}]"
            f"   p95 {figures.micros(latency.p95_us)}   median of {latency.rounds} rounds of {latency.calls} calls"
        )
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        rows: list[list[Cell]] = [["size", "   ".join(sizes)]]
        rows += [["input", inputs]] if inputs else []
        rows += [["latency", times]]
        if self.accuracy is not None:
            rows += [["accuracy", figures.interval(self.accuracy.value, self.accuracy.low, self.accuracy.high)]]
        rows += [
            ["runtime", f"{self.runtime}, {threads}, batch {self.batch}"],
            ["noise", f"A/A {figures.ratio(aa.value, aa.low, aa.high)}: the same file against itself"],
        ]
        texts = disturbances({"the file": latency}, {}, aa, "the file")
        rows += [[Piece("note", "warning"), text] for text in texts]
        rows += [[Piece("not measured", "warning"), text] for text in self.not_measured]
        return Table(rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON."""
        return {
            "parameters": self.parameters,
            "macs": self.macs,
            "bytes": self.bytes,
            "latency": self.latency.to_dict(),
            "batch": self.batch,
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "aa": self.aa.to_dict(),
            "runtime": self.runtime,
            "threads": self.threads,
            "not_measured": list(self.not_measured),
        }


@checked
def measure(
    model_or_artifact: Artifact | str | Path | Model,
    *,
    example_inputs: Inputs,
    data: Labeled | None = None,
    threads: Count = 1,
    rounds: Rounds = 30,
) -> Measurement:
    """Measure the parameters, MACs, bytes, latency and accuracy of a model or an exported file.

    Args:
        model_or_artifact: a model, which is exported to a temporary file, an `Artifact`, or the path of an ONNX file.
        example_inputs: one batch as an array, a tuple of positional or a dict of keyword arguments; the first sample is
            used.
        data: labeled data on which the accuracy of the file is measured: (inputs, labels) as arrays, a `Split`,
            `ArrayData`, or batches of such pairs, such as a DataLoader. Several inputs are a tuple in the order of the
            file's inputs, or a dict by their names; labels are class numbers, shape (N,).
        threads: number of threads of ONNX Runtime.
        rounds: number of rounds of the timing. The 95 % confidence interval of a median needs at least 6.

    Returns:
        The `Measurement`. If the batch size of the file is fixed, latency and MACs are for one batch of this size.

    Raises:
        UsageError: the number of threads is out of range, or the names of the inputs differ from the file's.
        LoadError: the file cannot be loaded or has no inputs.
        ShapeError: the file does not accept the inputs.
        DataError: the labels are not class numbers.
        NumericError: an output contains no finite number for the example inputs.
    """
    not_measured = [] if data is not None else ["Accuracy: no data was given."]
    if isinstance(model_or_artifact, (Artifact, str, Path)):
        path = model_or_artifact.path if isinstance(model_or_artifact, Artifact) else Path(model_or_artifact)
        not_measured.append("Parameters and MACs: they are counted on a model, not on a file.")
        return _measure_file(path, example_inputs, data, threads, rounds, (None, None), not_measured)
    framework = framework_of(model_or_artifact)
    with tempfile.TemporaryDirectory() as folder:
        artifact = export(model_or_artifact, Path(folder) / "model.onnx", example_inputs=example_inputs)
        size = OnnxSession(artifact.path).batch or 1
        counts = framework.analysis.count(model_or_artifact, _first(example_inputs, size))
        return _measure_file(artifact.path, example_inputs, data, threads, rounds, counts, not_measured)


def _first(inputs: Any, size: int) -> Any:
    """Return the first samples of nested inputs; values that are not arrays are kept."""
    if isinstance(inputs, Mapping):
        return {name: _first(part, size) for name, part in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        parts = [_first(part, size) for part in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs[:size] if hasattr(inputs, "shape") else inputs


def _labeled(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the inputs and labels of one pair of arrays, or of each batch.

    Raises:
        DataError: a batch has no labels, or there are no batches.
    """
    data = (data.inputs, data.labels) if isinstance(data, Split) else data
    batches = data.epoch(0, 0) if isinstance(data, SeededData) else [data] if isinstance(data, tuple) else data
    empty = True
    for batch in map(Batch.of, batches):
        if batch.targets is None:
            raise DataError("A batch of `data` has no labels.", fix="Give (inputs, labels), or batches of such pairs.")
        yield batch.inputs, batch.targets
        empty = False
    if empty:
        raise DataError("`data` has no batches.", fix="Give (inputs, labels), or batches of such pairs.")


def _measure_file(
    path: Path,
    inputs: Any,
    data: Any,
    threads: int,
    rounds: int,
    counts: tuple[int | None, int | None],
    not_measured: list[str],
) -> Measurement:
    session = OnnxSession(path)
    require_inputs(session)
    size = session.batch or 1
    first = session.arrays(_first(inputs, size))
    if size != 1:
        not_measured.append(
            f"One sample: the batch size of the file is fixed; latency and MACs are for {size} samples."
        )
    for name, output in zip(session.outputs, session.run(*first), strict=True):
        if np.issubdtype(output.dtype, np.floating) and output.size and not np.isfinite(output).any():
            raise NumericError(
                f"The output {name!r} of {path.name} contains no finite number for the example inputs.",
                fix="Fix the model, or give example inputs with realistic values.",
            )
    comparison = compare_latencies({"model": path}, first, reference="model", threads=threads, rounds=rounds)
    measured_accuracy = None
    if data is not None:
        session = OnnxSession(path, threads)
        batches = [(session.predict(part), host(labels)) for part, labels in _labeled(data)]
        measured_accuracy = accuracy(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    return Measurement(
        parameters=counts[0],
        macs=counts[1],
        bytes=path.stat().st_size,
        latency=comparison.latencies["model"],
        batch=comparison.batch,
        accuracy=measured_accuracy,
        aa=comparison.aa,
        runtime=comparison.runtime,
        threads=threads,
        not_measured=tuple(not_measured),
    )
