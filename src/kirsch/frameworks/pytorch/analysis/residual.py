"""Residual sums: additions of a stream and a branch, which is computed from the stream through at least one layer.

A layer is an operation in `LAYERS`, such as a linear layer or attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kirsch.frameworks.pytorch.analysis.program import name_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Node

_LAYERS = """
linear matmul mm bmm mv addmm baddbmm addmv einsum bilinear _grouped_mm grouped_mm_fallback conv1d conv2d conv3d
convolution conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention lstm gru
"""
LAYERS = frozenset(_LAYERS.split())
"""Products of tensors, convolutions, attention and recurrent layers, with or without parameters."""

SCALING = frozenset(["mul"])
"""Operations whose smaller operand scales the larger one. A gate or the weight of an expert is a smaller operand."""


def last_layers_of_branch(node: Node, index: Mapping[Node, int]) -> list[Node] | None:
    """Return the last layers of the branch that a residual sum adds; None if the sum is not residual.

    Args:
        node: an addition.
        index: position of each node in the program.
    """
    for stream in node.all_input_nodes:
        for branch in node.all_input_nodes:
            if branch is not stream and _computed_from(branch, stream, index):
                return _last_layers(branch, stream, index)
    return None


def _is_layer(node: Node) -> bool:
    """Return whether an operation is in `LAYERS`."""
    return name_of(node).rpartition(".")[2] in LAYERS


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
        waiting += [(source, crossed or _is_layer(node)) for source in node.all_input_nodes]
    return False


def _last_layers(branch: Node, stream: Node, index: Mapping[Node, int]) -> list[Node]:
    """Return the last layer on each path that leads to the end of a branch, without operations before the stream."""
    layers: list[Node] = []
    seen: set[Node] = set()
    waiting = [branch]
    while waiting:
        node = waiting.pop()
        if node in seen or index[node] < index[stream]:
            continue
        seen.add(node)
        if _is_layer(node):
            layers.append(node)
            continue
        sources = node.all_input_nodes
        if name_of(node).rpartition(".")[2] in SCALING:
            sizes = [_size(source) for source in sources]
            sources = [source for source, size in zip(sources, sizes, strict=True) if size == max(sizes)]
        waiting += sources
    return layers


def _size(node: Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) if isinstance(value, torch.Tensor) and isinstance(value.numel(), int) else 0
