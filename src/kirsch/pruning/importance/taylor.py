"""First-order estimate of the loss without a unit (Taylor)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.pruning.importance.importance import importance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("taylor", needs="labels", of_loss=True)
def taylor(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:  # noqa: ARG001 - the signature of importances
    """Return the mean over samples of the absolute change of the loss without each unit, to first order.

    The change is the derivative of the loss for the gate of the unit, see `Statistics`. It is in units of the loss, so
    the scores of all layers can be compared.

    Source: Molchanov et al. 2017, arXiv:1611.06440, section 2.2, with the sum over all positions of a channel in place
        of the mean, and without the normalization of each layer.
    """
    return statistics.gates(group).mean_absolute
