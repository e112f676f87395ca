"""Keep the scale of attention when the width of its heads changes.

`scaled_dot_product_attention` without an explicit scale multiplies the attention scores by width ** -0.5. To keep the
trained scale after a cut, the rows of the weights, biases or gains that compute the queries are multiplied by
sqrt(new width / old width). The rows are found by following the graph back from the queries through operations that
move values or are linear; if that fails, the width is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.node import Node, map_arg

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kirsch.graph.labels import Labels

_MOVES = """
view reshape _unsafe_view unflatten flatten squeeze unsqueeze permute transpose expand select slice split
split_with_sizes chunk unbind unsafe_chunk unsafe_split contiguous clone getitem roll flip
"""
MOVES = frozenset(_MOVES.split())
SCALES = frozenset(["mul", "div"])
SUMS = frozenset(["add", "sub", "cat", "stack", "neg"])
PRODUCERS = {
    "linear": (1, 2, -1),
    "conv1d": (1, 2, 1),
    "conv2d": (1, 2, 1),
    "layer_norm": (2, 3, -1),
    "rms_norm": (2, 3, -1),
}
"""Operator → positions of weight and bias in its arguments, and the output axis with one entry for each weight row."""


@dataclass(frozen=True)
class QueryScaling:
    """Rows of parameters that are multiplied by sqrt(new width / old width) when a part of the width is removed.

    Args:
        width: labels of the axis whose size sets the scale.
        rows: path of a parameter → indices of the rows along its first axis.
        attribute: path of a module, and the name of its attribute with the scale, which gets the value for the new
            width; None if the scale follows from the shapes.
    """

    width: Labels
    rows: dict[str, tuple[int, ...]]
    attribute: tuple[str, str] | None = None


def query_scaling(attention: Node, width: Labels, slots: Mapping[str, str], query: Any = None) -> QueryScaling | None:
    """Return the rows that must be multiplied to preserve the scale when the width changes.

    Args:
        attention: node of `scaled_dot_product_attention`, or of another product of queries and keys.
        width: labels of the last axis of the queries.
        slots: graph input → path of its parameter or buffer.
        query: node of the queries; None: the first argument of the attention.

    Returns:
        The rows; None if multiplying rows cannot preserve the scale.
    """
    query = attention.args[0] if query is None else query
    if len(query.users) > 1 or next(iter(query.users)).args.count(query) > 1:
        return None
    between: set[Node] = set()
    producer = _producer_of(query, between)
    if producer is None:
        return None
    path = [node for node in attention.graph.nodes if node in between]
    weight, bias, axis = PRODUCERS[name_of(producer)]
    rows = _rows_used(producer, path, query, axis)
    before = [node for node in (producer, *path) if node is not query]
    others = [user for node in before for user in node.users if user not in between]
    for other in others:
        if name_of(other) not in MOVES or rows & _rows_used(producer, [*path, other], other, axis):
            return None
    rows_by_parameter: dict[str, tuple[int, ...]] = {}
    for position in (weight, bias):
        source: Any = producer.args[position] if len(producer.args) > position else None
        if not isinstance(source, Node) and position == bias:
            continue
        for part, part_rows in _graph_inputs(source, rows):
            if part.op != "placeholder" or part.name not in slots or len(part.users) > 1:
                return None
            rows_by_parameter[slots[part.name]] = tuple(sorted(part_rows))
    return QueryScaling(width, rows_by_parameter)


def name_of(node: Node) -> str:
    """Return the name of the operation of a node, without its overload."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _producer_of(node: Node, between: set[Node]) -> Node | None:
    """Return the operation of `PRODUCERS` on which a value depends linearly; None if there is none, or several.

    The nodes from that operation to the value are added to `between`.
    """
    name = name_of(node)
    if node.op != "call_function":
        return None
    if name in PRODUCERS:
        return node
    produced = [source for source in node.all_input_nodes if _has_producer(source)]
    if name in SCALES:  # a square is not linear, nor is a quotient in its divisor
        linear = (
            len(produced) == 1 and node.args.count(produced[0]) == 1 and (name == "mul" or produced[0] is node.args[0])
        )
    elif name in SUMS:  # adding a constant or another tensor is not linear
        number = name in ("add", "sub") and not all(isinstance(value, Node) for value in node.args)
        linear = len(produced) == len(node.all_input_nodes) and not number
    else:
        linear = name in MOVES
    if not linear:
        return None
    between.add(node)
    producers = {_producer_of(source, between) for source in produced}
    return producers.pop() if len(producers) == 1 else None


def _has_producer(node: Node) -> bool:
    """Return whether a producer is upstream of a value."""
    seen, stack = set[Node](), [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            if current.op == "call_function" and name_of(current) in PRODUCERS:
                return True
            stack += current.all_input_nodes
    return False


def _rows_used(producer: Node, path: list[Node], end: Node, axis: int) -> set[int]:
    """Return the rows of a producer that affect `end`: those with a gradient other than 0 at random values."""
    values: dict[Node, Any] = {}

    def value(node: Node) -> Any:
        known = values.get(node)
        return torch.rand(node.meta["val"].shape) + 0.5 if known is None else known

    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        start = values[producer] = torch.ones(producer.meta["val"].shape, requires_grad=True)
        for node in path:
            args, options = map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **options)  # type: ignore[operator]  # only call_function nodes are on the path
        out = values[end]
        parts = out if isinstance(out, (list, tuple)) else [out]
        total = torch.stack([(part * torch.rand(part.shape)).sum() for part in parts]).sum()
        (gradient,) = torch.autograd.grad(total, start, allow_unused=True)
    if gradient is None:
        return set()
    by_row = gradient.movedim(axis, 0).flatten(1).abs().sum(1)
    return set(by_row.nonzero().flatten().tolist())


def _graph_inputs(source: Node, rows: set[int]) -> Iterator[tuple[Node, set[int]]]:
    """Yield each graph input that holds some rows of a weight or bias, with the indices of these rows in the input.

    The weight or bias may be a concatenation of graph inputs.
    """
    if source.op == "call_function" and name_of(source) == "cat" and len(source.users) == 1:
        first = 0
        for part in source.args[0]:  # type: ignore[union-attr]
            size = part.meta["val"].shape[0]  # type: ignore[union-attr]
            part_rows = {row - first for row in rows if first <= row < first + size}
            if part_rows:
                yield from _graph_inputs(part, part_rows)  # type: ignore[arg-type]
            first += size
    else:
        yield source, rows
