"""Products of one number for each unit, over the units to which each component belongs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group


def unit_slots(graph: Graph, groups: Sequence[tuple[Group, int]], none: int) -> NDArray[np.int64]:
    """Return the units to which each component belongs, shape (slots, components).

    A component may belong to several units, such as a head and an index inside all heads.

    Args:
        graph: graph of the model.
        groups: groups, and the number of the first unit of each.
        none: number of an imaginary unit, which fills the empty slots.
    """
    components = np.concatenate([group.components for group, _ in groups])
    units = np.concatenate([first + group.unit_of() for group, first in groups])
    order = np.argsort(components, kind="stable")
    components, units = components[order], units[order]
    begins = np.flatnonzero(np.diff(components, prepend=-1))
    slot = np.arange(len(components)) - np.repeat(begins, np.diff(np.append(begins, len(components))))
    slots = np.full((int(slot.max()) + 1, len(graph.coupling.frozen)), none)
    slots[slot, components] = units
    return slots


def products(values: Any, slots: Any) -> Any:
    """Return the product of the values of the units of each column of `slots`, shape (columns,).

    Args:
        values: a number for each unit, shape (units,). The number of the imaginary unit is 1.
        slots: a result of `unit_slots`, or some of its columns.
    """
    extended = ops.concatenate([values, ops.ones_like(values[:1])])
    product = ops.take_along_axis(extended, slots[0])
    for row in range(1, slots.shape[0]):
        product = product * ops.take_along_axis(extended, slots[row])
    return product
