"""Find the computed weights that a cut changes for the kept units.

Spectral and weight normalization, orthogonal parametrizations and standardized convolutions compute a weight from a
full parameter. When rows or columns of the parameter are removed, the computed weights of the kept rows and columns
change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kirsch.frameworks.pytorch.analysis.program import name_of
from kirsch.frameworks.pytorch.verification.masked import MaskedRun, input_free_nodes
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray
    from torch.fx import Node

    from kirsch.frameworks.pytorch.analysis.traced import Traced
    from kirsch.graph.graph import Graph

LEAST = 1e-4
"""The smallest change, relative to the largest entry of a weight, that counts as more than rounding."""

_MOVING = """
t transpose permute view _unsafe_view reshape to _to_copy unsqueeze squeeze slice select expand clone detach alias
contiguous getitem split split_with_sizes chunk unbind
"""
MOVING = frozenset(_MOVING.split())
"""Operations that only move or copy values, so that their result is not a computed weight."""


class _WeightsRun(MaskedRun):
    """Run the operations that do not depend on inputs, and record the results of the nodes `recorded`."""

    def __init__(
        self,
        graph: Graph,
        keep: NDArray[np.bool_],
        tensors: Mapping[str, torch.Tensor],
        recorded: Collection[Node],
    ) -> None:
        super().__init__(graph, keep, tensors)
        self._recorded = recorded
        self.results: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one operation if it does not depend on an input."""
        if n.op != "placeholder" and n not in self._input_free:
            return ()
        out = super().run_node(n)
        if n in self._recorded:
            self.results[n] = out
        return out


def changed_weight_ratios(
    graph: Graph, keep: NDArray[np.bool_], tensors: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Return the modules whose computed weight changes for the kept units.

    Units that only exist within the computation of a weight, such as the rank of a product of two factors, are removed
    in both compared weights.

    Args:
        graph: graph of the original.
        keep: mask of the components (sets of coupled labels) that stay, bool of shape (components,).
        tensors: parameters and buffers of the original by path.

    Returns:
        Path of the module → root mean square of the kept entries after the cut, divided by the root mean square before
        the cut.
    """
    traced: Traced = graph.traced
    input_free = input_free_nodes(traced)
    computed = _computed(graph, keep, input_free)
    if not computed:
        return {}
    results = []
    for mask in (keep | _used(graph, input_free), keep):
        run = _WeightsRun(graph, mask, tensors, computed)
        with torch.no_grad():
            run.run(*run.feed([None] * len(traced.program.graph_signature.user_inputs)))
        results.append(run.results)
    sizes: dict[str, float] = {}
    for node, user in computed.items():
        before, after = (_kept(values[node], traced.states[node], graph, keep) for values in results)
        largest = float(before.abs().max()) if before.numel() else 0.0
        if largest and float((before - after).abs().max()) > LEAST * largest:
            size = float(after.square().mean().sqrt() / before.square().mean().sqrt())
            path = _module(user)
            sizes[path] = max(size, sizes.get(path, size), key=lambda value: abs(np.log(max(value, 1e-9))))
    return sizes


def _computed(graph: Graph, keep: NDArray[np.bool_], input_free: set[Node]) -> dict[Node, Node]:
    """Map each result that is computed from a cut parameter to the first user that depends on an input."""
    traced: Traced = graph.traced
    cut = {name for name, tensor in graph.tensors.items() if any(graph.kept(a, keep) is not None for a in tensor.axes)}
    from_cut: set[Node] = set()  # depends on a cut parameter
    computed: set[Node] = set()  # computed from the parameter, not only a view of it
    first_users = {}
    for node in traced.program.graph.nodes:
        if node.op == "placeholder":
            if traced.slots.get(node.name) in cut:
                from_cut.add(node)
        elif node in input_free and from_cut.intersection(node.all_input_nodes):
            from_cut.add(node)
            if name_of(node).removeprefix("aten.") not in MOVING or computed.intersection(node.all_input_nodes):
                computed.add(node)
            user = next((user for user in node.users if user not in input_free and user.op != "output"), None)
            value = node.meta.get("val")
            if node in computed and user is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
                first_users[node] = user
    return first_users


def _used(graph: Graph, input_free: set[Node]) -> NDArray[np.bool_]:
    """Return the mask of the components that label an axis of a tensor that depends on an input.

    The mask is a bool array of shape (components,).
    """
    traced: Traced = graph.traced
    used = np.zeros(len(graph.coupling.frozen), bool)
    for node, state in traced.states.items():
        for tensor in state if isinstance(state, list) else [state]:
            if isinstance(tensor, Tensor) and node not in input_free:
                for axis in tensor.axes:
                    if axis is not None:
                        used[graph.coupling.component[axis]] = True
    return used


def _kept(value: torch.Tensor, labeled: Tensor, graph: Graph, keep: NDArray[np.bool_]) -> torch.Tensor:
    for axis, labels in enumerate(labeled.axes):
        mask = graph.kept(labels, keep)
        if mask is not None:
            value = value.index_select(axis, torch.from_numpy(mask.nonzero()[0]).to(value.device))
    return value


def _module(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""
