"""Fluctuation of the inputs times the squared norm of the weights (FLAP)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.pruning.importance.activations import column_sums
from kirsch.pruning.importance.importance import importance, sum_per_unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("flap", needs="inputs", signed=True)
def flap(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:
    """Return the sum of Var(x) · ‖w‖² over the channels of each unit, standardized over the units of the group.

    A unit whose activation hardly varies can be replaced by a constant, which a bias can add. ‖w‖ is the norm of the
    column of the weight that the channel multiplies. The scores of each weight are standardized to mean 0 and standard
    deviation 1, so that the scores of all layers can be compared, and averaged over the weights that read the unit.

    Source: An et al. 2024, arXiv:2312.11983, equations 4 and 5.
    """
    scores = []
    for inputs in statistics.of_inputs(group):
        values = sum_per_unit(graph, group, inputs.labels, inputs.variance * column_sums(graph, inputs, 2))
        deviation = values.std()
        scores.append((values - values.mean()) / (deviation if deviation > 0 else 1.0))
    return np.asarray(np.mean(scores, axis=0))
