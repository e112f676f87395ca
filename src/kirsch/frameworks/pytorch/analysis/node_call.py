"""A graph node as a `UserCall` with traced integers, for models that are cut as a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from kirsch.frameworks.pytorch.analysis.integers import TracedInt
from kirsch.frameworks.pytorch.analysis.program import name_of
from kirsch.frameworks.pytorch.analysis.provenance import UserCall
from kirsch.graph.expression import Leaf

if TYPE_CHECKING:
    from torch.fx import Node

OPEN = 2**31
"""Integers of at least this value stand for the end of a slice whose end is not stated."""


def call_of(node: Node) -> UserCall:
    """Return a node as a call; each of its integers is traced as an attribute of the node."""

    def traced(value: Any, attribute: str, index: int | None = None) -> Any:
        if type(value) is int and 0 <= value < OPEN:
            return TracedInt.leaf(value, Leaf(node.name, attribute, index), [])
        if isinstance(value, (list, tuple)) and index is None:
            return tuple(traced(item, attribute, number) for number, item in enumerate(value))
        return None if isinstance(value, fx.Node) else value

    return UserCall(
        name_of(node).removeprefix("aten."),
        tuple(traced(value, str(position)) for position, value in enumerate(node.args)),
        {key: traced(value, key) for key, value in node.kwargs.items()},
    )
