"""Attention whose scale PyTorch computes from the width of a head: a narrower head would be scaled otherwise.

`scaled_dot_product_attention` without a scale takes width ** -0.5. The trained value is kept by folding the difference
into the rows of the weights, biases or gains that make the queries and nothing else. They are found by going back from
the attention through operations that move numbers or are linear in them; where that fails, the width is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.node import Node, map_arg

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kirsch.graph.labels import Labels

MOVING = """
view reshape _unsafe_view unflatten flatten squeeze unsqueeze permute transpose expand select slice split
split_with_sizes chunk unbind unsafe_chunk unsafe_split contiguous clone getitem roll flip
"""
MOVES = frozenset(MOVING.split())
SCALES = frozenset(["mul", "div"])
SUMS = frozenset(["add", "sub", "cat", "stack", "neg"])
PRODUCERS = {
    "linear": (1, 2, -1),
    "conv1d": (1, 2, 1),
    "conv2d": (1, 2, 1),
    "layer_norm": (2, 3, -1),
    "rms_norm": (2, 3, -1),
}
"""Operator → places of weight and bias among its arguments, and the axis of its result that their rows lie along."""


@dataclass(frozen=True)
class Fold:
    """Rows that are multiplied by sqrt(kept / width) when a part of the width goes.

    Args:
        width: labels of the axis that the scale is computed from.
        rows: parameter → rows along its first axis.
    """

    width: Labels
    rows: dict[str, tuple[int, ...]]


def fold(attention: Node, width: Labels, slots: Mapping[str, str]) -> Fold | None:
    """How the scale of an attention is kept when a part of its width goes; None where that cannot be.

    Args:
        attention: a node of `scaled_dot_product_attention`.
        width: labels of the last axis of its queries.
        slots: graph input → path of the parameter or buffer that it takes.
    """
    query: Any = attention.args[0]
    if len(query.users) > 1 or attention.args.count(query) > 1:
        return None
    between: set[Node] = set()
    producer = _back(query, between)
    if producer is None:
        return None
    path = [node for node in attention.graph.nodes if node in between]
    weight, bias, axis = PRODUCERS[_name(producer)]
    rows = _reached(producer, path, query, axis)
    before = [node for node in (producer, *path) if node is not query]
    aside = [user for node in before for user in node.users if user not in between]
    for other in aside:
        if _name(other) not in MOVES or rows & _reached(producer, [*path, other], other, axis):
            return None
    found: dict[str, tuple[int, ...]] = {}
    for place in (weight, bias):
        source: Any = producer.args[place] if len(producer.args) > place else None
        if not isinstance(source, Node) and place == bias:
            continue
        for part, of_part in _pieces(source, rows):
            if part.op != "placeholder" or part.name not in slots or len(part.users) > 1:
                return None
            found[slots[part.name]] = tuple(sorted(of_part))
    return Fold(width, found)


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _back(node: Node, between: set[Node]) -> Node | None:
    """The one producer from which a value comes, None if there is none; notes the nodes on the way."""
    name = _name(node)
    if node.op != "call_function":
        return None
    if name in PRODUCERS:
        return node
    made = [source for source in node.all_input_nodes if _made(source)]
    if name in SCALES:  # by something else; a square is not linear, nor is what is divided by
        linear = len(made) == 1 and node.args.count(made[0]) == 1 and (name == "mul" or made[0] is node.args[0])
    elif name in SUMS:  # of nothing else, not of a number either
        number = name in ("add", "sub") and not all(isinstance(value, Node) for value in node.args)
        linear = len(made) == len(node.all_input_nodes) and not number
    else:
        linear = name in MOVES
    if not linear:
        return None
    between.add(node)
    ends = {_back(source, between) for source in made}
    return ends.pop() if len(ends) == 1 else None


def _made(node: Node) -> bool:
    """Whether a producer lies upstream of a value."""
    seen, stack = set[Node](), [node]
    while stack:
        one = stack.pop()
        if one not in seen:
            seen.add(one)
            if one.op == "call_function" and _name(one) in PRODUCERS:
                return True
            stack += one.all_input_nodes
    return False


def _reached(producer: Node, path: list[Node], end: Node, axis: int) -> set[int]:
    """The rows of a producer on which the value at the end depends, found by the gradient of a stand-in."""
    values: dict[Node, Any] = {}

    def value(node: Node) -> Any:
        known = values.get(node)
        return torch.rand(node.meta["val"].shape) + 0.5 if known is None else known

    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        start = values[producer] = torch.ones(producer.meta["val"].shape, requires_grad=True)
        for node in path:
            args, options = map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **options)  # type: ignore[operator]  # only nodes that call
        out = values[end]
        parts = out if isinstance(out, (list, tuple)) else [out]
        whole = torch.stack([(part * torch.rand(part.shape)).sum() for part in parts]).sum()
        (slope,) = torch.autograd.grad(whole, start, allow_unused=True)
    if slope is None:
        return set()
    moved = slope.movedim(axis, 0).flatten(1).abs().sum(1)
    return set(moved.nonzero().flatten().tolist())


def _pieces(source: Node, rows: set[int]) -> Iterator[tuple[Node, set[int]]]:
    """The inputs of the graph that hold these rows of a weight or bias, which may be laid end to end of several."""
    if source.op == "call_function" and _name(source) == "cat" and len(source.users) == 1:
        first = 0
        for part in source.args[0]:  # type: ignore[union-attr]
            size = part.meta["val"].shape[0]  # type: ignore[union-attr]
            own = {row - first for row in rows if first <= row < first + size}
            if own:
                yield from _pieces(part, own)  # type: ignore[arg-type]
            first += size
    else:
        yield source, rows
