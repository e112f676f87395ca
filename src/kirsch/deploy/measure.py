"""What a model or file costs where it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kirsch import figures
from kirsch.annotations import Count
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
from kirsch.measurement.latency import FEWEST_ROUNDS, Latency, Ratio, interleaved
from kirsch.measurement.machine import cpu, load, usable_cores
from kirsch.measurement.statistics import Rate
from kirsch.tables import Cell, Part, Piece, Printable, Table
from kirsch.tasks.classification import accuracy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kirsch.measurement.statistics import Rate


@dataclass(frozen=True)
class Race:
    """Several files timed in turn on one runtime.

    Args:
        latencies: name → time of one call.
        speedups: name → how much faster than the reference.
        aa: the reference against itself: the noise floor.
        reference: which one that is.
        runtime: with version.
        threads, batch: of every call.
        machine: processor.
        load_before, load_after: load average of the machine; None where it has none.
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
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
        }


def race(contenders: Mapping[str, Path], inputs: Any, *, reference: str, threads: int = 1, rounds: int = 30) -> Race:
    """Time several ONNX files in turn on the same inputs.

    Args:
        contenders: name → file.
        inputs: one batch, as an array or a tuple of them.
        reference: the name that the others are compared with.
        threads: of ONNX Runtime, 1 to the number of usable cores.
        rounds: of the interleaved run.
    """
    cores = usable_cores()
    if not 1 <= threads <= cores:
        raise UsageError(
            f"`threads` is {threads}; expected 1 to {cores}, the cores of this machine.",
            "More threads than cores slow down.",
            "Give threads=1.",
        )
    before = load()
    arrays = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    sessions = {name: OnnxSession(path, threads) for name, path in contenders.items()}
    for session in sessions.values():
        require_inputs(session)
    calls = {name: session.call(*arrays) for name, session in sessions.items()}
    timing = interleaved(calls, reference=reference, rounds=rounds)
    version = next(iter(sessions.values())).version
    return Race(
        latencies=timing.latencies,
        speedups=timing.speedups,
        aa=timing.aa,
        reference=reference,
        runtime=f"onnxruntime {version}",
        threads=threads,
        batch=len(arrays[0]),
        machine=cpu()[0],
        load_before=before,
        load_after=load(),
    )


@dataclass(frozen=True)
class Measurement(Printable):
    """What a model or file costs.

    Args:
        parameters: numbers that are trained; None for a file.
        macs: multiply-accumulates for one sample, counted while it ran; None for a file.
        bytes: of the ONNX file.
        latency: of one call with one sample.
        accuracy: on the data given; None without data.
        aa: noise floor of the timing.
        runtime, threads: where it was timed.
        not_measured: what was left out, and why.
    """

    parameters: int | None
    macs: int | None
    bytes: int
    latency: Latency
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
        """Return the table of the measurement, with the shapes of its inputs if they are given."""
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
            ["runtime", f"{self.runtime}, {threads}, batch 1"],
            ["noise", f"A/A {figures.ratio(aa.value, aa.low, aa.high)}: the same file against itself"],
        ]
        rows += [[Piece("not measured", "warning"), text] for text in self.not_measured]
        return Table(rows)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "parameters": self.parameters,
            "macs": self.macs,
            "bytes": self.bytes,
            "latency": self.latency.to_dict(),
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
    runtime: Literal["onnxruntime"] = "onnxruntime",  # noqa: ARG001 - the only one there is
    threads: Count = 1,
    rounds: Count = 30,
) -> Measurement:
    """Parameters, MACs, bytes, latency and accuracy of a model or an exported file.

    Args:
        model_or_artifact: a model (exported to a temporary file for timing), an `Artifact`, or a path of one.
        example_inputs: one batch: an array, a tuple of positional or a dict of keyword ones; its first sample is used.
        data: (inputs, labels) as arrays, a `Split`, `ArrayData`, or batches of such pairs, such as a DataLoader; the
            accuracy of the file is measured on it. Inputs of several arrays are a tuple in the order of the file, or a
            dict by the names of its inputs; labels are class numbers, shape (N,).
        runtime: "onnxruntime".
        threads: of the runtime.
        rounds: of the timing, at least 6.

    Raises:
        UsageError: too few rounds, or inputs whose names are not those of the file.
        DataError: the labels are not class numbers.
    """
    if rounds < FEWEST_ROUNDS:
        raise UsageError(
            f"`rounds` is {rounds}; a confidence interval needs more.", fix=f"Give at least {FEWEST_ROUNDS}."
        )
    missing = [] if data is not None else ["Accuracy: no data was given."]
    if isinstance(model_or_artifact, (Artifact, str, Path)):
        given = model_or_artifact
        path = given.path if isinstance(given, Artifact) else Path(given)
        missing.append("Parameters and MACs: they are counted on a model, not on a file.")
        return _measured(path, example_inputs, data, threads, rounds, (None, None), missing)
    framework = framework_of(model_or_artifact)
    with tempfile.TemporaryDirectory() as folder:
        artifact = export(model_or_artifact, Path(folder) / "model.onnx", example_inputs=example_inputs)
        size = OnnxSession(artifact.path).batch or 1
        counted = framework.analysis.count(model_or_artifact, _first(example_inputs, size))
        return _measured(artifact.path, example_inputs, data, threads, rounds, counted, missing)


def _first(inputs: Any, size: int) -> Any:
    """The first samples of inputs that may be nested, with what is no array as it is."""
    if isinstance(inputs, Mapping):
        return {name: _first(part, size) for name, part in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        parts = [_first(part, size) for part in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs[:size] if hasattr(inputs, "shape") else inputs


def _labeled(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield inputs and labels of one pair of arrays, or of each batch.

    Raises:
        DataError: a batch has no labels, or there is none.
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
        raise DataError("`data` has no batch.", fix="Give (inputs, labels), or batches of such pairs.")


def _measured(
    path: Path,
    inputs: Any,
    data: Any,
    threads: int,
    rounds: int,
    counted: tuple[int | None, int | None],
    missing: list[str],
) -> Measurement:
    session = OnnxSession(path)
    require_inputs(session)
    size = session.batch or 1
    some = session.arrays(_first(inputs, size))
    if size != 1:
        missing.append(f"One sample: the file takes batches of {size} alone, so the latency and MACs are for {size}.")
    for name, output in zip(session.outputs, session.run(*some), strict=True):
        if np.issubdtype(output.dtype, np.floating) and output.size and not np.isfinite(output).any():
            raise NumericError(
                f"The output {name!r} of {path.name} holds no finite number for the example inputs.",
                fix="Repair the model, or give example inputs as they occur.",
            )
    run = race({"model": path}, some, reference="model", threads=threads, rounds=rounds)
    found = None
    if data is not None:
        session = OnnxSession(path, threads)
        batches = [(session.predict(part), host(labels)) for part, labels in _labeled(data)]
        found = accuracy(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    return Measurement(
        parameters=counted[0],
        macs=counted[1],
        bytes=path.stat().st_size,
        latency=run.latencies["model"],
        accuracy=found,
        aa=run.aa,
        runtime=run.runtime,
        threads=threads,
        not_measured=tuple(missing),
    )
