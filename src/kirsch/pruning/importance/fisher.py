"""Second-order estimate of the loss without a unit, by the Fisher information."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.pruning.importance.importance import importance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("fisher", needs="labels", of_loss=True)
def fisher(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:  # noqa: ARG001 - the signature of importances
    """Return half of the mean over samples of the squared derivative of the loss for the gate of each unit.

    This is the change of the loss without the unit, to second order, if the gradient of the mean loss is 0 and the
    Hessian is replaced by the empirical Fisher information. It is in units of the loss, so the scores of all layers can
    be compared. The squares are summed over single samples: a sum over batches would be another quantity.

    Source: Theis et al. 2018, arXiv:1801.05787, equation 7.
    """
    return statistics.gates(group).mean_square / 2
