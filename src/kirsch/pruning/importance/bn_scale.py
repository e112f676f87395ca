"""Scale of the batch normalization of a unit (Network Slimming)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch import figures
from kirsch.errors import UsageError
from kirsch.pruning.importance.importance import importance, mean_per_unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group


SCALE = "batch norm scale"
"""Role of the scale of a batch normalization."""


@importance("bn_scale")
def bn_scale(graph: Graph, group: Group) -> NDArray[np.float64]:
    """Return the mean |γ| of the batch normalizations of each unit.

    Scales are not divided by their mean: as in Network Slimming, the scales of all layers are compared. Train with
    `kirsch.Slimming` first, so that the scales of unimportant channels become small.

    Raises:
        UsageError: no batch normalization scales the units of the group.

    Source: Liu et al. 2017, arXiv:1708.06519, section 3.2.
    """
    keys = graph.axes_with(group, SCALE)
    if not keys:
        names = [other.name for other in graph.groups if other != group and not graph.axes_with(other, SCALE)]
        others = [repr(name) for name in names]
        layers = list(dict.fromkeys(name.partition("#")[0] for name in (group.name, *names)))
        raise UsageError(
            f'The importance "bn_scale" cannot rank the units of {group.name!r}.',
            "No batch normalization with a scale is applied to them"
            f"{f', nor to those of {figures.listed(others)}' if others else ''}.",
            f"Keep the outputs of such layers, keep_outputs={layers!r}, or use another importance.",
        )
    total = np.zeros(group.size)
    for key in keys:
        total += mean_per_unit(graph, group, graph.axes[key], np.abs(graph.values(key[0]).astype(np.float64)))
    return total / len(keys)
