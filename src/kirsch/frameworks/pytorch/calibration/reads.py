"""Inputs of the operations that multiply a weight: linear layers, convolutions and matrix products."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kirsch.frameworks.pytorch.analysis.program import name_of
from kirsch.frameworks.pytorch.inference.predict import arguments, copied, inference, tensors
from kirsch.frameworks.pytorch.modules.submodule import part_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.graph.graph import Graph
    from kirsch.graph.labels import Labels

aten = torch.ops.aten


class _Storage(NamedTuple):
    """A weight by the memory that it occupies."""

    name: str
    strides: tuple[int, ...]
    shape: tuple[int, ...]


def reads(graph: Graph, inputs: Any, see: Callable[[str, int, Labels | None, Any], None]) -> None:
    """Call `see(name, axis, labels, x)` for each product of a weight with activations in a run of the model.

    The model runs in inference mode, without gradient.

    Args:
        graph: graph of the model.
        inputs: inputs of one batch.
        see: called with the path of the weight; the axis over which the product is summed; the labels of the channels,
            None if they are frozen; and the activations, shape (positions, channels). The positions are those of the
            samples, tokens and pixels, in this order. A convolution with several groups has more channels than the axis
            of its weight.
    """
    part = part_of(graph.model, graph.tracing.module)
    weights: dict[int, _Storage] = {}
    for name, value in part.named_parameters():
        if value.dim() > 1:
            weights.setdefault(value.untyped_storage().data_ptr(), _Storage(name, value.stride(), tuple(value.shape)))
    channels = _channels_of_grouped_convolutions(graph)

    def see_labeled(name: str, axis: int, x: torch.Tensor) -> None:
        labels = graph.axes.get((name, axis))
        if labels is None or len(labels) != x.shape[-1]:
            labels = channels.get(name)
        see(name, axis, labels, x)

    args, options = arguments(copied(tensors(inputs, graph.model)))
    with warnings.catch_warnings(), inference(graph.model), torch.no_grad(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")  # PyTorch warns when the settings of another vendor are read
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))  # a fused recurrent layer hides its products
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_Reads(weights, see_labeled))
        graph.model(*args, **options)


def _channels_of_grouped_convolutions(graph: Graph) -> dict[str, Labels]:
    """Return the labels of the input channels of each convolution, by the path of its weight."""
    found: dict[str, Labels] = {}
    for node in graph.traced.states:
        if node.op != "call_function" or "conv" not in name_of(node):
            continue
        x, weight = node.args[:2]
        labels = graph.traced.states[x].axes[1] if weight.name in graph.traced.slots else None
        if labels is not None:
            found.setdefault(graph.traced.slots[weight.name], labels)
    return found


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
    def __init__(self, weights: dict[int, _Storage], see: Callable[[str, int, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights, self._see = weights, see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket
        if name is aten.convolution:
            self._convolution(args[0], args[1], transposed=args[6])
        elif name in (aten.mm, aten.bmm):
            self._product(args[0], args[1])
        elif name in (aten.addmm, aten.baddbmm):
            self._product(args[1], args[2])
        return func(*args, **(kwargs or {}))

    def _weight(self, tensor: torch.Tensor) -> _Storage | None:
        return self._weights.get(tensor.untyped_storage().data_ptr())

    def _convolution(self, x: torch.Tensor, weight: torch.Tensor, *, transposed: bool) -> None:
        found = self._weight(weight)
        if found is not None:
            self._see(found.name, 0 if transposed else 1, x.movedim(1, -1).flatten(0, -2))

    def _product(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """See the product of two (batches of) matrices of which one is a weight."""
        for weight, x, dim in ((second, first, -2), (first, second.mT, -1)):
            found = self._weight(weight)
            if found is None:
                continue
            size, stride = weight.shape[dim], weight.stride(dim)
            axes = [a for a, s in enumerate(found.strides) if s == stride and found.shape[a] == size]
            if axes:
                self._see(found.name, axes[0], x.flatten(0, -2))
            return
