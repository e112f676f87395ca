"""Run ONNX files on ONNX Runtime."""

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


FILE_FIX = "Give a file written by kirsch.export. To measure the model without a file, call kirsch.measure(model, ...)."
INPUTS_FIX = "Give example inputs of that number, shape and type."


class OnnxSession:
    """An ONNX file that is loaded on ONNX Runtime.

    Args:
        path: path of the file.
        threads: number of threads of one operation, >= 1; operations run one after the other.

    Raises:
        LoadError: the file is missing, is not an ONNX model, or refers to data outside its folder.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        try:
            import onnxruntime  # noqa: PLC0415 - a runtime is loaded when it is used
        except ModuleNotFoundError as error:
            raise MissingExtraError("onnxruntime", "torch", "to run ONNX files") from error
        file = Path(path)
        description = describe(file)
        if description is None:
            raise LoadError(f"The file {file} does not exist.", fix="Export the model first.")
        if description.what != "an ONNX file":
            is_fix_of_command = any(word in description.as_model for word in ("MODEL", "callable"))
            fix = FILE_FIX if is_fix_of_command else description.as_model
            raise LoadError(f"{file} is not an ONNX file: it is {description.what}.", description.why, fix)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # no log: errors are also raised, and warnings concern the optimizer only
        try:
            # ONNX Runtime itself refuses external data outside the folder of the file.
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the errors of ONNX Runtime have no common base class
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
        """The batch size of the file, or None if it is free."""
        first = self.shapes[0][0] if self.shapes and self.shapes[0] else None
        return first if isinstance(first, int) else None

    def run(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """Return all outputs for one batch.

        Args:
            inputs: arrays in the order of the file's inputs.

        Raises:
            ShapeError: the number, shape or type of the inputs differs from the file's.
        """
        expected = ", ".join(f"{v.name} {v.shape} {v.type}" for v in self._session.get_inputs())
        what = f"The file does not accept inputs {', '.join(f'{value.shape} {value.dtype}' for value in inputs)}."
        if len(inputs) != len(self.inputs):
            raise ShapeError(what, f"It expects {expected}.", INPUTS_FIX)
        try:
            out: list[NDArray[Any]] = self._session.run(None, dict(zip(self.inputs, inputs, strict=True)))
        except Exception as error:  # the errors of ONNX Runtime have no common base class
            raise ShapeError(what, f"It expects {expected}. {_first_line(error)}", self._fix_of(inputs)) from error
        return out

    def _fix_of(self, inputs: Sequence[NDArray[Any]]) -> str:
        """Return the fix, as a sentence, for inputs that the file does not accept."""
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
                The name of a single input may differ from that in the file. Nested inputs are flattened in their order;
                values that are not arrays are left out.

        Raises:
            UsageError: a name is not an input of the file, or an input is missing.
        """
        by_name = isinstance(inputs, Mapping) and all(hasattr(value, "shape") for value in inputs.values())
        if not by_name or len(inputs) == len(self.inputs) == 1:
            return tuple(_arrays(inputs))
        if set(inputs) != set(self.inputs):
            names = ", ".join(self.inputs)
            raise UsageError(
                f"The file has the inputs {names}; the given names are {', '.join(map(str, inputs))}.",
                fix=f"Give a dict with one array for each of {names}.",
            )
        return tuple(host(inputs[name]) for name in self.inputs)

    def predict(self, inputs: Any, batch_size: int = 256) -> NDArray[Any]:
        """Return the logits for N samples, shape (N, K); `logits_output` selects the output.

        If the batch size of the file is fixed, the last batch is filled with repeated samples, which are not returned.

        Args:
            inputs: see `arrays`.
            batch_size: number of samples per batch if the batch size of the file is free.

        Raises:
            DataError: there are no inputs.
            UsageError: the names of the inputs differ from the file's, or the output with the logits cannot be
                identified by name.
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
        """Return a function without arguments that runs the file on these inputs, for timing.

        The file is run once, so that unsuitable inputs raise an error here.
        """
        self.run(*inputs)
        feed = dict(zip(self.inputs, inputs, strict=True))
        session = self._session
        return lambda: session.run(None, feed)


def _arrays(inputs: Any) -> list[NDArray[Any]]:
    """Return the arrays in nested inputs, in their order."""
    if isinstance(inputs, (Mapping, tuple, list)):
        parts = inputs.values() if isinstance(inputs, Mapping) else inputs
        return [array for part in parts for array in _arrays(part)]
    return [host(inputs)] if hasattr(inputs, "shape") else []


def _type(text: str) -> str:
    """Return "float" for "tensor(float)"; types other than tensors are returned unchanged."""
    return text.removeprefix("tensor(").removesuffix(")") if text.startswith("tensor(") else text


def _fix_of_file(why: str) -> str:
    """Return the fix for a file that ONNX Runtime cannot load, by the error message of ONNX Runtime."""
    if "INVALID_PROTOBUF" in why or "No graph was found" in why:
        return "The file is damaged or is not an ONNX file: write or copy it again."
    if "opset import" in why or "is not a registered function/op" in why:
        return "Leave custom operators out of the model: the file may contain only operators of ONNX Runtime."
    return "Give a file written by kirsch.export."


def _first_line(error: Exception) -> str:
    return f"{str(error).splitlines()[0].rstrip('.')}."
