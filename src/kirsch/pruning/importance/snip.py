"""Sensitivity of the loss to single weights (SNIP)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.pruning.importance.importance import importance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("snip", needs="labels", of_loss=True)
def snip(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:  # noqa: ARG001 - the signature of importances
    """Return the sum over the weights that read each unit of |w · ∂L/∂w|, with the gradient of the mean loss.

    The importance is meant for networks before training. After training, the mean gradient is near 0.

    Source: Lee et al. 2019, arXiv:1810.02340, equation 6, without the normalization over all weights, which does not
        change the ranking.
    """
    return statistics.first_order(group)
