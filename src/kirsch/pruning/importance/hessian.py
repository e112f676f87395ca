"""Second-order estimate of the loss without single weights (OBD)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.pruning.importance.importance import importance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("hessian", needs="labels", signed=True, of_loss=True)
def hessian(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:  # noqa: ARG001 - the signature of importances
    """Return half of the sum over the weights that read each unit of w² · ∂²L/∂w².

    The second derivatives are estimated with random vectors (Hutchinson). The estimate is in units of the loss. It may
    be negative where the loss is not convex.

    Source: LeCun et al. 1989 (optimal brain damage), equation 5; Yao et al. 2021, arXiv:2006.00719, equation 7, for the
        estimate.
    """
    return statistics.second_order(group) / 2
