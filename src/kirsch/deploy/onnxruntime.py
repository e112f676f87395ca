"""Running an ONNX file on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.data.arrays import host
from kirsch.data.images import AXES, NCHW, SCALE, has_channels_last, order_fix
from kirsch.errors import DataError, LoadError, MissingExtraError, ShapeError, UsageError
from kirsch.frameworks.formats import describe
from kirsch.frameworks.predictions import logits_output

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
            raise ShapeError(what, f"It expects {expected}. {_first_line(error)}", self._fix_of(inputs)) from error
        return out

    def _fix_of(self, inputs: Sequence[NDArray[Any]]) -> str:
        """Return how to change inputs that the file does not take."""
        for value, shape, dtype in zip(inputs, self.shapes, self.types, strict=True):
            scaled = value.dtype == np.uint8 and dtype.startswith("float")
            moved = tuple(value.shape[axis] for axis in AXES) if has_channels_last(value.shape) else ()
            if moved and len(shape) == NCHW and moved[1] == shape[1] != value.shape[1]:
                return order_fix(uint8=scaled)
            if scaled:
                return SCALE
        return INPUTS_FIX

    def arrays(self, inputs: Any) -> tuple[NDArray[Any], ...]:
        """Return inputs in the order of the file.

        Args:
            inputs: an array, a tuple of arrays in the order of the file, or a dict of arrays by the names of the file.
                Nested inputs are taken in their order; what is not an array is left out.

        Raises:
            UsageError: a name is not an input of the file, or an input is missing.
        """
        if not isinstance(inputs, Mapping) or not all(hasattr(value, "shape") for value in inputs.values()):
            return tuple(_arrays(inputs))
        if set(inputs) != set(self.inputs):
            raise UsageError(
                f"The inputs are named {', '.join(map(str, inputs))}; the file has {', '.join(self.inputs)}.",
                fix="Give an array for each of these names.",
            )
        return tuple(host(inputs[name]) for name in self.inputs)

    def predict(self, inputs: Any, batch_size: int = 256) -> NDArray[Any]:
        """Return the logits for N samples, shape (N, K); see `logits_output` for which output these are.

        A file whose batch is fixed gets batches of its size; the last is filled up, and what was filled is dropped.

        Args:
            inputs: see `arrays`.
            batch_size: samples at a time, where the batch is free.

        Raises:
            DataError: there are no inputs.
            UsageError: the inputs do not have the names of the file, or its outputs do not tell which are the logits.
        """
        arrays = self.arrays(inputs)
        samples = len(arrays[0]) if arrays else 0
        lengths = [len(array) for array in arrays]
        if len(set(lengths)) > 1:
            raise DataError(
                f"The inputs have {', '.join(map(str, lengths))} samples.",
                fix="Give the same number of samples in each input, on the first axis.",
            )
        if not samples:
            raise DataError("There are no inputs to predict.", fix="Give at least one.")
        output = self.outputs.index(logits_output(self.outputs))
        size = self.batch or batch_size
        parts = []
        for start in range(0, samples, size):
            rows = [array[start : start + size] for array in arrays]
            filled = [np.resize(part, (self.batch, *part.shape[1:])) for part in rows] if self.batch else rows
            parts.append(self.run(*filled)[output][: len(rows[0])])
        return np.concatenate(parts)

    def call(self, *inputs: NDArray[Any]) -> Callable[[], Any]:
        """A callable without arguments that runs these inputs, for timing; they are run once to see that they fit."""
        self.run(*inputs)
        feed = dict(zip(self.inputs, inputs, strict=True))
        session = self._session
        return lambda: session.run(None, feed)


def _arrays(inputs: Any) -> list[NDArray[Any]]:
    """The arrays in inputs that may be nested, in the order in which a file takes them."""
    if isinstance(inputs, (Mapping, tuple, list)):
        parts = inputs.values() if isinstance(inputs, Mapping) else inputs
        return [array for part in parts for array in _arrays(part)]
    return [host(inputs)] if hasattr(inputs, "shape") else []


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
