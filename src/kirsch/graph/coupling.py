"""From facts to components: which labels go together, and which cannot go.

All equalities are solved at once. A grid axis that is frozen as a whole is no freedom: its cells are tied along it and
the axis is dropped. Grids that cut the same cells into the same slabs are one. Both tie more, until nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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
        frozen: component → whether it cannot go, bool of shape (components,).
        grids: the grids that are left, with components in place of labels.
        marks: what operations use components as → component → whether, bool of shape (components,).
        why: component → the first fact that froze it.
    """

    component: NDArray[np.int64]
    frozen: NDArray[np.bool_]
    grids: tuple[Grid, ...]
    marks: dict[str, NDArray[np.bool_]]
    why: dict[int, Freeze]


def solve(
    facts: Facts,
    ties: Sequence[tuple[Labels, Labels]] = (),
    more: Sequence[Freeze] = (),
    equal: NDArray[np.int64] | None = None,
) -> Coupling:
    """The components of all facts, and of ties and more freezes that follow from them.

    `equal`: what `equalities` gives, if it is known.
    """
    component = _tied(equalities(facts) if equal is None else equal, ties)
    freezes = [*facts.freezes, *more]
    grids, frozen_labels = list(facts.grids), [freeze.labels for freeze in freezes]
    fallen: list[Grid] = []
    while True:
        frozen = np.zeros(component.max() + 1, bool)
        frozen[component[np.concatenate([[0], *frozen_labels])]] = True
        grids, tied, fixed = _collapse(grids, component, frozen)
        tied += _alike(grids, component)
        if not tied and not fixed:
            break
        component = _tied(component, tied)
        frozen_labels += [grid.cells.ravel() for grid in fixed]
        fallen += fixed
    marks = {}
    for use, marked in facts.marks.items():
        marks[use] = np.zeros(len(frozen), bool)
        for labels in {id(labels): labels for labels in marked}.values():
            marks[use][component[labels]] = True
    return Coupling(component, frozen, _distinct(grids, component), marks, _causes(freezes, fallen, component))


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


def equalities(facts: Facts) -> NDArray[np.int64]:
    """Label → component, by the equalities alone; int64 of shape (labels,)."""
    return _tied(np.arange(facts.count), list(zip(facts.left, facts.right, strict=True)))


def _tied(component: NDArray[np.int64], ties: Sequence[tuple[Labels, Labels]]) -> NDArray[np.int64]:
    """Label → component once these labels go together too; components are numbered by their first labels.

    Whatever meets earlier components hangs on the earliest, all at once, until none meet: one round for a row, two for
    a star.
    """
    if not ties:
        return component
    distinct = {(id(left), id(right)): (left, right) for left, right in ties}.values()  # those of training come again
    one, other = (component[np.concatenate(side)] for side in zip(*distinct, strict=True))
    root = np.arange(component.max() + 1)
    while (differs := one != other).any():
        one, other = one[differs], other[differs]
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while ((above := root[root]) != root).any():
            root = above
        one, other = root[one], root[other]
    number = np.cumsum(root == np.arange(len(root))) - 1
    return number[root][component]


def _collapse(
    grids: Sequence[Grid], component: NDArray[np.int64], frozen: NDArray[np.bool_]
) -> tuple[list[Grid], list[tuple[Labels, Labels]], list[Grid]]:
    """Drop the frozen axes of grids: grids that are left, ties that follow, grids without a free axis."""
    kept: list[Grid] = []
    ties: list[tuple[Labels, Labels]] = []
    fixed: list[Grid] = []
    for grid in grids:
        cells, marginals = grid.cells, list(grid.marginals)
        drop = [axis for axis, marginal in enumerate(marginals) if frozen[component[marginal]].all()]
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


def _alike(grids: Sequence[Grid], component: NDArray[np.int64]) -> list[tuple[Labels, Labels]]:
    """Ties of the marginals of grids that cut the same cells into the same slabs: they are one grid.

    Slabs are told apart by a random 64-bit number for each component, summed.
    """
    number = np.random.default_rng(0).integers(1, 2**62, component.max() + 1)
    seen: dict[tuple[bytes, ...], list[Labels]] = {}
    ties: list[tuple[Labels, Labels]] = []
    for grid in grids:
        cells = number[component[grid.cells]]
        slabs = [cells.sum(tuple({*range(cells.ndim)} - {axis})) for axis in range(cells.ndim)]
        cuts = [np.unique(sums, return_index=True) for sums in slabs]
        marginals = [marginal[first] for marginal, (_, first) in zip(grid.marginals, cuts, strict=True)]
        ties += zip(marginals, seen.setdefault(tuple(sums.tobytes() for sums, _ in cuts), marginals), strict=True)
    return [(left, right) for left, right in ties if (component[left] != component[right]).any()]


def _distinct(grids: Sequence[Grid], component: NDArray[np.int64]) -> tuple[Grid, ...]:
    """The grids over components, each once."""
    seen: dict[tuple[object, ...], Grid] = {}
    for grid in grids:
        marginals = tuple(component[marginal] for marginal in grid.marginals)
        solved = Grid(component[grid.cells], marginals, grid.kind, grid.operation)
        key = (solved.cells.shape, solved.cells.tobytes(), *(marginal.tobytes() for marginal in solved.marginals))
        seen.setdefault(key, solved)
    return tuple(seen.values())
