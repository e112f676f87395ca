"""Residual sums: additions of a stream and a branch, which is computed from the stream by a layer with weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kirsch.frameworks.pytorch.analysis.program import name_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Node

_MIXING = """
linear matmul mm bmm mv addmm baddbmm addmv einsum bilinear _grouped_mm grouped_mm_fallback conv1d conv2d conv3d
convolution conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention lstm gru
"""
MIXING = frozenset(_MIXING.split())
"""Operations that compute features from other features."""

WEIGHTED = frozenset(["mul"])
"""Operations whose smaller operand scales the larger one, such as a gate or the weight of an expert."""


def last_layers_of_branch(node: Node, index: Mapping[Node, int]) -> list[Node] | None:
    """Return the last layers of the branch that a residual sum adds; None if the sum is not residual.

    Args:
        node: an addition.
        index: position of each node in the program.
    """
    for stream in node.all_input_nodes:
        for branch in node.all_input_nodes:
            if branch is not stream and _computed_from(branch, stream, index):
                return _last_layers(branch, index[stream], index)
    return None


def mixes(node: Node) -> bool:
    """Return whether an operation computes features from other features."""
    return name_of(node).rpartition(".")[2] in MIXING


def _computed_from(branch: Node, stream: Node, index: Mapping[Node, int]) -> bool:
    """Return whether a path leads from the stream to the branch through a layer."""
    seen: set[tuple[Node, bool]] = set()
    waiting = [(branch, False)]
    while waiting:
        node, crossed = waiting.pop()
        if node is stream:
            if crossed:
                return True
            continue
        if (node, crossed) in seen or index[node] < index[stream]:
            continue
        seen.add((node, crossed))
        waiting += [(source, crossed or mixes(node)) for source in node.all_input_nodes]
    return False


def _last_layers(branch: Node, first: int, index: Mapping[Node, int]) -> list[Node]:
    """Return the first layer on each path back from the end of a branch."""
    layers: list[Node] = []
    seen: set[Node] = set()
    waiting = [branch]
    while waiting:
        node = waiting.pop()
        if node in seen or index[node] < first:
            continue
        seen.add(node)
        if mixes(node):
            layers.append(node)
            continue
        sources = node.all_input_nodes
        if name_of(node).rpartition(".")[2] in WEIGHTED:
            sizes = [_size(source) for source in sources]
            sources = [source for source, size in zip(sources, sizes, strict=True) if size == max(sizes)]
        waiting += sources
    return layers


def _size(node: Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if isinstance(value, torch.Tensor) and isinstance(value.numel(), int) else 0
