"""Residual sums: an addition of which one operand is computed from the other by a layer with weights."""

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
"""Operations that compute features from others."""

WEIGHTED = frozenset(["mul"])
"""Operations whose smaller operand scales the larger one, such as a gate or the weight of an expert."""


def ends_of_branch(node: Node, place: Mapping[Node, int]) -> list[Node] | None:
    """The last layers of the branch that a residual sum adds; None for a sum that is not residual.

    Args:
        node: an addition.
        place: of each node in the order of the program.
    """
    for stream in node.all_input_nodes:
        for branch in node.all_input_nodes:
            if branch is not stream and _computed_from(branch, stream, place):
                return _ends(branch, place[stream], place)
    return None


def mixes(node: Node) -> bool:
    """Whether an operation computes features from others."""
    return name_of(node).rpartition(".")[2] in MIXING


def _computed_from(branch: Node, stream: Node, place: Mapping[Node, int]) -> bool:
    """Whether a way leads from the stream to the branch through a layer."""
    seen: set[tuple[Node, bool]] = set()
    waiting = [(branch, False)]
    while waiting:
        node, crossed = waiting.pop()
        if node is stream:
            if crossed:
                return True
            continue
        if (node, crossed) in seen or place[node] < place[stream]:
            continue
        seen.add((node, crossed))
        waiting += [(source, crossed or mixes(node)) for source in node.all_input_nodes]
    return False


def _ends(branch: Node, first: int, place: Mapping[Node, int]) -> list[Node]:
    """The layers that are met first on the ways back from a branch."""
    found: list[Node] = []
    seen: set[Node] = set()
    waiting = [branch]
    while waiting:
        node = waiting.pop()
        if node in seen or place[node] < first:
            continue
        seen.add(node)
        if mixes(node):
            found.append(node)
            continue
        sources = node.all_input_nodes
        if name_of(node).rpartition(".")[2] in WEIGHTED:
            sizes = [_size(source) for source in sources]
            sources = [source for source, size in zip(sources, sizes, strict=True) if size == max(sizes)]
        waiting += sources
    return found


def _size(node: Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if isinstance(value, torch.Tensor) and isinstance(value.numel(), int) else 0
