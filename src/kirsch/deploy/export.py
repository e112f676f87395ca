"""Export a model to a file, and compare the file with the model."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kirsch import figures, files
from kirsch.arguments import checked
from kirsch.data.annotations import Inputs, Model
from kirsch.deploy.onnx_inputs import NUMPY_TYPES
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.deploy.trials import Trial, compare, fixed_trials, notes_on_infinity, trials
from kirsch.errors import LoadError, ModelError, NumericError, OutputError, ShapeError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.registry import Registry
from kirsch.tables import Cell, Part, Piece, Printable, Table, notes
from kirsch.user_warnings import warn

if TYPE_CHECKING:
    from kirsch.frameworks.protocols import Exportable


@dataclass(frozen=True)
class Artifact(Printable):
    """An exported file, its hash, and the result of the comparison with the model.

    Args:
        path: path of the file.
        format: name of the exporter, such as "onnx".
        bytes: size of the file in bytes.
        sha256: SHA-256 of the file, hexadecimal.
        details: JSON of the exporter; for ONNX, the opset, inputs, outputs, runtime, notes, and differences from the
            model.
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
        details, onnx = self.details, self.format == "onnx"  # other exporters have other details
        opset = f"   opset {details['opset']}" if onnx else ""
        rows: list[list[Cell]] = [["file", f"{self.path}   {figures.bytes_(self.bytes)}{opset}"]]
        if onnx:
            text = f"on {details['runtime']}: outputs differ by {details['drift']:.0e} of their largest value"
            rows.append(["inputs", ", ".join(f"{value['name']} {value['shape']}" for value in details["inputs"])])
            rows.append([Piece("verified", "good"), text])
        rows.append(["sha256", self.sha256])
        return [Table(rows), notes(details["notes"] if onnx else ())]

    @classmethod
    def of_dict(cls, path: Path, content: dict[str, Any]) -> Artifact:
        """Return the artifact of a file from the result of `to_dict`."""
        names = ("file", "format", "bytes", "sha256")
        details = {name: value for name, value in content.items() if name not in names}
        return cls(path, content["format"], content["bytes"], content["sha256"], details)

    def to_dict(self) -> dict[str, Any]:
        """Return the artifact as JSON, with the name of the file and without its folder."""
        return {
            "file": self.path.name,
            "format": self.format,
            "bytes": self.bytes,
            "sha256": self.sha256,
            **self.details,
        }


class Exporter(Protocol):
    """Signature of a registered exporter."""

    def __call__(self, model: Any, example_inputs: Any, path: Path) -> dict[str, Any]:
        """Write the file, compare it with the model, and return details as JSON."""


EXPORTERS: Registry[Exporter] = Registry("exporter")


@checked
def export(model: Model, path: str | Path, *, example_inputs: Inputs, format: str = "onnx") -> Artifact:  # noqa: A002 - the field's word
    """Write the model to a file, run the file on its runtime, and compare it with the model.

    Args:
        model: the model; it is copied and exported in inference mode.
        path: path of the file. If the export fails, no file is written and an existing file is kept.
        example_inputs: one array, a tuple of positional or a dict of keyword arguments. They may be nested and may
            contain None, numbers, booleans and strings, which become constants of the file. Give realistic values,
            because file and model are compared on them. The size of the first axis, the batch, stays free; the other
            axes are fixed at their sizes here. If the model or its export supports a single batch size only, the batch
            size is fixed at that of the example inputs, with a warning and a note in `details["notes"]`.
        format: "onnx", or the name of another registered exporter.

    Returns:
        The `Artifact`; `details["trials"]` contains the difference between file and model for each kind of inputs.

    Raises:
        ModelError: the model cannot be copied, run with the example inputs, or exported.
        NumericError: the outputs of the file differ from those of the model, or the outputs of the model contain NaN,
            contain no finite number, or differ between runs.
        UnknownNameError: the format is unknown.
        UsageError: the path of an ONNX file does not end in .onnx.
        OutputError: the file cannot be written.
    """
    exporter = EXPORTERS[format]
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"`path` {target} is a folder.", fix="Give the path of a file in this folder.")
    if format == "onnx" and target.suffix.lower() != ".onnx":
        raise UsageError(
            f"`path` of kirsch.export is {str(path)!r}, which does not end in .onnx.",
            "Other programs recognize an ONNX file by this extension.",
            f"Give {str(target) + '.onnx'!r}." if target.name else "Give the name of a file.",
        )
    files.check_writable(target.parent)
    with tempfile.TemporaryDirectory(prefix=files.TEMPORARY, dir=target.parent) as folder:
        written = Path(folder) / target.name
        details = exporter(model, example_inputs, written)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # external weights before the model
            files.write_bytes(target.parent / file.name, file.read_bytes())
    return Artifact(target, format, target.stat().st_size, files.sha256(target), details)


@EXPORTERS.register("onnx")
def onnx(model: Any, example_inputs: Any, path: Path) -> dict[str, Any]:
    """Write an ONNX file, and compare it with the model on ONNX Runtime; see `trials`.

    If the batch size cannot be free, it is fixed at that of the example inputs, with a warning and a note in
    `details["notes"]`.
    """
    exportable = framework_of(model).inference.exportable(model, example_inputs)
    compared, why_fixed = trials(exportable)
    if not why_fixed:
        try:
            return _write_and_compare(exportable, path, compared, free_batch=True)
        except (ModelError, NumericError, ShapeError) as error:
            why_fixed = f"{error.what} {error.why}"
        compared = fixed_trials(exportable, compared[0])
    details = _write_and_compare(exportable, path, compared, free_batch=False)
    size = ", ".join(map(str, sorted({len(array) for array in exportable.inputs.values()})))
    note = (
        f"The batch size of {path.name} is fixed at {size}, as in the example inputs. {why_fixed} "
        "Run the file with batches of this size, or let the forward read the batch size from its input: x.shape[0]."
    )
    warn(note)
    return {**details, "notes": [*details["notes"], note]}


def _write_and_compare(model: Exportable, path: Path, compared: list[Trial], *, free_batch: bool) -> dict[str, Any]:
    """Write the file and compare it with the model; return details as JSON."""
    details = model.write_onnx(path, free_batch=free_batch)
    try:
        session = OnnxSession(path)
    except LoadError as error:
        raise ModelError(
            f"ONNX Runtime cannot run the exported file of a {model.name}.",
            error.why.replace(str(path), path.name),
            "Give model.float() and inputs in float32: ONNX Runtime lacks operators in float64."
            if model.double
            else "Replace the named operation, or leave conversions to other types out of the forward.",
        ) from error
    if free_batch and not all(shape and isinstance(shape[0], str) for shape in session.shapes):
        raise ModelError(
            "The exporter fixes the batch size.",
            "The code of the model, or a tensor in it, requires a single batch size.",
        )
    records = compare(model, session, compared)
    drift = max((record["drift"] for record in records if record["drift"] is not None), default=0.0)
    return {
        **details,
        "drift": drift,
        "trials": records,
        "notes": notes_on_infinity(compared[0]),
        "runtime": f"onnxruntime {session.version}",
    }


def usage(artifact: Artifact) -> str:
    """Return a short Python program that runs the file on zeros instead of real inputs."""
    names, lines = [], []
    for number, value in enumerate(artifact.details["inputs"]):
        names.append(f"x{number}" if number else "x")
        shape = ", ".join("1" if isinstance(size, str) else str(size) for size in value["shape"])
        dtype = NUMPY_TYPES.get(value["type"], value["type"])
        lines.append(
            f'{names[-1]} = np.zeros(({shape}), "{dtype}")  # replace with inputs, preprocessed as in training\n'
        )
    feed = ", ".join(
        f"{_quoted(value['name'])}: {name}" for value, name in zip(artifact.details["inputs"], names, strict=True)
    )
    return (
        "import numpy as np\n"
        "import onnxruntime\n\n"
        f"session = onnxruntime.InferenceSession({_quoted(artifact.path.name)})\n"
        f"{''.join(lines)}"
        f"logits = session.run(None, {{{feed}}})[0]\n"
        "print(logits.argmax(-1))\n"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a Python literal, too
