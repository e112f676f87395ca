"""Inputs of the operations that multiply a weight: linear layers, convolutions and matrix products."""

from __future__ import annotations

import contextlib
import math
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kirsch.frameworks.pytorch.analysis.count import GROUPED, plain_kernels
from kirsch.frameworks.pytorch.analysis.program import name_of
from kirsch.frameworks.pytorch.inference.predict import arguments_of, call_model, copied, inference, tensors
from kirsch.frameworks.pytorch.modules.submodule import part_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from numpy.typing import NDArray
    from torch import nn

    from kirsch.graph.graph import Graph
    from kirsch.graph.labels import Labels

    See = Callable[[str, int, Labels | None, Any, Any], None]
    SeePatches = Callable[[str, int, Labels | None, int, Any, Any], None]

aten = torch.ops.aten

_STACK = 3
"""Number of axes of a stack of weight matrices."""


class _Storage(NamedTuple):
    """A weight by the memory that it occupies.

    Args:
        name: path of the weight.
        offset: position of its first number in the memory.
        strides, shape: strides and shape of the weight, or of the copy of those of its slices that `experts` lists.
        experts: index on axis 0 of the weight for each slice of the copy; None for the weight itself.
    """

    name: str
    offset: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    experts: torch.Tensor | None = None

    @classmethod
    def of(cls, name: str, value: torch.Tensor, experts: torch.Tensor | None = None) -> Self:
        """Return the memory of a weight, or of a copy of its slices."""
        return cls(name, int(value.storage_offset()), value.stride(), tuple(value.shape), experts)

    def contains(self, view: torch.Tensor) -> bool:
        """Return whether a view of the memory begins in the weight."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset <= view.storage_offset() <= self.offset + last


def weight_inputs(graph: Graph, inputs: Any, see: See) -> set[str]:
    """Call `see(name, axis, labels, x, experts)` for each product of a weight with activations in a run of the model.

    The model runs in inference mode, without gradient.

    Args:
        graph: graph of the model.
        inputs: inputs of one batch.
        see: called with the path of the weight; the axis over which the product is summed; the labels of the channels,
            None if they are frozen; the activations, shape (positions, channels); and, for the stacked weights of
            experts, the index on axis 0 of the weight for each position, else None. The positions are those of the
            samples, tokens and pixels, in this order, or in any order for experts. A convolution with several groups
            has more channels than the axis of its weight.

    Returns:
        The weights that other operations use, and whose products are not passed to `see`: a weight from which another
        one is computed, such as that of weight normalization, or the weight of an operation of another package.
    """
    labels = _ChannelLabels(graph)
    part = part_of(graph.model, graph.tracing.module)
    return observe(graph.model, part, inputs, lambda p: see(p.name, p.axis, labels(p), p.positions(), p.experts))


def weight_input_patches(graph: Graph, inputs: Any, names: Collection[str], see: SeePatches) -> None:
    """Call `see(name, axis, labels, groups, x, experts)` for each product of one of the named weights with activations.

    Args:
        graph, inputs: see `weight_inputs`.
        names: paths of weights.
        see: called with the path of the weight, the axis over which the product is summed, the labels of the channels,
            the number of groups of a convolution (else 1), the activations that each output of the layer reads,
            shape (outputs, channels, kernel size), and the experts of `weight_inputs`. It is called once for each
            sample, if the kernel of a convolution is larger than 1.
    """
    labels = _ChannelLabels(graph)

    def see_product(product: Product) -> None:
        for x in product.patches() if product.name in names else ():
            see(product.name, product.axis, labels(product), product.groups, x, product.experts)

    observe(graph.model, part_of(graph.model, graph.tracing.module), inputs, see_product)


def layer_inputs(
    model: nn.Module, inputs: Any, names: Collection[str], see: Callable[[str, int, int, torch.Tensor], None]
) -> None:
    """Call `see(name, axis, groups, x)` for each product of one of the named weights with activations.

    Args:
        model: a model, which need not be traced.
        inputs: inputs of one batch.
        names: paths of weights.
        see: called as in `weight_input_patches`, without labels and experts.
    """

    def see_product(product: Product) -> None:
        for x in product.patches() if product.name in names else ():
            see(product.name, product.axis, product.groups, x)

    observe(model, model, inputs, see_product)


class SeenAll(BaseException):
    """Raised by a function that observes a run, to end it. Models may catch `Exception`; this is a `BaseException`."""


def observe(
    model: nn.Module, part: nn.Module, inputs: Any, see: Callable[[Product], None], *, recurrent: bool = True
) -> set[str]:
    """Run a model in inference mode, and call `see` for each product of a weight of a part of it with activations.

    Args:
        model: a model, which need not be traced.
        part: the part of the model whose weights are observed.
        inputs: inputs of one batch.
        see: may raise `SeenAll` to end the run.
        recurrent: whether the products of recurrent layers are observed, too; without them, convolutions are faster.

    Returns:
        The weights of the part that `weight_inputs` returns.
    """
    weights: dict[int, list[_Storage]] = {}
    for name, value in part.named_parameters():
        if value.dim() > 1:
            weights.setdefault(value.untyped_storage().data_ptr(), []).append(_Storage.of(name, value))
    args, options = arguments_of(model, copied(tensors(inputs, model)))
    observer = _Observer(weights, see)
    # Fused kernels, such as those of recurrent layers and of attention, would hide their products.
    with (
        contextlib.suppress(SeenAll),
        inference(model),
        torch.no_grad(),
        plain_kernels(recurrent=recurrent),
        torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext(),
        observer,
    ):
        call_model(model, args, options)
    return observer.used - observer.observed


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

    def __call__(self, product: Product) -> Labels | None:
        labels = self._axes.get((product.name, product.axis))
        fits = labels is not None and len(labels) == product.channels
        return labels if fits else self._of_convolution.get(product.name)


@dataclass(frozen=True)
class Product:
    """A product of a weight with activations.

    Args:
        name, axis: path of the weight, and the axis over which the product is summed.
        x: the activations: (..., channels), or (N, channels, ...) for a convolution.
        kernel: sizes of the kernel of a convolution, else empty.
        convolution: "stride", "padding" and "dilation" of a convolution, and "output_padding" of a transposed one; None
            for other products.
        groups: number of groups of a convolution, else 1.
        experts: index on axis 0 of a stack of weights for each position; None for other weights.
    """

    name: str
    axis: int
    x: torch.Tensor
    kernel: tuple[int, ...] = ()
    convolution: dict[str, Any] | None = None
    groups: int = 1
    experts: torch.Tensor | None = None

    @property
    def channels(self) -> int:
        """Number of channels of the activations."""
        return self.x.shape[1 if self.kernel else -1]

    def positions(self) -> torch.Tensor:
        """Return the activations, shape (positions, channels)."""
        x = self.x.movedim(1, -1) if self.kernel else self.x
        return x.flatten(0, -2)

    def patches(self) -> Iterator[torch.Tensor]:
        """Yield the activations that each output reads, shape (outputs, channels, kernel size).

        A convolution with a kernel larger than 1 yields the outputs of one sample at a time, to save memory.
        """
        if self.convolution is None or math.prod(self.kernel) == 1:
            yield self.windows().all()
        else:
            for index in range(len(self.x)):
                yield replace(self, x=self.x[index : index + 1]).windows().all()

    def windows(self) -> Windows:
        """Return the activations that each output reads, without a copy of those that several outputs read."""
        if self.convolution is None:
            return Windows(self.x, self.x.dim() - 1)
        stride, padding, dilation = (self.convolution[name] for name in ("stride", "padding", "dilation"))
        x, widths = self.x, [width for size in reversed(padding) for width in (size, size)]
        if "output_padding" in self.convolution:
            x, widths, stride = self._stretched(), self._margins(), [1] * len(stride)
        view = torch.nn.functional.pad(x, widths) if any(widths) else x  # (N, channels, ...)
        for axis, (size, step, distance) in enumerate(zip(self.kernel, stride, dilation, strict=True), start=2):
            view = view.unfold(axis, distance * (size - 1) + 1, step)[..., ::distance]
        if "output_padding" in self.convolution:  # its kernel begins at the last activation that an output reads
            view = view.flip([*range(-len(self.kernel), 0)])
        outputs = 1 + len(self.kernel)
        return Windows(view.movedim(1, outputs), outputs)  # (N, outputs ..., channels, kernel ...)

    def _stretched(self) -> torch.Tensor:
        """Return the activations of a transposed convolution with stride - 1 zeros between them on each axis.

        The transposed convolution is a convolution of them with stride 1 and a flipped kernel.
        """
        stride = (self.convolution or {})["stride"]
        sizes = [(size - 1) * step + 1 for size, step in zip(self.x.shape[2:], stride, strict=True)]
        stretched = self.x.new_zeros(*self.x.shape[:2], *sizes)
        strided: Any = (..., *(slice(None, None, step) for step in stride))
        stretched[strided] = self.x
        return stretched

    def _margins(self) -> list[int]:
        """Return the widths of the zeros around `_stretched`, those of the last axis first; negative ones crop."""
        options = self.convolution or {}
        axes = zip(self.kernel, options["padding"], options["dilation"], options["output_padding"], strict=True)
        sides = [(distance * (size - 1) - padding, more) for size, padding, distance, more in axes]
        return [width for first, more in reversed(sides) for width in (first, first + more)]


@dataclass(frozen=True)
class Windows:
    """The activations that each output of a layer reads, as a view.

    Args:
        values: shape (N, ..., channels, kernel ...); the first axes are those of the outputs.
        axes: number of axes of the outputs.
    """

    values: torch.Tensor
    axes: int

    @property
    def count(self) -> int:
        """Number of outputs."""
        return math.prod(self.values.shape[: self.axes])

    def all(self) -> torch.Tensor:
        """Return the activations, shape (outputs, channels, kernel size)."""
        return self._flat(self.values, self.count)

    def at(self, chosen: NDArray[np.int64]) -> torch.Tensor:
        """Return the activations that some of the outputs read, by their numbers in the order of `all`."""
        positions = np.unravel_index(chosen, self.values.shape[: self.axes])
        index = tuple(torch.tensor(position, device=self.values.device) for position in positions)
        return self._flat(self.values[index], len(chosen))

    def _flat(self, values: torch.Tensor, count: int) -> torch.Tensor:
        channels, *kernel = self.values.shape[self.axes :]
        return values.reshape(count, channels, math.prod(kernel))


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
    """Calls `see` for each product of a weight with activations.

    Attributes:
        used: names of the weights that an operation reads; views of a weight do not count.
        observed: names of the weights whose products were passed to `see`.
    """

    def __init__(self, weights: dict[int, list[_Storage]], see: Callable[[Product], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights, self._see = weights, see
        self.used: set[str] = set()
        self.observed: set[str] = set()

    def _observe(self, product: Product) -> None:
        self.observed.add(product.name)
        self._see(product)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket
        if name is aten.convolution:
            self._convolution(*args)
        elif name in (aten.mm, aten.bmm):
            self._product(args[0], args[1])
        elif name in (aten.addmm, aten.baddbmm):
            self._product(args[1], args[2])
        elif any(name is getattr(namespace, grouped, None) for namespace, grouped in GROUPED):
            self._grouped_product(args[0], args[1], args[2] if len(args) > 2 else (kwargs or {})["offs"])  # noqa: PLR2004
        if not func.is_view:
            found = [self._weight(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            self.used.update(weight.name for weight in found if weight is not None)
        result = func(*args, **(kwargs or {}))
        if name is aten.index:
            self._selection(args[0], args[1], result)
        return result

    def _weight(self, tensor: torch.Tensor) -> _Storage | None:
        stored = self._weights.get(tensor.untyped_storage().data_ptr(), ())
        return next((weight for weight in stored if weight.contains(tensor)), None)

    def _convolution(self, x: Any, weight: Any, _: Any, stride: Any, padding: Any, dilation: Any, *others: Any) -> None:
        found = self._weight(weight)
        if found is not None:
            transposed, output_padding, groups = others
            options = {"stride": stride, "padding": padding, "dilation": dilation}
            options |= {"output_padding": output_padding} if transposed else {}
            self._observe(Product(found.name, 0 if transposed else 1, x, found.shape[2:], options, groups))

    def _product(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Observe the product of two (batches of) matrices of which exactly one is a weight."""
        for weight, x, dim in ((second, first, -2), (first, second.mT, -1)):
            found = self._weight(weight)
            if found is None or self._weight(x) is not None:
                continue
            axis = _axis_of(found, weight, dim)
            if axis is not None:
                self._observe(Product(found.name, axis, x, experts=_experts(found, weight, x)))
            return

    def _grouped_product(self, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> None:
        """Observe the product of each row of x with the matrix of its group; `ends` are the ends of the groups."""
        found = self._weight(weight)
        axis = None if found is None or weight.dim() != _STACK else _axis_of(found, weight, -2)
        if found is not None and axis is not None:
            rows = torch.arange(int(ends[-1]), device=ends.device, dtype=ends.dtype)
            experts = torch.searchsorted(ends, rows, right=True)
            self._observe(Product(found.name, axis, x[: len(rows)], experts=experts))

    def _selection(self, weight: torch.Tensor, indices: Any, copy: torch.Tensor) -> None:
        """Register the copy of those slices of a stack of weights that a tensor of indices selects."""
        found = self._weight(weight)
        if found is None or found.experts is not None or len(found.shape) != _STACK or len(indices) != 1:
            return
        if weight.shape == found.shape and indices[0].dim() == 1 and indices[0].dtype != torch.bool:
            memory = copy.untyped_storage()
            self._weights[memory.data_ptr()] = [_Storage.of(found.name, copy, indices[0])]
            weakref.finalize(memory, self._weights.pop, memory.data_ptr(), None)


def _axis_of(weight: _Storage, operand: torch.Tensor, dim: int) -> int | None:
    """Return the axis of a weight that is the given dimension of an operand, which is a view of the weight."""
    size, stride = operand.shape[dim], operand.stride(dim)
    axes = [a for a, s in enumerate(weight.strides) if s == stride and weight.shape[a] == size]
    return axes[0] if axes else None


def _experts(weight: _Storage, operand: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """Return the index on axis 0 of a stack of weights for each row of x that is multiplied with the operand."""
    if len(weight.shape) != _STACK or {_axis_of(weight, operand, dim) for dim in (-2, -1)} != {1, 2}:
        return None
    rows = x.shape[:-1].numel()
    if operand.dim() < _STACK:  # one matrix of the stack
        return torch.full((rows,), (operand.storage_offset() - weight.offset) // weight.strides[0])
    if _axis_of(weight, operand, 0) != 0:
        return None
    experts = torch.arange(weight.shape[0]) if weight.experts is None else weight.experts
    return experts.repeat_interleave(rows // len(experts))
