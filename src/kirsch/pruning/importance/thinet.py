"""Error of the outputs of the next layers without a unit (ThiNet)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.pruning.importance.importance import importance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("thinet", needs="inputs")
def thinet(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:  # noqa: ARG001 - the signature of importances
    """Return the error of the outputs of the layers that read the units, when each unit is removed after the others.

    Units are removed one after another; the next unit is the one with which the error is smallest. The error is the sum
    of the squared changes of the outputs of a layer, relative to the sum of the squared outputs, averaged over the
    layers that read the units. It takes into account that the contributions of several units may cancel.

    Source: Luo et al. 2017, arXiv:1707.06342, algorithm 1.
    """
    products = np.mean(statistics.contribution_products(group), axis=0)
    scores, error = np.zeros(group.size), 0.0
    added = products.diagonal().copy()  # change of the error by the removal of each unit
    rest = np.ones(group.size, bool)
    largest = 0.0
    for _ in range(group.size):
        unit = int(np.where(rest, added, np.inf).argmin())
        error += added[unit]
        # The error may decrease. The scores must increase in the order of the removal, so that plans follow this order.
        largest = max(error, np.nextafter(largest, np.inf))
        scores[unit], rest[unit] = largest, False
        added += 2 * products[unit]
    return scores
