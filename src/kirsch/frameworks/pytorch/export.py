"""From a PyTorch model to one ONNX file."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import nn

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.copying import copy_of
from kirsch.frameworks.pytorch.predict import arguments
from kirsch.frameworks.pytorch.unsupported import check_exportable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SINGLE_FILE_BYTES = 1_500_000_000
"""Protobuf stops at 2 GB; above this the weights go to a second file."""


def export_onnx(model: nn.Module, example_inputs: Any, path: Path) -> dict[str, Any]:
    """Write an ONNX file whose first axis, the batch, is free.

    Args:
        model: exported in inference mode, from a copy.
        example_inputs: tensors whose first axis is the batch; keyword ones keep their names.
        path: of the file.

    Returns:
        opset, IR version, exporter, and name, shape and type of each input and output.

    Raises:
        ModelError: the model or its inputs cannot be exported; names the operation where the exporter does.
    """
    args, options = arguments(example_inputs)
    for name, value in [*((f"Input {number}", value) for number, value in enumerate(args)), *options.items()]:
        if not isinstance(value, torch.Tensor) or not value.dim():
            found = "a tensor without axes" if isinstance(value, torch.Tensor) else f"of type {type(value).__name__}"
            raise ModelError(f"{name} is {found}.", mend="Give tensors whose first axis is the batch.")
    if any(tensor.dtype is torch.bfloat16 for tensor in model.state_dict().values()):
        raise ModelError(
            f"A {type(model).__name__} in bfloat16 cannot be exported.",
            "ONNX Runtime lacks most operators in this type.",
            "Give model.float().",
        )
    check_exportable(model)
    subject = copy_of(model).eval()
    # An axis of size 1 would be taken for a constant.
    given = [*args, *options.values()]
    pair = tuple(torch.cat([value, value]) if value.shape[0] == 1 else value for value in given)
    batch = torch.export.Dim("batch")
    names = [*(f"input{number}" if number else "input" for number in range(len(args))), *options]
    shapes = tuple({0: batch} for _ in pair)
    parameters = inspect.signature(subject.forward).parameters.values()
    by_place = bool(options) or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    try:
        with _quiet():
            program = torch.onnx.export(
                _ByPlace(subject, tuple(options)) if by_place else subject,
                pair,
                dynamo=True,
                input_names=names,
                output_names=None,
                dynamic_shapes=(shapes,) if by_place else shapes,
                verbose=False,
            )
    except Exception as error:
        raise ModelError(
            f"A {type(model).__name__} cannot be exported to ONNX.",
            _root(error),
            "Export a part without the operation that is named, or replace it.",
        ) from error
    if program is None:
        raise ModelError(f"A {type(model).__name__} cannot be exported to ONNX.", "The exporter gave nothing.")
    size = sum(p.numel() * p.element_size() for p in subject.parameters())
    with _quiet():
        program.save(str(path), external_data=size > SINGLE_FILE_BYTES)
    return _details(path)


class _ByPlace(nn.Module):
    """A model whose last inputs are given by place instead of by name."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What the model puts out."""
        first = len(inputs) - len(self.names)
        return self.model(*inputs[:first], **dict(zip(self.names, inputs[first:], strict=True)))


def _root(error: BaseException) -> str:
    """What went wrong first, in one sentence; the exporter wraps it in advice to its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "it says no more")
    return f"{type(error).__name__}: {first}."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own console output and its warnings about its internals."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # an error is raised too, and said in our words
    silent = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(silent),
            contextlib.redirect_stderr(silent),
            torch.random.fork_rng(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _details(path: Path) -> dict[str, Any]:
    written = onnx.load(str(path), load_external_data=False)
    return {
        "opset": max(entry.version for entry in written.opset_import if entry.domain in ("", "ai.onnx")),
        "ir_version": written.ir_version,
        "exporter": f"torch {torch.__version__}",
        "inputs": [_value(value) for value in written.graph.input],
        "outputs": [_value(value) for value in written.graph.output],
    }


def _value(value: Any) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "shape": shape, "type": onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}
