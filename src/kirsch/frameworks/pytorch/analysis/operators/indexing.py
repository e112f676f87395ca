"""Operators that read or write the places that a tensor of indices names, and those for which order matters."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kirsch.frameworks.pytorch.analysis.operation import axes_of
from kirsch.frameworks.pytorch.analysis.operators.rule import rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.frameworks.pytorch.analysis.operation import Step
    from kirsch.graph.labels import Axis

CHOSEN = "a tensor of indices chooses from it"


@rule("embedding")
def _embedding(step: Step) -> Tensor:
    table, indices = step.args[0], step.args[1]
    _choose(step, table, 0, indices)
    step.facts.mark(table.axes[1], "embedded")
    return Tensor.of(step.shape, [*indices.axes, table.axes[1]])


def _choose(step: Step, x: Tensor, dim: int, index: Tensor) -> None:
    """An index chooses from an axis, which cannot go then, unless the index holds positions on this very axis."""
    if index.points is None:
        relations.freeze(step.facts, [x], CHOSEN, [dim])
    else:
        axis = step.facts.equate(x.axes[dim], index.points)
        step.facts.reduce(axis)
        if step.is_weight(x):
            step.facts.mark(axis, "expert")


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(step: Step) -> list[Tensor]:
    table = step.args[0]
    relations.freeze(step.facts, [table], CHOSEN, [0])
    relations.freeze(step.facts, step.tensors()[1:], CHOSEN)
    step.facts.mark(table.axes[1], "embedded")
    return [Tensor.of(step.shape, [None, table.axes[1]]), *(Tensor.of(shape) for shape in step.shapes[1:])]


@rule("index", "_unsafe_index")
def _index(step: Step) -> Tensor:
    """x[indices]: the axes of the index tensors stand in the place of those that they choose from."""
    x, indices = step.args[0], step.args[1]
    chosen = [dim for dim, index in enumerate(indices) if index is not None]
    picked = _picked(step, [indices[dim] for dim in chosen])
    rest = [axis for dim, axis in enumerate(x.axes) if dim not in chosen]
    for dim in chosen:
        _choose(step, x, dim, indices[dim])
    together = chosen[-1] - chosen[0] + 1 == len(chosen)
    place = chosen[0] if together else 0
    axes = [*rest[:place], *picked, *rest[place:]]
    if len(axes) != len(step.shape):
        return step.freeze_all("a mask chooses from it")[0]
    return Tensor.of(step.shape, axes)


def _picked(step: Step, indices: Sequence[Tensor]) -> tuple[Axis, ...]:
    """The axes of several index tensors, broadcast against one another."""
    shape = np.broadcast_shapes(*(index.shape for index in indices))
    return relations.elementwise(step.facts, indices, shape).axes


@rule("index_select")
def _index_select(step: Step) -> Tensor:
    x, dim, index = step.args[0], step.args[1] % len(step.shape), step.args[2]
    relations.freeze(step.facts, [x], CHOSEN, [dim])
    chosen = index.axes[0] if index.axes else None
    return Tensor.of(step.shape, [chosen if place == dim else axis for place, axis in enumerate(x.axes)])


@rule("gather", "take_along_dim")
def _gather(step: Step) -> Tensor:
    """The index has a place for each number that comes out, so it follows the axes that it does not choose from."""
    x, index = step.args[0], step.args[1] if step.name == "take_along_dim" else step.args[2]
    dim = step.arg(2, "dim") if step.name == "take_along_dim" else step.args[1]
    if dim is None:
        return step.freeze_all(CHOSEN)[0]
    dim %= len(step.shape)
    _choose(step, x, dim, index)
    shorter = [place for place, (n, m) in enumerate(zip(x.shape, step.shape, strict=True)) if n != m and place != dim]
    relations.freeze(step.facts, [x], "an index covers part of it", shorter)
    rest = [None if place == dim or place in shorter else axis for place, axis in enumerate(x.axes)]
    stays = Tensor.of([1 if place == dim or place in shorter else n for place, n in enumerate(step.shape)], rest)
    return relations.elementwise(step.facts, [index, stays], step.shape)


@rule("index_put", "_unsafe_index_put")
def _index_put(step: Step) -> Tensor:
    """x[indices] = values, with the indices on the first axes."""
    x, indices, values = step.args[:3]
    count = len(indices)
    if any(index is None or len(index.shape) > 1 for index in indices):  # a mask covers as many axes as it has
        return step.freeze_all("it is written to where a tensor of indices says")[0]
    relations.freeze(step.facts, [x], "it is written to where a tensor of indices says", range(count))
    relations.freeze(step.facts, indices, "it says where to write")
    rest = Tensor.of(x.shape[count:], x.axes[count:])
    tail = max(len(values.shape) - len(rest.shape), 0)
    relations.freeze(step.facts, [values], "it is written to where a tensor of indices says", range(tail))
    written = Tensor.of(values.shape[tail:], values.axes[tail:])
    axes = relations.elementwise(step.facts, [rest, written], rest.shape).axes
    return Tensor.of(step.shape, [*[None] * count, *axes])


@rule("index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce", "index_fill", "index_reduce")
def _scatter(step: Step) -> Tensor:
    x, dim, index = step.args[0], step.args[1] % len(step.shape), step.args[2]
    source = step.args[3] if len(step.args) > 3 and isinstance(step.args[3], Tensor) else None  # noqa: PLR2004 - the fourth
    written = [tensor for tensor in (x, source) if tensor is not None]
    relations.freeze(step.facts, [t for t in written if t.shape], "it is written to where indices say", [dim])
    if step.name.startswith("scatter"):  # the index has a place for each number that is written
        written.append(index)
        relations.freeze(step.facts, [index], "it is written to where indices say", [dim])
    else:
        relations.freeze(step.facts, [index], "it is written to where indices say")
    axes = list(x.axes)
    for other in written[1:]:
        for place, axis in enumerate(other.axes):
            if place != dim and other.shape[place] == step.shape[place]:
                axes[place] = step.facts.equate(axes[place], axis)
            elif place != dim:
                step.facts.freeze(axis, "part of an axis is written to")
                step.facts.freeze(axes[place], "part of an axis is written to")
    return Tensor.of(step.shape, [None if place == dim else axis for place, axis in enumerate(axes)])


@rule("slice_scatter")
def _slice_scatter(step: Step) -> Tensor:
    """x[start:end:step] = part along one axis: a cut of that axis would move the borders."""
    x, part = step.args[:2]
    dim = step.arg(2, "dim", 0) % len(step.shape)
    relations.freeze(step.facts, [x, part], "a part of it is written to by number", [dim])
    lead = [None if place == dim else axis for place, axis in enumerate(x.axes)]
    axes = [None if i == dim else step.facts.equate(axis, part.axes[i]) for i, axis in enumerate(lead)]
    return Tensor.of(step.shape, axes)


@rule("select_scatter")
def _select_scatter(step: Step) -> Tensor:
    x, part = step.args[:2]
    dim = step.args[2] % len(step.shape)
    relations.freeze(step.facts, [x], "an index of it is written to by number", [dim])
    rest = [axis for place, axis in enumerate(x.axes) if place != dim]
    axes = [step.facts.equate(axis, own) for axis, own in zip(rest, part.axes, strict=True)]
    return Tensor.of(step.shape, [*axes[:dim], None, *axes[dim:]])


@rule("topk")
def _topk(step: Step) -> Tensor | list[Tensor]:
    x, k = step.args[:2]
    dim = step.arg(2, "dim", -1) % len(x.shape)
    if step.softmax != "kept" or x.axes[dim] is None:
        return _ordered(step)
    step.facts.floor(x.axes[dim], k)
    step.facts.statistic([x.axes[dim]])
    step.facts.reduce(x.axes[dim])
    axes = [None if place == dim else axis for place, axis in enumerate(x.axes)]
    values, places = (Tensor.of(shape, axes) for shape in step.shapes)
    return [values, replace(places, points=x.axes[dim])]


@rule("histc")
def _histc(step: Step) -> Tensor:
    """How often each position on an axis occurs: one number for each, if the bins are the positions."""
    x, bins = step.args[0], step.arg(1, "bins", 100)
    relations.freeze(step.facts, [x], "all of it is counted")
    points, number, last = x.points, step.given(1, "bins"), step.given(3, "max")
    if points is None or (bins, step.arg(2, "min", 0), step.arg(3, "max", 0)) != (len(points), 0, len(points) - 1):
        step.facts.freeze(points, CHOSEN)
        return Tensor.of(step.shape)
    step.follow(points, number)
    step.follow(points, last, 1)
    return Tensor.of(step.shape, [points])


@rule("cumsum")
def _cumsum(step: Step) -> Tensor | list[Tensor]:
    x, dim = step.args[0], step.args[1] % max(len(step.shape), 1)
    if step.softmax != "kept" or not x.shape:
        return _ordered(step)
    step.facts.statistic([x.axes[dim]])
    return Tensor.of(step.shape, x.axes)


@rule("cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "kthvalue", "argmax", "argmin")
def _ordered(step: Step) -> list[Tensor]:
    x = step.args[0]
    rank = len(x.shape)
    place = 2 if step.name in ("topk", "kthvalue") else 1
    dim = step.arg(place, "dim", None if step.name in ("argmax", "argmin") else -1)
    dims = axes_of(dim, rank)
    relations.freeze(step.facts, [x], "the order along it matters", dims)
    kept = [None if place in dims else axis for place, axis in enumerate(x.axes)]
    if len(step.shape) < rank:
        kept = [axis for place, axis in enumerate(kept) if place not in dims]
    return [Tensor.of(shape, kept) for shape in step.shapes]


@rule("tril", "triu")
def _triangle(step: Step) -> Tensor:
    x = step.args[0]
    relations.freeze(step.facts, [x], "a triangle of it is kept", [-2, -1])
    return Tensor.of(step.shape, [*x.axes[:-2], None, None])
