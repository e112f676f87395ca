"""From facts to components: which labels go together, and which cannot go.

All equalities are solved at once by connected components. A grid axis that is stuck as a whole is no freedom: its cells
are tied along it and the axis is dropped, and the components are found again, until nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kirsch.graph.facts import Grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.graph.facts import Facts, Freeze
    from kirsch.graph.labels import Labels


@dataclass(frozen=True)
class Coupling:
    """The solved facts.

    Args:
        component: label → component, int64 of shape (labels,).
        stuck: component → whether it cannot go, bool of shape (components,).
        grids: the grids that are left, with components in place of labels.
        marks: what operations use components as → component → whether, bool of shape (components,).
        why: component → the first fact that froze it.
    """

    component: NDArray[np.int64]
    stuck: NDArray[np.bool_]
    grids: tuple[Grid, ...]
    marks: dict[str, NDArray[np.bool_]]
    why: dict[int, Freeze]


def solve(facts: Facts, ties: Sequence[tuple[Labels, Labels]] = (), more: Sequence[Freeze] = ()) -> Coupling:
    """The components of all facts, and of ties and more freezes that follow from them."""
    left, right = [*facts.left, *(tie[0] for tie in ties)], [*facts.right, *(tie[1] for tie in ties)]
    freezes = [*facts.freezes, *more]
    grids, frozen = list(facts.grids), [freeze.labels for freeze in freezes]
    fallen: list[Grid] = []
    while True:
        component, stuck = _components(facts.count, left, right, frozen)
        grids, tied, fixed = _collapse(grids, component, stuck)
        if not tied and not fixed:
            break
        left += [tie[0] for tie in tied]
        right += [tie[1] for tie in tied]
        frozen += [grid.cells.ravel() for grid in fixed]
        fallen += fixed
    marks = {}
    for use, marked in facts.marks.items():
        marks[use] = np.zeros(len(stuck), bool)
        marks[use][component[np.concatenate(marked)]] = True
    return Coupling(component, stuck, _distinct(grids, component), marks, _causes(freezes, fallen, component))


def _causes(freezes: Sequence[Freeze], fallen: Sequence[Grid], component: NDArray[np.int64]) -> dict[int, Freeze]:
    """Component → the first fact that froze it. Cells of a grid without a free axis have that of its marginals."""
    why: dict[int, Freeze] = {}
    for freeze in freezes:
        for found in np.unique(component[freeze.labels]).tolist():
            why.setdefault(found, freeze)
    for grid in fallen:  # in the order in which they fell, so that marginals that are cells of another have theirs
        longest_first = sorted(grid.marginals, key=len, reverse=True)  # the 3 of (3, heads, width) explains least
        marginals = component[np.concatenate(longest_first)].tolist()
        causes = [why[found] for found in marginals if found in why]
        for found in np.unique(component[grid.cells]).tolist() if causes else ():
            why.setdefault(found, causes[0])
    return why


def _components(
    count: int, left: Sequence[Labels], right: Sequence[Labels], frozen: Sequence[Labels]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    rows = np.concatenate([*left, np.zeros(0, np.int64)])
    columns = np.concatenate([*right, np.zeros(0, np.int64)])
    edges = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(count, count))
    number, component = connected_components(edges, directed=False)
    stuck = np.zeros(number, bool)
    stuck[component[0]] = True
    if frozen:
        stuck[component[np.concatenate(frozen)]] = True
    return component.astype(np.int64), stuck


def _collapse(
    grids: Sequence[Grid], component: NDArray[np.int64], stuck: NDArray[np.bool_]
) -> tuple[list[Grid], list[tuple[Labels, Labels]], list[Grid]]:
    """Drop the stuck axes of grids: grids that are left, ties that follow, grids without a free axis."""
    kept: list[Grid] = []
    ties: list[tuple[Labels, Labels]] = []
    fixed: list[Grid] = []
    for grid in grids:
        cells, marginals = grid.cells, list(grid.marginals)
        drop = [axis for axis, marginal in enumerate(marginals) if stuck[component[marginal]].all()]
        if not drop:
            kept.append(grid)
            continue
        if len(drop) == cells.ndim:
            fixed.append(grid)
            continue
        for axis in reversed(drop):
            first = cells.take([0], axis)
            ties.append((cells.ravel(), np.broadcast_to(first, cells.shape).ravel()))
            cells = first.squeeze(axis)
            marginals.pop(axis)
        if cells.ndim == 1:
            ties.append((cells, marginals[0]))
        else:
            kept.append(Grid(cells, tuple(marginals), grid.kind, grid.operation))
    return kept, ties, fixed


def _distinct(grids: Sequence[Grid], component: NDArray[np.int64]) -> tuple[Grid, ...]:
    """The grids over components, each once."""
    seen: dict[tuple[object, ...], Grid] = {}
    for grid in grids:
        marginals = tuple(component[marginal] for marginal in grid.marginals)
        solved = Grid(component[grid.cells], marginals, grid.kind, grid.operation)
        key = (solved.cells.shape, solved.cells.tobytes(), *(marginal.tobytes() for marginal in solved.marginals))
        seen.setdefault(key, solved)
    return tuple(seen.values())
