"""Inputs of the operations that multiply a weight: linear layers, convolutions and matrix products."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kirsch.frameworks.pytorch.analysis.program import name_of
from kirsch.frameworks.pytorch.inference.predict import arguments_of, copied, inference, tensors
from kirsch.frameworks.pytorch.modules.submodule import part_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from kirsch.graph.graph import Graph
    from kirsch.graph.labels import Labels

    SeePatches = Callable[[str, int, Labels, int, Any], None]

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
    labels = _ChannelLabels(graph)
    _observe(graph, inputs, lambda product: see(product.name, product.axis, labels(product), product.positions()))


def patches(graph: Graph, inputs: Any, names: Collection[str], see: SeePatches) -> None:
    """Call `see(name, axis, labels, groups, x)` for each product of one of the named weights with activations.

    Args:
        graph, inputs: see `reads`.
        names: paths of weights.
        see: called with the path of the weight, the axis over which the product is summed, the labels of the channels,
            the number of groups of a convolution (else 1), and the activations that each output of the layer reads,
            shape (outputs, channels, kernel size). For a transposed convolution, an activation is read by several
            outputs; it is passed once, with kernel size 1.
    """
    labels = _ChannelLabels(graph)

    def observe(product: _Product) -> None:
        found = labels(product) if product.name in names else None
        if found is not None:
            see(product.name, product.axis, found, product.groups, product.patches())

    _observe(graph, inputs, observe)


def _observe(graph: Graph, inputs: Any, observe: Callable[[_Product], None]) -> None:
    """Run the model, and call `observe` for each product of a weight with activations."""
    weights: dict[int, _Storage] = {}
    for name, value in part_of(graph.model, graph.tracing.module).named_parameters():
        if value.dim() > 1:
            weights.setdefault(value.untyped_storage().data_ptr(), _Storage(name, value.stride(), tuple(value.shape)))
    args, options = arguments_of(graph.model, copied(tensors(inputs, graph.model)))
    with warnings.catch_warnings(), inference(graph.model), torch.no_grad(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")  # PyTorch warns when the settings of another vendor are read
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))  # a fused recurrent layer hides its products
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_Observer(weights, observe))
        graph.model(*args, **options)


class _ChannelLabels:
    """Labels of the channels of a product; None if they are frozen."""

    def __init__(self, graph: Graph) -> None:
        self._axes = graph.axes
        self._of_convolution: dict[str, Labels] = {}  # a convolution with groups has fewer columns than channels
        for node in graph.traced.states:
            if node.op != "call_function" or "conv" not in name_of(node):
                continue
            x, weight = node.args[:2]
            labels = graph.traced.states[x].axes[1] if weight.name in graph.traced.slots else None
            if labels is not None:
                self._of_convolution.setdefault(graph.traced.slots[weight.name], labels)

    def __call__(self, product: _Product) -> Labels | None:
        labels = self._axes.get((product.name, product.axis))
        fits = labels is not None and len(labels) == product.channels
        return labels if fits else self._of_convolution.get(product.name)


@dataclass(frozen=True)
class _Product:
    """A product of a weight with activations.

    Args:
        name, axis: path of the weight, and the axis over which the product is summed.
        x: the activations: (..., channels), or (N, channels, ...) for a convolution.
        kernel: sizes of the kernel of a convolution, else empty.
        convolution: the further arguments of a convolution that is not transposed; None for other products.
        groups: number of groups of a convolution, else 1.
    """

    name: str
    axis: int
    x: torch.Tensor
    kernel: tuple[int, ...] = ()
    convolution: dict[str, Any] | None = None
    groups: int = 1

    @property
    def channels(self) -> int:
        return self.x.shape[1 if self.kernel else -1]

    def positions(self) -> torch.Tensor:
        """Return the activations, shape (positions, channels)."""
        x = self.x.movedim(1, -1) if self.kernel else self.x
        return x.flatten(0, -2)

    def patches(self) -> torch.Tensor:
        """Return the activations that each output reads, shape (outputs, channels, kernel size)."""
        if self.convolution is None or math.prod(self.kernel) == 1:
            return self.positions()[:, :, None]
        x, kernel, options = self.x, self.kernel, self.convolution
        if len(kernel) == 1:  # `unfold` takes images
            x, kernel = x[:, :, None], (1, *kernel)
            options = {name: (1 - (name == "padding"), *value) for name, value in options.items()}
        columns = torch.nn.functional.unfold(x, kernel, **options)  # (N, channels * kernel size, outputs)
        return columns.mT.reshape(-1, x.shape[1], math.prod(kernel))


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
    """Calls `observe` for each product of a weight with activations."""

    def __init__(self, weights: dict[int, _Storage], observe: Callable[[_Product], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights, self._observe = weights, observe

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket
        if name is aten.convolution:
            self._convolution(*args)
        elif name in (aten.mm, aten.bmm):
            self._product(args[0], args[1])
        elif name in (aten.addmm, aten.baddbmm):
            self._product(args[1], args[2])
        return func(*args, **(kwargs or {}))

    def _weight(self, tensor: torch.Tensor) -> _Storage | None:
        return self._weights.get(tensor.untyped_storage().data_ptr())

    def _convolution(self, x: Any, weight: Any, _: Any, stride: Any, padding: Any, dilation: Any, *others: Any) -> None:
        found = self._weight(weight)
        if found is not None:
            transposed, _, groups = others
            options = None if transposed else {"stride": stride, "padding": padding, "dilation": dilation}
            self._observe(_Product(found.name, 0 if transposed else 1, x, found.shape[2:], options, groups))

    def _product(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Observe the product of two (batches of) matrices of which one is a weight."""
        for weight, x, dim in ((second, first, -2), (first, second.mT, -1)):
            found = self._weight(weight)
            if found is None:
                continue
            size, stride = weight.shape[dim], weight.stride(dim)
            axes = [a for a, s in enumerate(found.strides) if s == stride and found.shape[a] == size]
            if axes:
                self._observe(_Product(found.name, axes[0], x))
            return
