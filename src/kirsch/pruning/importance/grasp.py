"""Effect of the removal of a unit on the gradient (GraSP)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.pruning.importance.importance import importance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("grasp", needs="labels", signed=True)
def grasp(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:  # noqa: ARG001 - the signature of importances
    """Return the sum over the weights that read each unit of w · (H g): H is the Hessian, g the gradient of the loss.

    The score is minus the change of g² / 2 without the weights, to first order. Units whose removal increases the
    gradient have low scores, so that a network pruned before its training learns fast.

    Source: Wang et al. 2020, arXiv:2002.07376, equation 8.
    """
    return statistics.gradient_flow(group)
