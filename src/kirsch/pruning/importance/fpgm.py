"""Distance to the other units: units close to the others are redundant (FPGM)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.pruning.importance.importance import importance, relative_to_mean, unit_of_index, weight_axes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group


@importance("fpgm")
def fpgm(graph: Graph, group: Group) -> NDArray[np.float64]:
    """Return the sum of the Euclidean distances from each unit's weights to those of all other units of the group.

    A unit near the geometric median of all units can be replaced by the others. The distances are computed in the
    layers that produce the units (in all weights, if no layer produces them), divided by their mean over the units, and
    averaged over the layers.

    Source: He et al. 2019, arXiv:1811.00250, section 3.3.
    """
    reading = set(graph.input_axes(group))
    keys = weight_axes(graph, group)
    keys = [key for key in keys if key not in reading] or keys
    total = np.zeros(group.size)
    for name, axis in keys:
        of_index = unit_of_index(graph, group, graph.axes[name, axis])
        order = np.argsort(of_index, kind="stable")[np.count_nonzero(of_index < 0) :]
        slices = np.moveaxis(graph.values(name).astype(np.float64), axis, 0)[order]
        total += relative_to_mean(_distances(slices, of_index[order], group.size).sum(1))
    return total / max(len(keys), 1)


def _distances(slices: NDArray[np.float64], unit: NDArray[np.int64], units: int) -> NDArray[np.float64]:
    """Return the distances between units, shape (units, units).

    Args:
        slices: slices of the weight, ordered by unit, shape (indices, ...).
        unit: unit of each slice, ascending. A unit without slices has distance 0 to the others.
        units: number of units.
    """
    counts = np.bincount(unit, minlength=units)
    rows = np.zeros((units, counts.max(initial=0), int(np.prod(slices.shape[1:]))))
    place = np.arange(len(unit)) - (np.cumsum(counts) - counts)[unit]
    rows[unit, place] = slices.reshape(len(slices), -1)
    rows = rows.reshape(units, -1)
    squares = (rows**2).sum(1)
    squared = squares[:, None] + squares[None, :] - 2 * rows @ rows.T
    return np.asarray(np.sqrt(np.maximum(squared, 0)))  # rounding may make the square of a distance of 0 negative
