"""Operators that see the same numbers under other axes, or make a tensor of given sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.frameworks.pytorch.analysis.operators.given import sizes
from kirsch.frameworks.pytorch.analysis.operators.rule import rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import Step
    from kirsch.graph.labels import Axis


@rule("view", "reshape", "_unsafe_view", "unflatten", "flatten", "squeeze", "unsqueeze")
def _reshape(step: Step) -> Tensor:
    out = relations.reshape(step.facts, step.args[0], step.shape)
    if step.name not in ("squeeze", "unsqueeze", "flatten"):
        for axis, given in zip(out.axes, sizes(step), strict=True):
            step.follow(axis, given)
    return out


@rule("view_as_complex", "view_as_real")
def _complex(step: Step) -> Tensor:
    """The last axis, of two positions, is real and imaginary part."""
    x = step.args[0]
    if step.name == "view_as_real":
        return Tensor.of(step.shape, [*x.axes, None])
    relations.freeze(step.facts, [x], "it is a real and an imaginary part", [-1])
    return relations.drop(step.facts, x, [len(x.shape) - 1], keepdim=False)


@rule("permute")
def _permute(step: Step) -> Tensor:
    return relations.permute(step.args[0], [dim % len(step.shape) for dim in step.args[1]])


@rule("transpose", "t", "numpy_T")
def _transpose(step: Step) -> Tensor:
    x = step.args[0]
    order = list(range(len(x.shape)))
    first, second = (step.args[1], step.args[2]) if len(step.args) > 2 else (-2, -1)  # noqa: PLR2004 - x and two axes
    if len(order) > 1:
        order[first], order[second] = order[second], order[first]
    return relations.permute(x, order)


@rule("expand", "broadcast_to", "expand_as")
def _expand(step: Step) -> Tensor:
    x = step.args[0]
    new = len(step.shape) - len(x.shape)
    axes: list[Axis] = []
    for position, (size, given) in enumerate(zip(step.shape, sizes(step), strict=True)):
        old = position - new
        stays = old >= 0 and x.shape[old] == size
        # An expanded axis is constant along itself, so it can follow whatever it meets, if its size can.
        free = size > 1 and step.can_follow(given)
        axis = x.axes[old] if stays else step.facts.fresh(size) if free else None
        axes.append(step.follow(axis, given))
    return Tensor.of(step.shape, axes)


@rule("full", "zeros", "ones", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty")
def _create(step: Step) -> Tensor:
    axes: list[Axis] = []
    for size, given in zip(step.shape, sizes(step), strict=True):
        free = size > 1 and step.can_follow(given)
        axes.append(step.follow(step.facts.fresh(size) if free else None, given))
    for tensor in step.tensors():
        for axis in tensor.axes:
            step.facts.reduce(axis)  # `new_*` take only type and device from their tensor
    return Tensor.of(step.shape, axes)


@rule("eye")
def _eye(step: Step) -> Tensor:
    """The identity matrix; of what is kept, it is the identity again."""
    rows, columns = step.shape
    given = step.given(0, "n")
    if rows != columns or rows == 1 or not step.can_follow(given):
        return Tensor.of(step.shape)
    axis = step.follow(step.facts.fresh(rows), given)
    return Tensor.of(step.shape, [axis, axis])
