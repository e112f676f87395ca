"""Weights that a model computes from its parameters, and which of them a cut changes for the units that stay.

Spectral and weight normalization, orthogonal parametrizations and standardized convolutions compute a weight from all
of a parameter. When rows or columns of the parameter go, the computed weight of the others changes with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kirsch.frameworks.pytorch.analysis.program import name_of
from kirsch.frameworks.pytorch.verification.masked import MaskedRun, fixed_nodes
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray
    from torch.fx import Node

    from kirsch.frameworks.pytorch.analysis.traced import Traced
    from kirsch.graph.graph import Graph

LEAST = 1e-4
"""The smallest change, relative to the largest number of a weight, that is more than rounding."""

_MOVING = """
t transpose permute view _unsafe_view reshape to _to_copy unsqueeze squeeze slice select expand clone detach alias
contiguous getitem split split_with_sizes chunk unbind
"""
MOVING = frozenset(_MOVING.split())
"""Operations that change no number, so that what they put out is no weight of its own."""


class _Weights(MaskedRun):
    """Runs what depends on parameters, buffers and constants alone, and keeps the results of some operations."""

    def __init__(
        self,
        graph: Graph,
        keep: NDArray[np.bool_],
        tensors: Mapping[str, torch.Tensor],
        wanted: Collection[Node],
    ) -> None:
        super().__init__(graph, keep, tensors)
        self._wanted = wanted
        self.found: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """One operation, if it depends on no input."""
        if n.op != "placeholder" and n not in self._fixed:
            return ()
        out = super().run_node(n)
        if n in self._wanted:
            self.found[n] = out
        return out


def changed(graph: Graph, keep: NDArray[np.bool_], tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Path of each module whose computed weight changes for the kept units → its size relative to before.

    The size is the root of the mean square of the kept entries. Units that only the computation of the weight itself
    has, such as the rank of a product of two factors, are taken as gone in both.

    Args:
        graph, keep: what is cut.
        tensors: parameters and buffers of the original by path, as they are.
    """
    traced: Traced = graph.traced
    fixed = fixed_nodes(traced)
    wanted = _computed(graph, keep, fixed)
    if not wanted:
        return {}
    found = []
    for which in (keep | _used(graph, fixed), keep):
        run = _Weights(graph, which, tensors, wanted)
        with torch.no_grad():
            run.run(*run.feed([None] * len(traced.program.graph_signature.user_inputs)))
        found.append(run.found)
    sizes: dict[str, float] = {}
    for node, user in wanted.items():
        whole, cut = (_kept(values[node], traced.states[node], graph, keep) for values in found)
        largest = float(whole.abs().max()) if whole.numel() else 0.0
        if largest and float((whole - cut).abs().max()) > LEAST * largest:
            size = float(cut.square().mean().sqrt() / whole.square().mean().sqrt())
            path = _module(user)
            sizes[path] = max(size, sizes.get(path, size), key=lambda value: abs(np.log(max(value, 1e-9))))
    return sizes


def _computed(graph: Graph, keep: NDArray[np.bool_], fixed: set[Node]) -> dict[Node, Node]:
    """Each result that is computed from a cut parameter and read beside an input → the first that reads it."""
    traced: Traced = graph.traced
    cut = {name for name, tensor in graph.tensors.items() if any(graph.kept(a, keep) is not None for a in tensor.axes)}
    mixed: set[Node] = set()  # depends on a cut parameter
    own: set[Node] = set()  # and is more than a view of it
    found = {}
    for node in traced.program.graph.nodes:
        if node.op == "placeholder":
            if traced.slots.get(node.name) in cut:
                mixed.add(node)
        elif node in fixed and mixed.intersection(node.all_input_nodes):
            mixed.add(node)
            if name_of(node).removeprefix("aten.") not in MOVING or own.intersection(node.all_input_nodes):
                own.add(node)
            user = next((user for user in node.users if user not in fixed and user.op != "output"), None)
            value = node.meta.get("val")
            if node in own and user is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
                found[node] = user
    return found


def _used(graph: Graph, fixed: set[Node]) -> NDArray[np.bool_]:
    """Component → whether it lies on an axis of what depends on an input."""
    traced: Traced = graph.traced
    used = np.zeros(len(graph.coupling.frozen), bool)
    for node, state in traced.states.items():
        for tensor in state if isinstance(state, list) else [state]:
            if isinstance(tensor, Tensor) and node not in fixed:
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
