"""Memory of the activations: which tensors exist during each operation."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch

from kirsch.graph.facts import INPUTS
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch.export import ExportedProgram
    from torch.fx import Node

    from kirsch.graph.facts import Facts


def add_memory(
    program: ExportedProgram,
    states: Mapping[Node, Any],
    weights: Collection[Node],
    owners: Mapping[Node, str],
    facts: Facts,
) -> None:
    """Record the bytes of each tensor and the operations between which it exists, as costs of the kind "memory".

    A view, such as the result of a reshape, has no memory of its own; the tensor exists until its last view is read.

    Args:
        program: the operations.
        states: labels of the results of each operation.
        weights: operations that only depend on parameters and constants; they are not activations.
        owners: path of the module of each operation.
        facts: receives the costs.
    """
    first: dict[Node, int] = {}
    last: dict[Node, int] = {}
    holder: dict[Node, Node] = {}  # operation → operation whose result holds its memory
    for position, node in enumerate(program.graph.nodes):
        inputs = node.all_input_nodes
        holder[node] = holder[inputs[0]] if inputs and is_view(node) else node
        first[node] = last[node] = position
        for source in inputs:
            last[holder[source]] = position
    for node, start in first.items():
        if holder[node] is not node or node in weights or node.op == "output":
            continue
        labeled = states.get(node)
        for state, value in zip(*map(_sequence, (labeled, node.meta.get("val"))), strict=False):
            if not isinstance(value, torch.Tensor):
                continue
            shaped = state if isinstance(state, Tensor) else Tensor.of(value.shape)  # without labels
            constant = math.prod(size for size, axis in zip(shaped.shape, shaped.axes, strict=True) if axis is None)
            life = start, last[node]
            owner = INPUTS if node.op == "placeholder" else owners.get(node, "")
            facts.cost("memory", constant * value.element_size(), shaped.axes, owner, life)


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def is_view(node: Node) -> bool:
    """Return whether the result of an operation has the memory of its first input."""
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments:
        return False
    alias = schema.arguments[0].alias_info
    return (alias is not None and not alias.is_write) or schema.name == "aten::_unsafe_view"
