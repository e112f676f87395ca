"""A traced operation as a call with integers, for models that are cut as a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from kirsch.frameworks.pytorch.analysis.integers import TracedInt
from kirsch.frameworks.pytorch.analysis.program import name_of
from kirsch.frameworks.pytorch.analysis.provenance import Call
from kirsch.graph.expression import Leaf

if TYPE_CHECKING:
    from torch.fx import Node

OPEN = 2**31
"""What the end of a slice is that has none lies beyond."""


def call_of(node: Node) -> Call:
    """The operation itself as the call that gives its integers: each is an attribute of its own, of the node."""

    def numbered(value: Any, at: str, place: int | None = None) -> Any:
        if type(value) is int and 0 <= value < OPEN:
            return TracedInt.leaf(value, Leaf(node.name, at, place), [])
        if isinstance(value, (list, tuple)) and place is None:
            return tuple(numbered(item, at, number) for number, item in enumerate(value))
        return None if isinstance(value, fx.Node) else value

    arguments = tuple(numbered(value, str(place)) for place, value in enumerate(node.args))
    return Call(
        name_of(node).removeprefix("aten."),
        arguments,
        {key: numbered(value, key) for key, value in node.kwargs.items()},
    )
