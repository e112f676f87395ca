"""From a model to the file that ships, checked against the model."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from kirsch import files
from kirsch.arguments import checked
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import ModelError, NumericError, OutputError
from kirsch.frameworks.annotations import Inputs, Model
from kirsch.frameworks.port import framework_of, host
from kirsch.registry import Registry

if TYPE_CHECKING:
    from numpy.typing import NDArray

DRIFT = 1e-4
"""Largest difference between model and file, as a share of the largest output; 1e-6 is usual in float32."""

NUMPY_NAMES = {"float": "float32", "double": "float64"}
"""Types of numbers that ONNX and numpy call differently."""


@dataclass(frozen=True)
class Artifact:
    """A file to ship.

    Args:
        path: of the file.
        format: "onnx".
        bytes: its size.
        sha256: its hash.
        details: opset, inputs, outputs, and what the check found, as JSON.
    """

    made_by: ClassVar[str] = 'kirsch.export(model, "model.onnx", example_inputs=inputs)'

    path: Path
    format: str
    bytes: int
    sha256: str
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the folder."""
        return {
            "file": self.path.name,
            "format": self.format,
            "bytes": self.bytes,
            "sha256": self.sha256,
            **self.details,
        }


class Exporter(Protocol):
    """What a registered exporter looks like."""

    def __call__(self, model: Any, example_inputs: Any, path: Path) -> dict[str, Any]:
        """Write the file and check it; gives details as JSON."""


EXPORTERS: Registry[Exporter] = Registry("exporter")


@checked
def export(model: Model, path: str | Path, *, example_inputs: Inputs, format: str = "onnx") -> Artifact:  # noqa: A002 - the field's word
    """The model as a file, run once more on its runtime and held against the model.

    Args:
        model: exported in inference mode; left as it is.
        path: of the file; it appears whole or not at all.
        example_inputs: one array, a tuple of positional or a dict of keyword arguments; the first axis is the batch,
            which stays free.
        format: "onnx".

    Raises:
        ModelError: the model cannot be exported.
        NumericError: the file computes something else than the model.
        UnknownNameError: there is no such format.
        OutputError: the file cannot be written.
    """
    exporter = EXPORTERS[format]
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target} is a folder.", "A file is to be written.", "Give the name of a file in it.")
    files.check_writable(target.parent)
    with tempfile.TemporaryDirectory(prefix=files.TEMPORARY, dir=target.parent) as folder:
        written = Path(folder) / target.name
        details = exporter(model, example_inputs, written)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # weights in a second file come first
            files.write_bytes(target.parent / file.name, file.read_bytes())
    return Artifact(target, format, target.stat().st_size, files.sha256(target), details)


@EXPORTERS.register("onnx")
def onnx(model: Any, example_inputs: Any, path: Path) -> dict[str, Any]:
    """One ONNX file, checked on ONNX Runtime with batches of one and three, ordinary and extreme values."""
    framework = framework_of(model)
    details = framework.export_onnx(model, example_inputs, path)
    session = OnnxSession(path)
    worst = float(np.max([_drift(model, session, inputs) for inputs in _trials(example_inputs)]))  # NaN is the largest
    if not worst <= DRIFT:
        raise NumericError(
            "The exported file does not compute what the model computes.",
            f"The outputs differ by {worst:.1e} of the largest, {DRIFT:.0e} is allowed.",
            "Report the model: its export is wrong.",
        )
    return {**details, "drift": worst, "runtime": f"onnxruntime {session.version}"}


def _drift(model: Any, session: OnnxSession, inputs: dict[str, Any] | tuple[Any, ...]) -> float:
    """The largest difference over all outputs for one batch, each as a share of its largest value."""
    values = tuple(inputs.values()) if isinstance(inputs, dict) else inputs
    try:
        expected = framework_of(model).outputs(model, inputs)
    except Exception as error:  # a foreign model is run, which may raise anything
        raise ModelError(
            f"A {type(model).__name__} does not run with inputs of shape {', '.join(str(v.shape) for v in values)}.",
            f"{type(error).__name__}: {next(iter(str(error).splitlines()), '').rstrip('.')}.",
            "The first axis of every input is the batch, which must be free.",
        ) from error
    found = session.run(*values)
    if len(expected) != len(found):
        raise NumericError(f"The exported file has {len(found)} outputs, the model has {len(expected)}.")
    return float(np.max([_distance(a, b) for a, b in zip(expected, found, strict=True)]))


def _distance(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """The largest difference as a share of the largest value; what is not finite must be the same in both."""
    if expected.shape != found.shape:
        return float("inf")
    a, b = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    difference, size = np.abs(a[finite] - b[finite]), np.abs(a[finite])
    return float(difference.max() / max(size.max(), 1e-12)) if finite.any() else 0.0


def _trials(example_inputs: Any) -> list[Any]:
    """Batches of one and three of the example's shape: normal, zero, and large values for floating inputs."""
    names = list(example_inputs) if isinstance(example_inputs, dict) else None
    given = example_inputs.values() if isinstance(example_inputs, dict) else example_inputs
    arrays = [host(value) for value in (given if names or isinstance(given, (tuple, list)) else (given,))]
    random = np.random.default_rng(0)

    def batch(array: Any, size: int, scale: float) -> Any:
        shape = (size, *array.shape[1:])
        if not np.issubdtype(array.dtype, np.floating):
            return np.resize(array, shape).astype(array.dtype)
        return (scale * random.standard_normal(shape)).astype(array.dtype)

    sizes = ((1, 1.0), (3, 1.0), (3, 0.0), (3, 100.0))
    trials = [tuple(batch(array, size, scale) for array in arrays) for size, scale in sizes]
    return trials if names is None else [dict(zip(names, trial, strict=True)) for trial in trials]


def usage(artifact: Artifact) -> str:
    """A short program that runs the file, on zeros in the place of real inputs."""
    names, lines = [], []
    for number, taken in enumerate(artifact.details["inputs"]):
        names.append(f"x{number}" if number else "x")
        shape = ", ".join("1" if isinstance(size, str) else str(size) for size in taken["shape"])
        kind = NUMPY_NAMES.get(taken["type"], taken["type"])
        lines.append(f'{names[-1]} = np.zeros(({shape}), "{kind}")  # prepared as for training\n')
    fed = ", ".join(
        f"{_quoted(taken['name'])}: {name}" for taken, name in zip(artifact.details["inputs"], names, strict=True)
    )
    return (
        "import numpy as np\n"
        "import onnxruntime\n\n"
        f"session = onnxruntime.InferenceSession({_quoted(artifact.path.name)})\n"
        f"{''.join(lines)}"
        f"scores = session.run(None, {{{fed}}})[0]\n"
        "print(scores.argmax(-1))\n"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Python reads it as JSON does
