"""Rules of operators that take parts of an axis, or concatenate and repeat parts."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.frameworks.pytorch.analysis.integers import TracedInt
from kirsch.frameworks.pytorch.analysis.operation import dims_of
from kirsch.frameworks.pytorch.analysis.operators.rule import rule
from kirsch.frameworks.pytorch.analysis.operators.stated_sizes import stated_bound, stated_sizes
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.frameworks.pytorch.analysis.operation import OperationContext
    from kirsch.graph.labels import Axis, Labels


@rule("cat")
def _cat(op: OperationContext) -> Tensor:
    parts = [t for t in op.args[0] if t.shape != (0,)]
    return relations.concat(op.facts, parts, op.arg(1, "dim", 0) % len(op.shape), op.shape)


@rule("stack")
def _stack(op: OperationContext) -> Tensor:
    parts = op.args[0]
    dim = op.arg(1, "dim", 0) % len(op.shape)
    axes = list(relations.elementwise(op.facts, parts, parts[0].shape).axes)
    return Tensor.of(op.shape, [*axes[:dim], None, *axes[dim:]])


@rule("select")
def _select(op: OperationContext) -> Tensor:
    x = op.args[0]
    dim = op.args[1] % len(x.shape)
    relations.freeze(op.facts, [x], "a fixed index of the axis is selected", [dim])
    return relations.drop(op.facts, x, [dim], keepdim=False)


@rule("unbind")
def _unbind(op: OperationContext) -> list[Tensor]:
    x = op.args[0]
    dim = op.arg(1, "dim", 0) % len(x.shape)
    relations.freeze(op.facts, [x], "unbind splits the axis", [dim])
    return [relations.drop(op.facts, x, [dim], keepdim=False)] * len(op.shapes)


@rule("flip")
def _flip(op: OperationContext) -> Tensor:
    x: Tensor = op.args[0]
    for dim in dims_of(op.args[1], len(x.shape)):
        x = relations.gather(op.facts, x, dim, np.arange(x.shape[dim])[::-1])
    return x


@rule("roll")
def _roll(op: OperationContext) -> Tensor:
    x = op.args[0]
    dims = op.arg(2, "dims", ())
    relations.freeze(op.facts, [x], "the axis is rolled by a fixed offset", dims_of(dims, len(x.shape)))
    return Tensor.of(op.shape, x.axes)


@rule("repeat", "tile")
def _repeat(op: OperationContext) -> Tensor:
    """Repeat each axis. An axis of size 1 without labels gets new labels, so that it can be coupled to others."""
    x = op.args[0]
    stated = stated_sizes(op)
    shape = (1,) * (len(op.shape) - len(x.shape)) + x.shape
    axes = [None] * (len(op.shape) - len(x.shape)) + list(x.axes)
    out: list[Axis] = []
    for axis, size, new, number in zip(axes, shape, op.shape, stated, strict=True):
        if axis is not None:
            index = np.tile(np.arange(size), new // size)
            out.append(relations.gather(op.facts, Tensor.of([size], [axis]), 0, index).axes[0])
        else:
            free = size == 1 < new and op.can_tie(number)
            out.append(op.tie_size(op.facts.fresh(new), number) if free else None)
    return Tensor.of(op.shape, out)


@rule("repeat_interleave")
def _repeat_interleave(op: OperationContext) -> Tensor:
    x, times, dim = op.args[0], op.args[1], op.arg(2, "dim")
    if dim is None or isinstance(times, Tensor):
        return op.freeze_all("repeat_interleave flattens the tensor, or repeats by a tensor of counts")[0]
    return relations.gather(op.facts, x, dim % len(x.shape), np.repeat(np.arange(x.shape[dim]), times))


SLICING = frozenset(["__getitem__", "__setitem__", "narrow", "slice"])
"""Calls that state the bounds of a slice."""


@rule("slice")
def _slice(op: OperationContext) -> Tensor:
    x = op.args[0]
    dim = op.arg(1, "dim", 0) % len(x.shape)
    bounds = op.arg(2, "start"), op.arg(3, "end")
    start, end, stride = slice(*bounds, op.arg(4, "step", 1)).indices(x.shape[dim])
    index = np.arange(start, end, stride)
    axis = x.axes[dim]
    name = op.call.name if op.call is not None else ""
    if axis is not None and stride != 1:
        op.facts.freeze(axis, "the axis is sliced with a stride")
    elif axis is not None and any(isinstance(bound, int) and bound < 0 for bound in bounds):
        op.facts.freeze(axis, "the axis is sliced with a negative index")
    elif axis is not None and name not in SLICING:
        op.facts.freeze(axis, "the code does not state the bounds of the slice")
    elif axis is not None:
        for bound in (start, end):
            number = stated_bound(op, start, end, bound)
            # After a cut, the code must state the number of kept entries before the bound. The end in an index
            # expression may be larger than the axis, but the end of `narrow` may not.
            if 0 < bound < len(axis) or (bound == len(axis) and (name == "narrow" or isinstance(number, TracedInt))):
                op.tie_size(axis[:bound], number)
    return relations.gather(op.facts, x, dim, index)


@rule("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split")
def _split(op: OperationContext) -> list[Tensor]:
    x = op.args[0]
    dim = op.arg(2, "dim", 0) % len(x.shape)
    axis = x.axes[dim]
    bounds = np.cumsum([0, *(shape[dim] for shape in op.shapes)])
    parts = [np.arange(a, b) for a, b in itertools.pairwise(bounds)]
    if axis is not None:
        _tie_parts(op, axis, parts)
    return [relations.gather(op.facts, x, dim, part) for part in parts]


def _tie_parts(op: OperationContext, axis: Labels, parts: list[NDArray[np.int64]]) -> None:
    """Require that the code splits the axis into the same parts after a cut."""
    name = op.call.name if op.call is not None else ""
    names = ("split_size_or_sections", "split_size", "split_sizes", "chunks")
    stated = next((value for key in names if (value := op.traced_arg(1, key)) is not None), None)
    equal = len({len(part) for part in parts}) == 1
    if name in ("split", "split_with_sizes") and isinstance(stated, tuple) and len(stated) == len(parts):
        for part, size in zip(parts, stated, strict=True):
            op.tie_size(axis[part], size)
    elif equal and (name == "split" or (name == "chunk" and stated == len(parts))):
        for part in parts[1:]:
            op.facts.equate(axis[parts[0]], axis[part])
        if name == "split":
            op.tie_size(axis[parts[0]], stated)
    else:
        op.facts.freeze(axis, "the axis is split into parts whose sizes are not traced")


@rule("pad", "constant_pad_nd")
def _pad(op: OperationContext) -> Tensor:
    x: Tensor = op.args[0]
    amounts = op.args[1]
    stated = op.traced_arg(1, "pad")
    stated = stated if isinstance(stated, (tuple, list)) and len(stated) == len(amounts) else [None] * len(amounts)
    constant = op.arg(2, "mode", "constant") == "constant" or op.name == "constant_pad_nd"
    out = x
    for pair in range(len(amounts) // 2):
        dim = len(x.shape) - 1 - pair
        before, after = amounts[2 * pair], amounts[2 * pair + 1]
        if not before and not after:
            continue
        if min(before, after) < 0 or (not constant and out.axes[dim] is not None):
            relations.freeze(op.facts, [out], "the axis is cropped, or padded with its own values", [dim])
        size = out.shape[dim] + before + after
        shape = [size if position == dim else n for position, n in enumerate(out.shape)]
        if out.axes[dim] is None or min(before, after) < 0:
            out = Tensor.of(shape, [None if position == dim else a for position, a in enumerate(out.axes)])
        else:
            sides = [_padding(op, n, stated[2 * pair + k]) for k, n in enumerate((before, after))]
            axis = np.concatenate([sides[0], out.axes[dim], sides[1]])
            out = Tensor.of(shape, [axis if position == dim else a for position, a in enumerate(out.axes)])
    return out


def _padding(op: OperationContext, amount: int, stated: Any) -> Any:
    """Return the labels of the padding of one side: new ones if the amount is traced, 0 (frozen) otherwise."""
    if not isinstance(stated, TracedInt) or amount == 0:
        return np.zeros(amount, np.int64)
    return op.tie_size(op.facts.fresh(amount), stated)
