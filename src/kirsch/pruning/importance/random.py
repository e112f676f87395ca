"""Random importance, the baseline for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.pruning.importance.importance import importance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group


@importance("random")
def random(graph: Graph, group: Group, *, seed: int = 0) -> NDArray[np.float64]:
    """Return uniform random numbers, the baseline for other importances. Equal seeds give equal numbers."""
    index = [other.name for other in graph.groups].index(group.name)
    return np.random.default_rng([seed, index]).uniform(size=group.size)
