"""Magnitude of the weights times the norm of their inputs (Wanda)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.pruning.importance.activations import column_sums
from kirsch.pruning.importance.importance import importance, relative_to_mean, sum_per_unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("wanda", needs="inputs")
def wanda(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:
    """Return the sum of |w| · ‖x‖ over the weights that read each unit, relative to the other units.

    ‖x‖ is the root of the mean of x² of the channel that the weight multiplies. The sums of each weight matrix are
    divided by their mean over the units, and averaged over the matrices.

    Source: Sun et al. 2024, arXiv:2306.11695, equation 1, for single weights; summed over units as in An et al. 2024,
        arXiv:2312.11983.
    """
    scores = []
    for inputs in statistics.of_inputs(group):
        products = inputs.root_mean_square * column_sums(graph, inputs, 1)
        scores.append(relative_to_mean(sum_per_unit(graph, group, inputs.labels, products)))
    return np.asarray(np.mean(scores, axis=0))
