"""Magnitude of the weights of a unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.pruning.importance.importance import importance, mean_per_unit, relative_to_mean, weight_axes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group


@importance("magnitude")
def magnitude(graph: Graph, group: Group, *, norm: int = 2) -> NDArray[np.float64]:
    """Return the magnitude of the weights of each unit, relative to the other units of the group.

    The magnitude of a slice of a weight is the mean of |w| (norm 1) or the root of the mean of w² (norm 2). It is
    computed for the slices of the units in all weights with two or more axes: of layers that produce the units and of
    layers that read them. If there are none, it is computed for the other parameters. The magnitudes of each weight are
    divided by their mean over the units, and averaged over the weights: an average unit has magnitude 1 in any layer.

    Source: Li et al. 2017, arXiv:1608.08710 (norm 1 of filters); the average over coupled layers after Fang et al.
        2023, arXiv:2301.12900, section 3.2.
    """
    keys = weight_axes(graph, group)
    total = np.zeros(group.size)
    for key in keys:
        total += relative_to_mean(slice_magnitudes(graph, group, key, norm))
    return total / max(len(keys), 1)


def slice_magnitudes(graph: Graph, group: Group, key: tuple[str, int], norm: int) -> NDArray[np.float64]:
    """Return the mean of |w| (norm 1) or the root of the mean of w² (norm 2) of the slice of each unit in a weight."""
    name, axis = key
    powers = np.abs(graph.values(name).astype(np.float64)) ** norm
    per_index = powers.mean(axis=tuple(other for other in range(powers.ndim) if other != axis))
    return mean_per_unit(graph, group, graph.axes[key], per_index) ** (1 / norm)
