"""Rules of operators that change the axes of a tensor, or create a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.frameworks.pytorch.analysis.operators.rule import rule
from kirsch.frameworks.pytorch.analysis.operators.stated_sizes import stated_sizes
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import OperationContext
    from kirsch.graph.labels import Axis


@rule("view", "reshape", "_unsafe_view", "unflatten", "flatten", "squeeze", "unsqueeze")
def _reshape(op: OperationContext) -> Tensor:
    out = relations.reshape(op.facts, op.args[0], op.shape)
    if op.name not in ("squeeze", "unsqueeze", "flatten"):
        for axis, size in zip(out.axes, stated_sizes(op), strict=True):
            op.tie_size(axis, size)
    return out


@rule("view_as_complex", "view_as_real")
def _complex(op: OperationContext) -> Tensor:
    """The last axis, of size 2, holds the real and the imaginary part."""
    x = op.args[0]
    if op.name == "view_as_real":
        return Tensor.of(op.shape, [*x.axes, None])
    relations.freeze(op.facts, [x], "the axis holds the real and the imaginary part", [-1])
    return relations.drop(op.facts, x, [len(x.shape) - 1], keepdim=False)


@rule("permute")
def _permute(op: OperationContext) -> Tensor:
    return relations.permute(op.args[0], [dim % len(op.shape) for dim in op.args[1]])


@rule("transpose", "t", "numpy_T")
def _transpose(op: OperationContext) -> Tensor:
    x = op.args[0]
    order = list(range(len(x.shape)))
    first, second = (op.args[1], op.args[2]) if len(op.args) > 2 else (-2, -1)  # noqa: PLR2004 - x and two axes
    if len(order) > 1:
        order[first], order[second] = order[second], order[first]
    return relations.permute(x, order)


@rule("expand", "broadcast_to", "expand_as")
def _expand(op: OperationContext) -> Tensor:
    x = op.args[0]
    new = len(op.shape) - len(x.shape)
    axes: list[Axis] = []
    for position, (size, stated) in enumerate(zip(op.shape, stated_sizes(op), strict=True)):
        old = position - new
        stays = old >= 0 and x.shape[old] == size
        # Entries along an expanded axis are equal, so any of them can be removed if the size in the code can change.
        free = size > 1 and op.can_tie(stated)
        axis = x.axes[old] if stays else op.facts.fresh(size) if free else None
        axes.append(op.tie_size(axis, stated))
    return Tensor.of(op.shape, axes)


@rule("full", "zeros", "ones", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty")
def _create(op: OperationContext) -> Tensor:
    axes: list[Axis] = []
    for size, stated in zip(op.shape, stated_sizes(op), strict=True):
        free = size > 1 and op.can_tie(stated)
        axes.append(op.tie_size(op.facts.fresh(size) if free else None, stated))
    for tensor in op.tensors():
        for axis in tensor.axes:
            op.facts.reduce(axis)  # `new_*` use only type and device of their tensor
    return Tensor.of(op.shape, axes)


@rule("eye")
def _eye(op: OperationContext) -> Tensor:
    """The identity matrix; the kept rows and columns are an identity matrix again."""
    rows, columns = op.shape
    stated = op.traced_arg(0, "n")
    if rows != columns or rows == 1 or not op.can_tie(stated):
        return Tensor.of(op.shape)
    axis = op.tie_size(op.facts.fresh(rows), stated)
    return Tensor.of(op.shape, [axis, axis])
