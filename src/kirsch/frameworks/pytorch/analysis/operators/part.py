"""Operators that take parts of an axis, or lay parts end to end."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.frameworks.pytorch.analysis.integers import TracedInt
from kirsch.frameworks.pytorch.analysis.operation import axes_of
from kirsch.frameworks.pytorch.analysis.operators.given import border, sizes
from kirsch.frameworks.pytorch.analysis.operators.rule import rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.frameworks.pytorch.analysis.operation import Step
    from kirsch.graph.labels import Axis, Labels


@rule("cat")
def _cat(step: Step) -> Tensor:
    parts = [t for t in step.args[0] if t.shape != (0,)]
    return relations.concat(step.facts, parts, step.arg(1, "dim", 0) % len(step.shape), step.shape)


@rule("stack")
def _stack(step: Step) -> Tensor:
    parts = step.args[0]
    dim = step.arg(1, "dim", 0) % len(step.shape)
    axes = list(relations.elementwise(step.facts, parts, parts[0].shape).axes)
    return Tensor.of(step.shape, [*axes[:dim], None, *axes[dim:]])


@rule("select")
def _select(step: Step) -> Tensor:
    x = step.args[0]
    dim = step.args[1] % len(x.shape)
    relations.freeze(step.facts, [x], "an index of it is taken by number", [dim])
    return relations.drop(step.facts, x, [dim], keepdim=False)


@rule("unbind")
def _unbind(step: Step) -> list[Tensor]:
    x = step.args[0]
    dim = step.arg(1, "dim", 0) % len(x.shape)
    relations.freeze(step.facts, [x], "it is taken apart", [dim])
    return [relations.drop(step.facts, x, [dim], keepdim=False)] * len(step.shapes)


@rule("flip")
def _flip(step: Step) -> Tensor:
    x: Tensor = step.args[0]
    for dim in axes_of(step.args[1], len(x.shape)):
        x = relations.gather(step.facts, x, dim, np.arange(x.shape[dim])[::-1])
    return x


@rule("roll")
def _roll(step: Step) -> Tensor:
    x = step.args[0]
    dims = step.arg(2, "dims", ())
    relations.freeze(step.facts, [x], "it is rolled by a number", axes_of(dims, len(x.shape)))
    return Tensor.of(step.shape, x.axes)


@rule("repeat", "tile")
def _repeat(step: Step) -> Tensor:
    """Each axis as often as a number says; one of a single position can follow whatever it meets."""
    x = step.args[0]
    given = sizes(step)
    shape = (1,) * (len(step.shape) - len(x.shape)) + x.shape
    axes = [None] * (len(step.shape) - len(x.shape)) + list(x.axes)
    out: list[Axis] = []
    for axis, size, new, number in zip(axes, shape, step.shape, given, strict=True):
        if axis is not None:
            out.append(
                relations.gather(step.facts, Tensor.of([size], [axis]), 0, np.tile(np.arange(size), new // size)).axes[
                    0
                ]
            )
        else:
            free = size == 1 < new and step.can_follow(number)
            out.append(step.follow(step.facts.fresh(new), number) if free else None)
    return Tensor.of(step.shape, out)


@rule("repeat_interleave")
def _repeat_interleave(step: Step) -> Tensor:
    x, times, dim = step.args[0], step.args[1], step.arg(2, "dim")
    if dim is None or isinstance(times, Tensor):
        return step.freeze_all("it is repeated as often as a tensor says, or flattened")[0]
    return relations.gather(step.facts, x, dim % len(x.shape), np.repeat(np.arange(x.shape[dim]), times))


SLICING = frozenset(["__getitem__", "__setitem__", "narrow", "slice"])


@rule("slice")
def _slice(step: Step) -> Tensor:
    x = step.args[0]
    dim = step.arg(1, "dim", 0) % len(x.shape)
    given = step.arg(2, "start"), step.arg(3, "end")
    start, end, stride = slice(*given, step.arg(4, "step", 1)).indices(x.shape[dim])
    index = np.arange(start, end, stride)
    axis = x.axes[dim]
    name = step.call.name if step.call is not None else ""
    if axis is not None and stride != 1:
        step.facts.freeze(axis, "it is sliced with a stride")
    elif axis is not None and any(isinstance(at, int) and at < 0 for at in given):
        step.facts.freeze(axis, "it is sliced from its end by a number")
    elif axis is not None and name not in SLICING:
        step.facts.freeze(axis, "the parts that are taken of it are computed elsewhere")
    elif axis is not None:
        for at in (start, end):
            number = border(step, start, end, at)
            # The number of indices kept before the border must be the number that the code says. Only an index may
            # reach beyond the end.
            if 0 < at < len(axis) or (at == len(axis) and (name == "narrow" or isinstance(number, TracedInt))):
                step.follow(axis[:at], number)
    return relations.gather(step.facts, x, dim, index)


@rule("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split")
def _split(step: Step) -> list[Tensor]:
    x = step.args[0]
    dim = step.arg(2, "dim", 0) % len(x.shape)
    axis = x.axes[dim]
    borders = np.cumsum([0, *(shape[dim] for shape in step.shapes)])
    parts = [np.arange(a, b) for a, b in itertools.pairwise(borders)]
    if axis is not None:
        _follow_parts(step, axis, parts)
    return [relations.gather(step.facts, x, dim, part) for part in parts]


def _follow_parts(step: Step, axis: Labels, parts: list[NDArray[np.int64]]) -> None:
    """See to it that the parts come out as they do now when the code splits what is left of the axis."""
    name = step.call.name if step.call is not None else ""
    second = [step.given(1, word) for word in ("split_size_or_sections", "split_size", "split_sizes", "chunks")]
    given = next((value for value in second if value is not None), None)
    equal = len({len(part) for part in parts}) == 1
    if name in ("split", "split_with_sizes") and isinstance(given, tuple) and len(given) == len(parts):
        for part, size in zip(parts, given, strict=True):
            step.follow(axis[part], size)
    elif equal and (name == "split" or (name == "chunk" and given == len(parts))):
        for part in parts[1:]:
            step.facts.equate(axis[parts[0]], axis[part])
        if name == "split":
            step.follow(axis[parts[0]], given)
    else:
        step.facts.freeze(axis, "it is split into parts that the code computes")


@rule("pad", "constant_pad_nd")
def _pad(step: Step) -> Tensor:
    x: Tensor = step.args[0]
    amounts = step.args[1]
    given = step.given(1, "pad")
    known = given if isinstance(given, (tuple, list)) and len(given) == len(amounts) else [None] * len(amounts)
    constant = step.arg(2, "mode", "constant") == "constant" or step.name == "constant_pad_nd"
    out = x
    for pair in range(len(amounts) // 2):
        dim = len(x.shape) - 1 - pair
        before, after = amounts[2 * pair], amounts[2 * pair + 1]
        if not before and not after:
            continue
        if min(before, after) < 0 or (not constant and out.axes[dim] is not None):
            relations.freeze(step.facts, [out], "it is cropped, or padded with its own values", [dim])
        size = out.shape[dim] + before + after
        shape = [size if position == dim else n for position, n in enumerate(out.shape)]
        if out.axes[dim] is None or min(before, after) < 0:
            out = Tensor.of(shape, [None if position == dim else a for position, a in enumerate(out.axes)])
        else:
            sides = [_padding(step, n, known[2 * pair + k]) for k, n in enumerate((before, after))]
            axis = np.concatenate([sides[0], out.axes[dim], sides[1]])
            out = Tensor.of(shape, [axis if position == dim else a for position, a in enumerate(out.axes)])
    return out


def _padding(step: Step, amount: int, given: Any) -> Any:
    """Labels of the padding of one side: free where the amount is an attribute, else such that cannot go."""
    if not isinstance(given, TracedInt) or amount == 0:
        return np.zeros(amount, np.int64)
    return step.follow(step.facts.fresh(amount), given)
