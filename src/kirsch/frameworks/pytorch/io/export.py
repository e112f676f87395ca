"""Export a PyTorch model to an ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from kirsch.data.arrays import host
from kirsch.errors import ModelError, NumericError, error_text
from kirsch.frameworks.pytorch.analysis.provenance import called_name
from kirsch.frameworks.pytorch.analysis.randomness import (
    RANDOMNESS_FIX,
    difference_of_runs,
    line_that_draws,
    reason_for,
)
from kirsch.frameworks.pytorch.inference import predict
from kirsch.frameworks.pytorch.inference.calling import embedding_fix, fix_of_inputs, is_embedding_error
from kirsch.frameworks.pytorch.io import onnx_file
from kirsch.frameworks.pytorch.io.flat import Flat, output_names
from kirsch.frameworks.pytorch.io.rounding import Rounding
from kirsch.frameworks.pytorch.masking.hold import fold
from kirsch.frameworks.pytorch.modules.unsupported import check_exportable, reason_of
from kirsch.frameworks.pytorch.training.finite import not_finite_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

SINGLE_FILE_BYTES = 1_500_000_000
"""Protobuf messages are limited to 2 GB; the weights of larger models go to a second file."""


class TorchExportable:
    """A copy of a PyTorch model in inference mode as a function of arrays.

    Implements `kirsch.frameworks.protocols.Exportable`. The KV cache of a transformers model, which only generation
    needs, is switched off.

    Args:
        model: the model to export; it is not changed.
        example_inputs: tensors whose first axis is the batch; see `Flat`.

    Attributes:
        name: name of the model's class.
        inputs: name → example array.
        double: whether weights or inputs are float64.

    Raises:
        ModelError: the model cannot be copied, or the inputs or the model have an unsupported type.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.name = type(model).__name__
        check_exportable(model)
        copied = fold(model).eval()  # masks become zeros of the weights
        for parameter in copied.parameters():
            parameter.requires_grad = False  # with gradients, PyTorch exports attention as other operators
        _without_cache(copied)
        self._flat = Flat(copied, example_inputs).eval()
        tensors = [*copied.state_dict().values(), *self._flat.inputs.values()]
        if any(tensor.dtype is torch.bfloat16 for tensor in tensors):
            raise ModelError(
                f"A {self.name} in bfloat16 cannot be exported.",
                "ONNX Runtime lacks most operators in this type.",
                "Use model.float(), and inputs in float32.",
            )
        self.inputs: dict[str, NDArray[Any]] = {name: host(value) for name, value in self._flat.inputs.items()}
        self.double = any(tensor.dtype is torch.float64 for tensor in tensors)

    def outputs(self, inputs: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return all outputs for one batch, by their path in the value that the model returns.

        Raises:
            ModelError: an output is bfloat16, which numpy lacks; or an embedding gets floating-point indices.
        """
        try:
            outputs = self._run(inputs)
        except RuntimeError as error:
            args, options = self._flat.arguments(*self._tensors(inputs))
            fix = (
                embedding_fix(args, options)
                if is_embedding_error(error)
                else fix_of_inputs(self._flat.model, args, options, error)
            )
            if not fix:
                raise
            raise ModelError(f"A {self.name} does not run with its inputs.", error_text(error), fix) from error
        bfloat16 = next((name for name, value in outputs.items() if value.dtype is torch.bfloat16), None)
        if bfloat16 is not None:
            raise onnx_file.computing_in_bfloat16(self.name, "", f"Its output {bfloat16!r} is bfloat16. ")
        return {name: host(value) for name, value in outputs.items()}

    def rounded(self, inputs: Sequence[NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
        """Return the outputs with random rounding errors in every operation; see `Rounding`."""
        with Rounding(seed):
            return self.outputs(inputs)

    def nondeterminism(self, inputs: Sequence[NDArray[Any]]) -> tuple[str, str]:
        """Return why two runs on these inputs differ, and a fix; two empty strings if the runs are equal."""
        return difference_of_runs(self._flat.model, lambda: list(self._run(inputs).values()))

    def not_finite(self) -> str:
        """Return a description of the first parameter or buffer with NaN or infinity; "" if all are finite."""
        return next(not_finite_names(self._flat.model), "")

    def _run(self, inputs: Sequence[NDArray[Any]]) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(), torch.no_grad(), _without_autocast(self._flat):
            return self._flat.by_path(*self._tensors(inputs))

    def _functions(self) -> set[str]:
        """Return the names of the functions of PyTorch that the model calls until it ends or raises an exception."""
        seen = _Functions()
        with seen, _quiet(), contextlib.suppress(Exception):
            self._run(list(self.inputs.values()))
        return seen.names

    def _tensors(self, inputs: Iterable[NDArray[Any]]) -> tuple[torch.Tensor, ...]:
        """Return copies of arrays as tensors on the device of the model, because the model may change its inputs."""
        device = predict.device_of(self._flat)
        return tuple(torch.tensor(array, device=device) for array in inputs)

    def write_onnx(self, path: Path, *, free_batch: bool = True) -> dict[str, Any]:
        """Write one ONNX file.

        Args:
            path: path of the file.
            free_batch: allow any size of the first axis of every input. Otherwise, all sizes are fixed to those of the
                example inputs.

        Returns:
            opset, IR version, exporter, and name, shape and type of each input and output.

        Raises:
            ModelError: the model cannot be exported. The error names the operation if the exporter names it.
            NumericError: the model draws random numbers.
        """
        # The exporter treats an axis of size 1 as a constant.
        double_batch = free_batch and all(len(value) == 1 for value in self._flat.inputs.values())
        tensors = self._tensors(self.inputs.values())
        tensors = tuple(torch.cat([value, value]) for value in tensors) if double_batch else tensors
        batch = torch.export.Dim("batch")
        try:
            with _quiet(), _without_autocast(self._flat):
                paths = list(self._run(list(self.inputs.values())))
                program = torch.onnx.export(
                    self._flat,
                    tensors,
                    dynamo=True,
                    dynamic_shapes=(tuple({0: batch} for _ in tensors),) if free_batch else None,
                    verbose=False,
                )
        except Exception as error:
            first = _root_cause(error)
            fix = "Replace the operation that the message names, or export a part of the model without it."
            why, fix = reason_of(self._functions(), first) or (error_text(first), fix)
            raise ModelError(f"A {self.name} cannot be exported to ONNX.", why, fix) from error
        if program is None:
            raise ModelError(f"A {self.name} cannot be exported to ONNX.", "The exporter returned None.")
        line = line_that_draws(program.exported_program) if program.exported_program is not None else None
        if line is not None:  # the effect may be too rare to be seen in the runs of `nondeterminism`
            raise NumericError(
                f"An ONNX file cannot compute the same outputs as a {self.name}.", reason_for(line), RANDOMNESS_FIX
            )
        size = sum(p.numel() * p.element_size() for p in self._flat.parameters())
        with _quiet():
            program.save(str(path), external_data=size > SINGLE_FILE_BYTES)
        inputs = list(self.inputs)
        onnx_file.finish(path, inputs=inputs, outputs=output_names(paths, inputs), prefix="model.", model=self.name)
        return {**onnx_file.details(path), "exporter": f"torch {torch.__version__}"}


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Disable the caller's autocast, because its conversions would become part of the file.

    The code of the model may still enable autocast.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast(predict.device_of(model).type, enabled=False):
        yield


class _Functions(TorchFunctionMode):
    """Records the names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call."""
        self.names.add(called_name(func))
        return func(*args, **(kwargs or {}))


def _without_cache(model: nn.Module) -> None:
    """Switch off the KV cache in every configuration of a transformers model."""
    seen: set[int] = set()
    pending = [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
    while pending:
        config = pending.pop()
        if id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False
        pending += [part for part in vars(config).values() if hasattr(part, "use_cache")]


def _root_cause(error: BaseException) -> BaseException:
    """Return the exception at the start of the chain; the exporter wraps it in advice to its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the console output of the exporter and its warnings about internals."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # errors are also raised, and reported by the caller
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


def exportable(model: nn.Module, example_inputs: Any) -> TorchExportable:
    """Return a copy of a model in inference mode as a function of arrays, which can be written to a file."""
    return TorchExportable(model, example_inputs)
