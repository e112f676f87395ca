"""From a model to the file that ships, checked against the model."""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kirsch import figures, files
from kirsch.arguments import checked
from kirsch.data.annotations import Inputs, Model
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.deploy.trials import Trial, compare, fixed_trials, infinite, trials
from kirsch.errors import LoadError, ModelError, NumericError, OutputError, ShapeError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.registry import Registry
from kirsch.tables import Cell, Part, Piece, Printable, Table, notes

if TYPE_CHECKING:
    from kirsch.frameworks.protocols import Exportable

NUMPY_NAMES = {"float": "float32", "double": "float64"}
"""Types of numbers that ONNX and numpy call differently."""


@dataclass(frozen=True)
class Artifact(Printable):
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

    def __repr__(self) -> str:
        """Return one line."""
        return f"<kirsch.Artifact: {self.path}, {self.format}, {figures.bytes_(self.bytes)}, sha256 {self.sha256[:12]}>"

    def parts(self) -> list[Part]:
        """Return file, inputs, verification and hash as a table, and the notes."""
        details, onnx = self.details, self.format == "onnx"  # other exporters have details of their own
        opset = f"   opset {details['opset']}" if onnx else ""
        rows: list[list[Cell]] = [["file", f"{self.path}   {figures.bytes_(self.bytes)}{opset}"]]
        if onnx:
            text = f"on {details['runtime']}: outputs differ by {details['drift']:.0e} of the largest"
            rows.append(["inputs", ", ".join(f"{value['name']} {value['shape']}" for value in details["inputs"])])
            rows.append([Piece("verified", "good"), text])
        rows.append(["sha256", self.sha256])
        return [Table(rows), notes(details["notes"] if onnx else ())]

    @classmethod
    def of_dict(cls, path: Path, content: dict[str, Any]) -> Artifact:
        """Return the artifact of a file and its description by `to_dict`."""
        names = ("file", "format", "bytes", "sha256")
        details = {name: value for name, value in content.items() if name not in names}
        return cls(path, content["format"], content["bytes"], content["sha256"], details)

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
    """Write the model to a file, run the file on its runtime, and compare it with the model.

    Args:
        model: exported in inference mode; left as it is.
        path: of the file; it appears whole or not at all.
        example_inputs: one array, a tuple of positional or a dict of keyword arguments, which may be nested and hold
            None, numbers, truth values and texts beside arrays, which become constants of the file. Give inputs as they
            occur, since the comparison follows from them. The first axis is the batch. It stays free; every
            other axis keeps the size that it has here. Where the model or its export allow one size only, the batch is
            fixed at that of the example inputs, with a warning and a note in `details["notes"]`.
        format: "onnx".

    Returns:
        The `Artifact`; `details["trials"]` says how far file and model differ for which inputs.

    Raises:
        ModelError: the model cannot be copied, run with these inputs, or exported.
        NumericError: the file computes something else than the model, or the model gives NaN, no finite number, or
            other outputs at each run.
        UnknownNameError: there is no such format.
        OutputError: the file cannot be written.
    """
    exporter = EXPORTERS[format]
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target} is a folder.", "A file is to be written.", "Give the name of a file in it.")
    if format == "onnx" and target.suffix.lower() != ".onnx":
        raise UsageError(
            f"`path` of kirsch.export is {str(path)!r}, which does not end in .onnx.",
            "Programs tell the format of such a file by its name.",
            f"Give {str(target) + '.onnx'!r}." if target.name else "Give the name of a file.",
        )
    files.check_writable(target.parent)
    with tempfile.TemporaryDirectory(prefix=files.TEMPORARY, dir=target.parent) as folder:
        written = Path(folder) / target.name
        details = exporter(model, example_inputs, written)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # weights in a second file come first
            files.write_bytes(target.parent / file.name, file.read_bytes())
    return Artifact(target, format, target.stat().st_size, files.sha256(target), details)


@EXPORTERS.register("onnx")
def onnx(model: Any, example_inputs: Any, path: Path) -> dict[str, Any]:
    """One ONNX file, compared with the model on ONNX Runtime; see `trials`.

    The batch is free where the model and its export allow it. Otherwise it is that of the example inputs, and a warning
    and `details["notes"]` say so.
    """
    subject = framework_of(model).inference.exportable(model, example_inputs)
    made, fixed = trials(subject)
    if not fixed:
        try:
            return _compared(subject, path, made, free_batch=True)
        except (ModelError, NumericError, ShapeError) as error:
            fixed = f"{error.what} {error.why}"
        made = fixed_trials(subject, made[0])
    details = _compared(subject, path, made, free_batch=False)
    size = ", ".join(map(str, sorted({len(array) for array in subject.inputs.values()})))
    note = (
        f"The batch of {path.name} is fixed at {size}, that of the example inputs. {fixed} "
        "Run the file with batches of this size, or let the forward read the batch from its input: x.shape[0]."
    )
    warnings.warn(note, stacklevel=4)  # past the check of the arguments
    return {**details, "notes": [*details["notes"], note]}


def _compared(model: Exportable, path: Path, made: list[Trial], *, free_batch: bool) -> dict[str, Any]:
    """Write the file and compare it with the model; gives details as JSON."""
    details = model.write_onnx(path, free_batch=free_batch)
    try:
        session = OnnxSession(path)
    except LoadError as error:
        raise ModelError(
            f"ONNX Runtime cannot run the file that a {model.name} is exported to.",
            error.why.replace(str(path), path.name),
            "Give model.float() and inputs in float32: it lacks operators in float64."
            if model.double
            else "Replace the operation that is named, or leave conversions to other types out of the forward.",
        ) from error
    if free_batch and not all(shape and isinstance(shape[0], str) for shape in session.shapes):
        raise ModelError("The exporter fixes the batch.", "The model's code, or a tensor in it, is for one size.")
    records = compare(model, session, made)
    drift = max((record["drift"] for record in records if record["drift"] is not None), default=0.0)
    return {
        **details,
        "drift": drift,
        "trials": records,
        "notes": infinite(made[0]),
        "runtime": f"onnxruntime {session.version}",
    }


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
