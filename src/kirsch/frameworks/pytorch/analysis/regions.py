"""Which operations of a traced program belong to which module, and what each module puts out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch.frameworks.pytorch.analysis.program import ASSERTIONS, name_of
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.fx import Node


def regions(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """Path of a module → its operations and those of the modules within it; all calls of a module together."""
    found: dict[str, list[Node]] = {}
    for node in nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            found.setdefault(str(path).split("@")[0], []).append(node)
    return found


def exits(region: Sequence[Node]) -> list[Node]:
    """The operations of a region whose result something outside of it reads."""
    inside = set(region)
    return [node for node in region if any(user not in inside and _reads(user) for user in node.users)]


def _reads(user: Node) -> bool:
    return user.op != "call_function" or name_of(user).removeprefix("aten.") not in ASSERTIONS


def put_out(states: Mapping[Node, Any]) -> dict[str, Tensor]:
    """Path of a module → the one tensor that the rest of the program takes from it, with its labels.

    Args:
        states: node → the labels of its result.
    """
    found = {path: exits(region) for path, region in regions(states).items() if path}
    ends = {path: states[nodes[0]] for path, nodes in found.items() if len(nodes) == 1}
    return {path: labeled for path, labeled in ends.items() if isinstance(labeled, Tensor)}
