"""The operations of each module in a traced program, and the output of each module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_leaves

from kirsch.frameworks.pytorch.analysis.program import ASSERTIONS, name_of
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.fx import Node


def regions(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """Return the region of each module, keyed by path: the operations of all its calls, with those of inner modules."""
    operations: dict[str, list[Node]] = {}
    for node in nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            operations.setdefault(str(path).split("@")[0], []).append(node)
    return operations


def exits(region: Sequence[Node]) -> list[Node]:
    """Return those operations of a region that have users outside of the region. Assertions do not count as users."""
    inside = set(region)
    return [node for node in region if any(user not in inside and _reads(user) for user in node.users)]


def _reads(user: Node) -> bool:
    return user.op != "call_function" or name_of(user).removeprefix("aten.") not in ASSERTIONS


def module_outputs(states: Mapping[Node, Any]) -> dict[str, tuple[Tensor, ...]]:
    """Return the output tensors of each module, with coupling labels, keyed by module path.

    Args:
        states: labels of the result of each node.
    """
    return {
        path: tuple(leaf for node in nodes for leaf in tree_leaves(states[node]) if isinstance(leaf, Tensor))
        for path, nodes in ((path, exits(region)) for path, region in regions(states).items() if path)
    }
