"""The operations of each module in a traced program, and the output of each module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.frameworks.pytorch.analysis.program import ASSERTIONS, name_of
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.fx import Node

    from kirsch.graph.graph import Graph


def regions(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """Return the operations of each module by its path, inner modules and all calls of the module included."""
    operations: dict[str, list[Node]] = {}
    for node in nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            operations.setdefault(str(path).split("@")[0], []).append(node)
    return operations


def exits(region: Sequence[Node]) -> list[Node]:
    """Return the operations of a region whose results are read outside of it."""
    inside = set(region)
    return [node for node in region if any(user not in inside and _reads(user) for user in node.users)]


def _reads(user: Node) -> bool:
    return user.op != "call_function" or name_of(user).removeprefix("aten.") not in ASSERTIONS


def module_outputs(graph: Graph) -> dict[str, Tensor]:
    """Return path → labeled output tensor, of the modules in the traced part that return one tensor."""
    states = graph.traced.states
    exits_of = {path: exits(region) for path, region in regions(states).items() if path}
    outputs = {path: states[nodes[0]] for path, nodes in exits_of.items() if len(nodes) == 1}
    return {path: output for path, output in outputs.items() if isinstance(output, Tensor)}
