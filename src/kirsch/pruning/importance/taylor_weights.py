"""First-order estimate of the loss without single weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.pruning.importance.importance import importance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("taylor_weights", needs="labels")
def taylor_weights(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:  # noqa: ARG001 - the signature of importances
    """Return the mean over samples of the sum of (w · ∂L/∂w)² over the weights that read each unit.

    Each weight is treated as if it were removed alone. The source takes the mean over batches.

    Source: Molchanov et al. 2019, arXiv:1906.10771, equation 9.
    """
    return statistics.gates(group).mean_sum_of_squares
