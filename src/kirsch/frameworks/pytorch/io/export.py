"""From a PyTorch model to one ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from kirsch.errors import ModelError, NumericError, error_text
from kirsch.frameworks.port import host
from kirsch.frameworks.pytorch.analysis.provenance import called_name
from kirsch.frameworks.pytorch.analysis.randomness import RANDOMNESS_FIX, line_that_draws, reason_for, unsteady
from kirsch.frameworks.pytorch.inference import predict
from kirsch.frameworks.pytorch.inference.calling import fix_of_inputs, fix_of_looked_up, looks_up
from kirsch.frameworks.pytorch.io import onnx_file
from kirsch.frameworks.pytorch.io.flat import Flat, output_names
from kirsch.frameworks.pytorch.io.rounding import Rounding
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.modules.unsupported import check_exportable, reason_of
from kirsch.frameworks.pytorch.training.finite import not_finite_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

SINGLE_FILE_BYTES = 1_500_000_000
"""Protobuf stops at 2 GB; above this the weights go to a second file."""


class Exportable:
    """A copy of a model in inference mode as a function of arrays, ready to be written and to be compared with.

    A model of transformers runs without its cache of keys and values, which only generation needs.

    Args:
        model: left as it is.
        example_inputs: tensors whose first axis is the batch; see `Flat`.

    Attributes:
        name: of the model's class.
        inputs: name → example array.

    Raises:
        ModelError: the model cannot be copied, or the inputs or the model cannot be exported in their type.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.name = type(model).__name__
        check_exportable(model)
        own = copy_of(model).eval()
        for parameter in own.parameters():
            parameter.requires_grad = False  # the attention of PyTorch is exported otherwise where gradients flow
        _without_cache(own)
        self._flat = Flat(own, example_inputs).eval()
        given = [*own.state_dict().values(), *self._flat.inputs.values()]
        if any(tensor.dtype is torch.bfloat16 for tensor in given):
            raise ModelError(
                f"A {self.name} in bfloat16 cannot be exported.",
                "ONNX Runtime lacks most operators in this type.",
                "Give model.float(), and inputs in float32.",
            )
        self.inputs: dict[str, NDArray[Any]] = {name: host(value) for name, value in self._flat.inputs.items()}
        self.double = any(tensor.dtype is torch.float64 for tensor in given)

    def outputs(self, inputs: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return all outputs for one batch, by their path in what the model returns.

        Raises:
            ModelError: one is a bfloat16, a type that numpy lacks, too; or an embedding is given floating numbers.
        """
        try:
            found = self._run(inputs)
        except RuntimeError as error:
            args, options = self._flat.arguments(*self._tensors(inputs))
            fix = (
                fix_of_looked_up(args, options)
                if looks_up(error)
                else fix_of_inputs(self._flat.model, args, options, error)
            )
            if not fix:
                raise
            raise ModelError(f"A {self.name} does not run with its inputs.", error_text(error), fix) from error
        narrow = next((name for name, value in found.items() if value.dtype is torch.bfloat16), None)
        if narrow is not None:
            raise onnx_file.computing_in_bfloat16(self.name, "", f"Its output {narrow!r} is of this type. ")
        return {name: host(value) for name, value in found.items()}

    def rounded(self, inputs: Sequence[NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
        """Return the outputs where every operation rounds otherwise; see `Rounding`."""
        with Rounding(seed):
            return self.outputs(inputs)

    def unsteady(self, inputs: Sequence[NDArray[Any]]) -> tuple[str, str]:
        """Return why two runs for these inputs differ, and what to do; two empty texts if they do not."""
        return unsteady(self._flat.model, lambda: list(self._run(inputs).values()))

    def not_finite(self) -> str:
        """Return the first parameter or buffer that holds NaN or infinity, in words; "" if none does."""
        return next(not_finite_names(self._flat.model), "")

    def _run(self, inputs: Sequence[NDArray[Any]]) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(), torch.no_grad(), _own_types(self._flat):
            return self._flat.by_path(*self._tensors(inputs))

    def _functions(self) -> set[str]:
        """Return the names of the functions of PyTorch that the forward calls, as far as it runs."""
        seen = _Functions()
        with seen, _quiet(), contextlib.suppress(Exception):
            self._run(list(self.inputs.values()))
        return seen.names

    def _tensors(self, inputs: Iterable[NDArray[Any]]) -> tuple[torch.Tensor, ...]:
        """Arrays as tensors where the model lies, which it may write into."""
        device = predict.device_of(self._flat)
        return tuple(torch.tensor(array, device=device) for array in inputs)

    def write_onnx(self, path: Path, *, free_batch: bool = True) -> dict[str, Any]:
        """Write one ONNX file.

        Args:
            path: of the file.
            free_batch: whether the first axis of every input may have any size. Otherwise all sizes are those of the
                example inputs.

        Returns:
            opset, IR version, exporter, and name, shape and type of each input and output.

        Raises:
            ModelError: the model cannot be exported; names the operation where the exporter does.
            NumericError: it draws random numbers.
        """
        # An axis of size 1 would be taken for a constant.
        twice = free_batch and all(len(value) == 1 for value in self._flat.inputs.values())
        given = self._tensors(self.inputs.values())
        given = tuple(torch.cat([value, value]) for value in given) if twice else given
        batch = torch.export.Dim("batch")
        try:
            with _quiet(), _own_types(self._flat):
                paths = list(self._run(list(self.inputs.values())))
                program = torch.onnx.export(
                    self._flat,
                    given,
                    dynamo=True,
                    dynamic_shapes=(tuple({0: batch} for _ in given),) if free_batch else None,
                    verbose=False,
                )
        except Exception as error:
            fix = "Export a part without the operation that is named, or replace it."
            first = _root(error)
            why, fix = reason_of(self._functions(), first) or (error_text(first), fix)
            raise ModelError(f"A {self.name} cannot be exported to ONNX.", why, fix) from error
        if program is None:
            raise ModelError(f"A {self.name} cannot be exported to ONNX.", "The exporter gave nothing.")
        line = line_that_draws(program.exported_program) if program.exported_program is not None else None
        if line is not None:  # it may matter too rarely to be seen in runs
            raise NumericError(f"No file can equal a {self.name}.", reason_for(line), RANDOMNESS_FIX)
        size = sum(p.numel() * p.element_size() for p in self._flat.parameters())
        with _quiet():
            program.save(str(path), external_data=size > SINGLE_FILE_BYTES)
        inputs = list(self.inputs)
        onnx_file.finish(path, inputs=inputs, outputs=output_names(paths, inputs), prefix="model.", model=self.name)
        return {**onnx_file.details(path), "exporter": f"torch {torch.__version__}"}


@contextlib.contextmanager
def _own_types(model: nn.Module) -> Iterator[None]:
    """Without the autocast of the caller, which the file would hold; that of the model's own code stays."""
    with torch.autocast("cpu", enabled=False), torch.autocast(predict.device_of(model).type, enabled=False):
        yield


class _Functions(TorchFunctionMode):
    """Notes the names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call."""
        self.names.add(called_name(func))
        return func(*args, **(kwargs or {}))


def _without_cache(model: nn.Module) -> None:
    """Switch off the cache of keys and values in every configuration that a model of transformers carries."""
    seen: set[int] = set()
    waiting = [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
    while waiting:
        config = waiting.pop()
        if id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False
        waiting += [part for part in vars(config).values() if hasattr(part, "use_cache")]


def _root(error: BaseException) -> BaseException:
    """What went wrong first; the exporter wraps it in advice to its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


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
