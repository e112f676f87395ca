"""Magnitude relative to the units that remain (LAMP)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.pruning.importance.importance import importance
from kirsch.pruning.importance.magnitude import magnitude

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group


@importance("lamp")
def lamp(graph: Graph, group: Group, *, norm: int = 2) -> NDArray[np.float64]:
    """Return the squared magnitude of each unit, divided by the sum over the units that are at least as large.

    The magnitude is that of the importance "magnitude". A single largest unit of a group has score 1, so a global
    ranking removes it last. Units of equal magnitude have equal scores.

    Source: Lee et al. 2021, arXiv:2010.07611, equation 3, for single weights; here for units.
    """
    squares = magnitude(graph, group, norm=norm) ** 2
    order = np.argsort(squares, kind="stable")
    remaining = np.cumsum(squares[order][::-1])[::-1]
    # The first of several equal units is compared with all of them.
    first_equal = np.searchsorted(squares[order], squares)
    sums = remaining[first_equal]
    return np.divide(squares, sums, out=np.zeros_like(squares), where=sums > 0)
