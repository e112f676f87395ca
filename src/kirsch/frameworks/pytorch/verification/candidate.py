"""Runs of the pruned model with the noise of the original, in the dtype of the comparison."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from kirsch.failures import lacks_memory
from kirsch.frameworks.pytorch.inference.predict import run
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.surgery.cut import sliced
from kirsch.frameworks.pytorch.verification.distance import distance
from kirsch.frameworks.pytorch.verification.dtypes import OneType, WithoutDropout, constants_of_the_trace, mapped
from kirsch.frameworks.pytorch.verification.noise import empty, named_tensors, seeded, with_noise

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from kirsch.frameworks.pytorch.verification.noise import Noise
    from kirsch.graph.graph import Graph


@dataclass(frozen=True)
class Removal:
    """The removed components and blocks.

    Args:
        keep: mask of the components (sets of coupled labels) that stay, bool of shape (components,).
        without: paths of the dropped blocks.
        moved: path of a module in the original → its path in the pruned model. None if no block was dropped.
    """

    keep: NDArray[np.bool_]
    without: Collection[str] = ()
    moved: Mapping[str, str] | None = None

    def new_name(self, name: str) -> str | None:
        """Return the name of a tensor of the original in the pruned model; None if it was dropped with a block."""
        if self.moved is None:
            return name
        path, _, leaf = name.rpartition(".")
        new_path = self.moved.get(path)
        return new_path if new_path is None else f"{new_path}.{leaf}".removeprefix(".")


@dataclass(frozen=True)
class Candidate:
    """The pruned model with the noise of the original, in inference mode or, without dropout, in training mode.

    Args:
        pruned, original: the pruned model, and the model that was traced.
        graph: graph of the original.
        removal: what was removed.
        noise: noise of the original.
        dtype: dtype of the comparison.
        training: whether to run in training mode.
    """

    pruned: nn.Module
    original: nn.Module
    graph: Graph
    removal: Removal
    noise: Noise
    dtype: torch.dtype
    training: bool = False

    def distance(self, masked: list[torch.Tensor], args: Any, options: Any, tolerance: float) -> float:
        """Return the distance of the outputs from those of the masked original.

        To save memory, a weight is converted only while an operation reads it. If the model does not run in this way,
        or its outputs differ by more than the tolerance, the distance is that of a copy with converted weights: the
        code of a model may compare the dtypes of its weights, or change them.
        """
        try:
            model, weights = self._with_shared_weights()
            found = distance(masked, self._outputs(model, weights, args, options))
        except Exception as failure:  # the code of the model can raise any exception
            if lacks_memory(failure):
                raise
            found = float("inf")
        if found <= tolerance:
            return found
        return distance(masked, self._outputs(self._with_own_weights(), {}, args, options))

    def _outputs(
        self, model: nn.Module, weights: Mapping[int, Callable[[], torch.Tensor]], args: Any, options: Any
    ) -> list[torch.Tensor]:
        traced = self.graph.traced.training if self.training else self.graph.traced
        dropout: Any = WithoutDropout() if self.training else contextlib.nullcontext()  # type: ignore[no-untyped-call]
        model.train(self.training)
        with (
            OneType(self.dtype),
            dropout,
            constants_of_the_trace(traced, self.dtype),
            _ConvertedWeights(weights, self.dtype),
        ):
            return seeded(functools.partial(run, model, args, options))

    def _with_shared_weights(self) -> tuple[nn.Module, dict[int, Callable[[], torch.Tensor]]]:
        """Return a copy that shares the parameters of the pruned model, and functions that return them with noise."""
        model = copy_of(self.pruned, {id(parameter): parameter for parameter in self.pruned.parameters()})
        parameters = {id(parameter) for parameter in model.parameters()}
        weights: dict[int, Callable[[], torch.Tensor]] = {}
        buffers: dict[int, torch.Tensor] = {}
        for target, noisy in self._targets(model):
            if id(target) in parameters:
                weights[id(target)] = noisy
            else:
                buffers[id(target)] = noisy()
        for module in model.modules():
            for name, value in module.named_buffers(recurse=False):
                if id(value) in buffers:
                    setattr(module, name, buffers[id(value)])
        return model, weights

    def _with_own_weights(self) -> nn.Module:
        """Return a copy whose parameters and buffers are converted and have noise."""
        model = copy_of(self.pruned)
        model = model.double() if self.dtype is torch.float64 else model.float()  # keeps complex tensors complex
        with torch.no_grad():
            for target, noisy in self._targets(model):
                target.copy_(noisy())
        return model

    def _targets(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, Callable[[], torch.Tensor]]]:
        """Yield each tensor of a copy of the pruned model that has noise, and a function that returns its value."""
        tensors, stored, done = named_tensors(model), named_tensors(self.pruned), set()
        for name, value in named_tensors(self.original).items():
            new_name = self.removal.new_name(name)
            if new_name is None or (new_name not in tensors and self.graph.tracing.as_graph):
                continue  # with as_graph, the copy lacks the tensors that no operation reads
            target = tensors[new_name]
            if id(value) in self.noise and id(target) not in done:
                done.add(id(target))
                yield target, functools.partial(self._noisy, stored[new_name], name, id(value))

    def _noisy(self, stored: torch.Tensor, name: str, key: int) -> torch.Tensor:
        """Return a tensor of the pruned model, in the dtype of the comparison, with the noise of the original's."""
        with _disable_current_modes():
            total = stored.detach()
            if self.noise.changes(key):
                noise = sliced(self.noise[key], self.graph.tensors[name], self.graph, self.removal.keep)
                total = with_noise(total, noise)
            return empty(total.shape, self.dtype, total.device).copy_(total)


class _ConvertedWeights(TorchFunctionMode):
    """Replace weights, by their ids, with the results of functions, while a function of PyTorch reads them.

    Raises:
        RuntimeError: a function changes a weight in place.
    """

    def __init__(self, weights: Mapping[int, Callable[[], torch.Tensor]], dtype: torch.dtype) -> None:
        super().__init__()
        self._weights, self._dtype = weights, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one function, or read one attribute of a tensor."""
        options, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__get__" and args and id(args[0]) in self._weights:
            value = func(*args)
            if isinstance(value, torch.dtype):
                return self._dtype
            return func(self._converted(args[0]), *args[1:]) if isinstance(value, torch.Tensor) else value
        in_place = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
        if in_place and args and id(args[0]) in self._weights:
            raise RuntimeError(f"`{name}` changes a weight in place.")
        return func(*mapped(self._converted, args), **mapped(self._converted, options))

    def _converted(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._weights[id(tensor)]() if id(tensor) in self._weights else tensor
