"""Exact change of the loss without a unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.pruning.importance.importance import importance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("leave_one_out", needs="labels", signed=True, of_loss=True)
def leave_one_out(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:  # noqa: ARG001 - the signature of importances
    """Return the change of the mean loss when each unit is removed from the model.

    Runs the pruned model on all batches once for each unit, so it is only for small models.
    """
    return statistics.loss_changes(group)
