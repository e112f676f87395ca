"""Fraction of activations that are not zero (APoZ)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.errors import UsageError
from kirsch.pruning.importance.importance import importance, mean_per_unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("apoz", needs="inputs")
def apoz(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:
    """Return the fraction of the activations of each unit that are not 0 where weights read them.

    This is one minus the average percentage of zeros. It is a fraction in every layer, so the scores of all layers can
    be compared.

    Raises:
        UsageError: no activation is 0.

    Source: Hu et al. 2016, arXiv:1607.03250, equation 1.
    """
    if not statistics.has_zeros:
        raise UsageError(
            'The importance "apoz" cannot rank the units: no activation is 0.',
            "It counts zeros, which ReLU returns, and activations such as GELU do not.",
            "Use another importance, such as 'activation'.",
        )
    shares = [
        mean_per_unit(graph, group, inputs.labels, inputs.share_of_nonzero) for inputs in statistics.of_inputs(group)
    ]
    return np.asarray(np.mean(shares, axis=0))
