"""Rules of operators that take a tensor of indices, or whose result depends on the order of entries."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kirsch.frameworks.pytorch.analysis.operation import dims_of
from kirsch.frameworks.pytorch.analysis.operators.rule import rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.frameworks.pytorch.analysis.operation import OperationContext
    from kirsch.graph.labels import Axis

INDEXED = "the axis is indexed by a tensor"
WRITTEN = "values are written to the positions that a tensor of indices gives (scatter)"


@rule("embedding")
def _embedding(op: OperationContext) -> Tensor:
    table, indices = op.args[0], op.args[1]
    _select_by(op, table, 0, indices)
    op.facts.mark(table.axes[1], "embedded")
    return Tensor.of(op.shape, [*indices.axes, table.axes[1]])


def _select_by(op: OperationContext, x: Tensor, dim: int, index: Tensor) -> None:
    """Freeze an axis that is indexed by a tensor, unless the tensor holds indices into this labeled axis."""
    if index.points is None:
        relations.freeze(op.facts, [x], INDEXED, [dim])
    else:
        axis = op.facts.equate(x.axes[dim], index.points)
        op.facts.reduce(axis)
        if op.is_weight(x):
            op.facts.mark(axis, "expert")


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(op: OperationContext) -> list[Tensor]:
    table = op.args[0]
    relations.freeze(op.facts, [table], INDEXED, [0])
    relations.freeze(op.facts, op.tensors()[1:], INDEXED)
    op.facts.mark(table.axes[1], "embedded")
    return [Tensor.of(op.shape, [None, table.axes[1]]), *(Tensor.of(shape) for shape in op.shapes[1:])]


@rule("index", "_unsafe_index")
def _index(op: OperationContext) -> Tensor:
    """x[indices]: the axes of the index tensors replace the indexed axes."""
    x, indices = op.args[0], op.args[1]
    indexed = [dim for dim, index in enumerate(indices) if index is not None]
    selected = _broadcast(op, [indices[dim] for dim in indexed])
    rest = [axis for dim, axis in enumerate(x.axes) if dim not in indexed]
    for dim in indexed:
        _select_by(op, x, dim, indices[dim])
    adjacent = indexed[-1] - indexed[0] + 1 == len(indexed)
    position = indexed[0] if adjacent else 0
    axes = [*rest[:position], *selected, *rest[position:]]
    if len(axes) != len(op.shape):
        return op.freeze_all("a mask selects from the axis")[0]
    return Tensor.of(op.shape, axes)


def _broadcast(op: OperationContext, indices: Sequence[Tensor]) -> tuple[Axis, ...]:
    """Return the axes of several index tensors after broadcasting."""
    shape = np.broadcast_shapes(*(index.shape for index in indices))
    return relations.elementwise(op.facts, indices, shape).axes


@rule("index_select")
def _index_select(op: OperationContext) -> Tensor:
    x, dim, index = op.args[0], op.args[1] % len(op.shape), op.args[2]
    relations.freeze(op.facts, [x], INDEXED, [dim])
    selected = index.axes[0] if index.axes else None
    return Tensor.of(op.shape, [selected if position == dim else axis for position, axis in enumerate(x.axes)])


@rule("gather", "take_along_dim")
def _gather(op: OperationContext) -> Tensor:
    """The index has the shape of the result. Its axes except `dim` correspond to the axes of x, and may be shorter."""
    x, index = op.args[0], op.args[1] if op.name == "take_along_dim" else op.args[2]
    dim = op.arg(2, "dim") if op.name == "take_along_dim" else op.args[1]
    if dim is None:
        return op.freeze_all(INDEXED)[0]
    dim %= len(op.shape)
    _select_by(op, x, dim, index)
    shorter = [
        position for position, (n, m) in enumerate(zip(x.shape, op.shape, strict=True)) if n != m and position != dim
    ]
    relations.freeze(op.facts, [x], "the index covers only a part of the axis", shorter)
    rest = [None if position == dim or position in shorter else axis for position, axis in enumerate(x.axes)]
    others = Tensor.of(
        [1 if position == dim or position in shorter else n for position, n in enumerate(op.shape)], rest
    )
    return relations.elementwise(op.facts, [index, others], op.shape)


@rule("index_put", "_unsafe_index_put")
def _index_put(op: OperationContext) -> Tensor:
    """x[indices] = values, where the indices belong to the first axes of x."""
    x, indices, values = op.args[:3]
    count = len(indices)
    if any(index is None or len(index.shape) > 1 for index in indices):  # a mask may cover several axes
        return op.freeze_all(WRITTEN)[0]
    relations.freeze(op.facts, [x], WRITTEN, range(count))
    relations.freeze(op.facts, indices, "the axis holds the indices to write to")
    rest = Tensor.of(x.shape[count:], x.axes[count:])
    tail = max(len(values.shape) - len(rest.shape), 0)
    relations.freeze(op.facts, [values], WRITTEN, range(tail))
    written = Tensor.of(values.shape[tail:], values.axes[tail:])
    axes = relations.elementwise(op.facts, [rest, written], rest.shape).axes
    return Tensor.of(op.shape, [*[None] * count, *axes])


@rule("index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce", "index_fill", "index_reduce")
def _scatter(op: OperationContext) -> Tensor:
    x, dim, index = op.args[0], op.args[1] % len(op.shape), op.args[2]
    source = op.args[3] if len(op.args) > 3 and isinstance(op.args[3], Tensor) else None  # noqa: PLR2004 - the fourth
    written = [tensor for tensor in (x, source) if tensor is not None]
    relations.freeze(op.facts, [t for t in written if t.shape], WRITTEN, [dim])
    if op.name.startswith("scatter"):  # the index has the shape of the written values
        written.append(index)
        relations.freeze(op.facts, [index], WRITTEN, [dim])
    else:
        relations.freeze(op.facts, [index], WRITTEN)
    axes = list(x.axes)
    for other in written[1:]:
        for position, axis in enumerate(other.axes):
            if position != dim and other.shape[position] == op.shape[position]:
                axes[position] = op.facts.equate(axes[position], axis)
            elif position != dim:
                op.facts.freeze(axis, "only a part of the axis is written to")
                op.facts.freeze(axes[position], "only a part of the axis is written to")
    return Tensor.of(op.shape, [None if position == dim else axis for position, axis in enumerate(axes)])


@rule("slice_scatter")
def _slice_scatter(op: OperationContext) -> Tensor:
    """x[start:end:step] = part; a cut of the sliced axis would move the bounds."""
    x, part = op.args[:2]
    dim = op.arg(2, "dim", 0) % len(op.shape)
    relations.freeze(op.facts, [x, part], "a fixed range of the axis is overwritten", [dim])
    others = [None if position == dim else axis for position, axis in enumerate(x.axes)]
    axes = [None if i == dim else op.facts.equate(axis, part.axes[i]) for i, axis in enumerate(others)]
    return Tensor.of(op.shape, axes)


@rule("select_scatter")
def _select_scatter(op: OperationContext) -> Tensor:
    x, part = op.args[:2]
    dim = op.args[2] % len(op.shape)
    relations.freeze(op.facts, [x], "a fixed index of the axis is overwritten", [dim])
    rest = [axis for position, axis in enumerate(x.axes) if position != dim]
    axes = [op.facts.equate(axis, written) for axis, written in zip(rest, part.axes, strict=True)]
    return Tensor.of(op.shape, [*axes[:dim], None, *axes[dim:]])


@rule("topk")
def _topk(op: OperationContext) -> Tensor | list[Tensor]:
    x, k = op.args[:2]
    dim = op.arg(2, "dim", -1) % len(x.shape)
    if op.softmax != "kept" or x.axes[dim] is None:
        return _ordered(op)
    op.facts.floor(x.axes[dim], k)
    op.facts.statistic([x.axes[dim]])
    op.facts.reduce(x.axes[dim])
    axes = [None if position == dim else axis for position, axis in enumerate(x.axes)]
    values, indices = (Tensor.of(shape, axes) for shape in op.shapes)
    return [values, replace(indices, points=x.axes[dim])]


@rule("histc")
def _histc(op: OperationContext) -> Tensor:
    """A histogram of indices into a labeled axis keeps its labels if there is one bin for each index of the axis."""
    x, bins = op.args[0], op.arg(1, "bins", 100)
    relations.freeze(op.facts, [x], "a histogram is computed over the axis")
    points, stated_bins, stated_max = x.points, op.traced_arg(1, "bins"), op.traced_arg(3, "max")
    if points is None or (bins, op.arg(2, "min", 0), op.arg(3, "max", 0)) != (len(points), 0, len(points) - 1):
        op.facts.freeze(points, INDEXED)
        return Tensor.of(op.shape)
    op.tie_size(points, stated_bins)
    op.tie_size(points, stated_max, 1)
    return Tensor.of(op.shape, [points])


@rule("cumsum")
def _cumsum(op: OperationContext) -> Tensor | list[Tensor]:
    x, dim = op.args[0], op.args[1] % max(len(op.shape), 1)
    if op.softmax != "kept" or not x.shape:
        return _ordered(op)
    op.facts.statistic([x.axes[dim]])
    return Tensor.of(op.shape, x.axes)


@rule("cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort", "kthvalue", "argmax", "argmin")
def _ordered(op: OperationContext) -> list[Tensor]:
    x = op.args[0]
    rank = len(x.shape)
    position = 2 if op.name in ("topk", "kthvalue") else 1
    dim = op.arg(position, "dim", None if op.name in ("argmax", "argmin") else -1)
    dims = dims_of(dim, rank)
    relations.freeze(op.facts, [x], "the result depends on the order along the axis", dims)
    kept = [None if position in dims else axis for position, axis in enumerate(x.axes)]
    if len(op.shape) < rank:
        kept = [axis for position, axis in enumerate(kept) if position not in dims]
    return [Tensor.of(shape, kept) for shape in op.shapes]


@rule("tril", "triu")
def _triangle(op: OperationContext) -> Tensor:
    x = op.args[0]
    relations.freeze(op.facts, [x], "only a triangle of the matrix is kept", [-2, -1])
    return Tensor.of(op.shape, [*x.axes[:-2], None, None])
