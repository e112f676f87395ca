"""Running an ONNX file on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import DataError, LoadError, MissingExtraError, ShapeError
from kirsch.frameworks.formats import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


FILE_FIX = "Give an ONNX file, such as kirsch.export writes, or the model itself to kirsch.measure."
INPUTS_FIX = "Give example inputs of that number, shape and type."


class OnnxSession:
    """An ONNX file, loaded and ready.

    Args:
        path: of the file.
        threads: within an operation, >= 1; operations run one after the other.

    Raises:
        LoadError: the file is missing, is no ONNX model, or names data outside its folder.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        try:
            import onnxruntime  # noqa: PLC0415 - a runtime is loaded when it is used
        except ModuleNotFoundError as error:
            raise MissingExtraError("onnxruntime", "torch", "to run ONNX files") from error
        file = Path(path)
        found = describe(file)
        if found is None:
            raise LoadError(f"The file {file} does not exist.", fix="Export the model first.")
        if found.what != "an ONNX file":
            of_the_command = any(word in found.as_model for word in ("MODEL", "callable"))
            fix = FILE_FIX if of_the_command else found.as_model
            raise LoadError(f"{file} is not an ONNX file: it is {found.what}.", found.why, fix)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # an error is raised too, and its warnings speak of its own optimizer
        try:
            # ONNX Runtime refuses external data outside the folder of the file by itself.
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common base of their own
            why = _first_line(error)
            raise LoadError(f"{file} cannot be loaded by ONNX Runtime.", why, _fix_of_file(why)) from error
        self.path = file
        self.threads = threads
        self.version: str = onnxruntime.__version__
        self.inputs: list[str] = [value.name for value in self._session.get_inputs()]
        self.outputs: list[str] = [value.name for value in self._session.get_outputs()]
        self.shapes: list[tuple[int | str, ...]] = [tuple(value.shape) for value in self._session.get_inputs()]
        self.types: list[str] = [_type(value.type) for value in self._session.get_inputs()]

    @property
    def batch(self) -> int | None:
        """The size of the batch where the file fixes it, None where it is free."""
        first = self.shapes[0][0] if self.shapes and self.shapes[0] else None
        return first if isinstance(first, int) else None

    def run(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """All outputs for one batch.

        Raises:
            ShapeError: the inputs do not fit; says what is expected.
        """
        expected = ", ".join(f"{v.name} {v.shape} {v.type}" for v in self._session.get_inputs())
        what = f"The file cannot take inputs {', '.join(f'{value.shape} {value.dtype}' for value in inputs)}."
        if len(inputs) != len(self.inputs):
            raise ShapeError(what, f"It expects {expected}.", INPUTS_FIX)
        try:
            out: list[NDArray[Any]] = self._session.run(None, dict(zip(self.inputs, inputs, strict=True)))
        except Exception as error:  # its errors have no common base of their own
            raise ShapeError(what, f"It expects {expected}. {_first_line(error)}", INPUTS_FIX) from error
        return out

    def predict(self, inputs: NDArray[Any], batch_size: int = 256) -> NDArray[Any]:
        """The first output for inputs of shape (N, ...): shape (N, K).

        A file whose batch is fixed gets batches of its size; the last is filled up, and what was filled is dropped.

        Raises:
            DataError: there are no inputs.
        """
        if not len(inputs):
            raise DataError("There are no inputs to predict.", fix="Give at least one.")
        size = self.batch or batch_size
        parts = []
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            whole = np.resize(part, (self.batch, *part.shape[1:])) if self.batch else part
            parts.append(self.run(whole)[0][: len(part)])
        return np.concatenate(parts)

    def call(self, *inputs: NDArray[Any]) -> Callable[[], Any]:
        """A callable without arguments that runs these inputs, for timing; they are run once to see that they fit."""
        self.run(*inputs)
        feed = dict(zip(self.inputs, inputs, strict=True))
        session = self._session
        return lambda: session.run(None, feed)


def _type(text: str) -> str:
    """The type of the numbers in a type of ONNX Runtime: that of "tensor(float)" is "float"; any other as it is."""
    return text.removeprefix("tensor(").removesuffix(")") if text.startswith("tensor(") else text


def _fix_of_file(why: str) -> str:
    """What to do about a file that ONNX Runtime does not load, by what it says."""
    if "INVALID_PROTOBUF" in why or "No graph was found" in why:
        return "The file is damaged, or not an ONNX file: write or copy it again."
    if "opset import" in why or "is not a registered function/op" in why:
        return "Leave custom operators out of the model: the file must run with the operators of ONNX Runtime alone."
    return "Give a model that kirsch.export wrote."


def _first_line(error: Exception) -> str:
    return f"{str(error).splitlines()[0].rstrip('.')}."
