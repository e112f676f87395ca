"""Components: sets of labels that are removed together, and which of them are frozen.

All equalities are solved at once. The grids (see `kirsch.graph.facts`) are then simplified in two ways:
- If all marginals of a grid axis are frozen, the cells along that axis are tied and the axis is dropped.
- A slab of a grid is the set of all cells with one index on one axis, such as a row or a column. If two grids split the
  same cells into the same slabs, the marginals of the two grids are tied.
Both simplifications add ties, so they are repeated until nothing changes.
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
    """Components of all labels: the solution of the facts about a model.

    Args:
        component: component of each label, int64 of shape (labels,).
        frozen: mask of components that cannot be removed, bool of shape (components,).
        grids: the remaining grids, with components instead of labels.
        marks: role → mask of the components that operations use in this role, bool of shape (components,).
        why: component → the first freeze of one of its labels.
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
    """Return the components that follow from the facts about a model.

    Args:
        facts: the facts of a model.
        ties: further pairs of label arrays that are removed together.
        more: further freezes.
        equal: result of `equalities(facts)`, which is computed if this is None.
    """
    component = _tied(equalities(facts) if equal is None else equal, ties)
    freezes = [*facts.freezes, *more]
    grids, frozen_labels = list(facts.grids), [freeze.labels for freeze in freezes]
    fixed_grids: list[Grid] = []
    while True:
        frozen = np.zeros(component.max() + 1, bool)
        frozen[component[np.concatenate([[0], *frozen_labels])]] = True
        grids, tied, fixed = _collapse(grids, component, frozen)
        tied += _equal_grid_ties(grids, component)
        if not tied and not fixed:
            break
        component = _tied(component, tied)
        frozen_labels += [grid.cells.ravel() for grid in fixed]
        fixed_grids += fixed
    marks = {}
    for use, marked in facts.marks.items():
        marks[use] = np.zeros(len(frozen), bool)
        for labels in {id(labels): labels for labels in marked}.values():
            marks[use][component[labels]] = True
    return Coupling(component, frozen, _distinct(grids, component), marks, _causes(freezes, fixed_grids, component))


def _causes(freezes: Sequence[Freeze], fixed_grids: Sequence[Grid], component: NDArray[np.int64]) -> dict[int, Freeze]:
    """Return the first freeze of each component.

    In a grid whose axes are all frozen, a cell without a freeze gets the freeze of a marginal.
    """
    why: dict[int, Freeze] = {}
    for freeze in freezes:
        for frozen in np.unique(component[freeze.labels]).tolist():
            why.setdefault(frozen, freeze)
    for grid in fixed_grids:  # a marginal that is a cell of an earlier grid already has a cause
        # The reason for the longest axis is the most useful one. In a grid (3, heads, width), it is clear why the axis
        # of size 3 is frozen, but not why the heads or the width are.
        longest_first = sorted(grid.marginals, key=len, reverse=True)
        marginals = component[np.concatenate(longest_first)].tolist()
        causes = [why[marginal] for marginal in marginals if marginal in why]
        for cell in np.unique(component[grid.cells]).tolist() if causes else ():
            why.setdefault(cell, causes[0])
    return why


def equalities(facts: Facts) -> NDArray[np.int64]:
    """Return the component of each label by the equalities alone, int64 of shape (labels,)."""
    return _tied(np.arange(facts.count), list(zip(facts.left, facts.right, strict=True)))


def _tied(component: NDArray[np.int64], ties: Sequence[tuple[Labels, Labels]]) -> NDArray[np.int64]:
    """Return the component of each label after adding ties; components are numbered by their first labels.

    Union-find on arrays. In every round, the parent of each component becomes the smallest component that it is tied
    to, for all ties at once. A chain of ties needs one round, a star needs two.
    """
    if not ties:
        return component
    # A model is traced in evaluation and in training mode, so most ties occur twice.
    distinct = {(id(left), id(right)): (left, right) for left, right in ties}.values()
    one, other = (component[np.concatenate(side)] for side in zip(*distinct, strict=True))
    root = np.arange(component.max() + 1)
    while (differs := one != other).any():
        one, other = one[differs], other[differs]
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while ((parent := root[root]) != root).any():
            root = parent
        one, other = root[one], root[other]
    number = np.cumsum(root == np.arange(len(root))) - 1
    return number[root][component]


def _collapse(
    grids: Sequence[Grid], component: NDArray[np.int64], frozen: NDArray[np.bool_]
) -> tuple[list[Grid], list[tuple[Labels, Labels]], list[Grid]]:
    """Drop the frozen axes of grids. Return the remaining grids, the new ties, and the grids without a free axis."""
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


def _equal_grid_ties(grids: Sequence[Grid], component: NDArray[np.int64]) -> list[tuple[Labels, Labels]]:
    """Return ties between the marginals of grids that split the same cells into the same slabs.

    The hash of a slab is the sum of a random 64-bit number per component.
    """
    hashes = np.random.default_rng(0).integers(1, 2**62, component.max() + 1)
    seen: dict[tuple[bytes, ...], list[Labels]] = {}
    ties: list[tuple[Labels, Labels]] = []
    for grid in grids:
        cells = hashes[component[grid.cells]]
        slabs = [cells.sum(tuple({*range(cells.ndim)} - {axis})) for axis in range(cells.ndim)]
        cuts = [np.unique(sums, return_index=True) for sums in slabs]
        marginals = [marginal[first] for marginal, (_, first) in zip(grid.marginals, cuts, strict=True)]
        ties += zip(marginals, seen.setdefault(tuple(sums.tobytes() for sums, _ in cuts), marginals), strict=True)
    return [(left, right) for left, right in ties if (component[left] != component[right]).any()]


def _distinct(grids: Sequence[Grid], component: NDArray[np.int64]) -> tuple[Grid, ...]:
    """Return the grids with components instead of labels, without duplicates."""
    seen: dict[tuple[object, ...], Grid] = {}
    for grid in grids:
        marginals = tuple(component[marginal] for marginal in grid.marginals)
        solved = Grid(component[grid.cells], marginals, grid.kind, grid.operation)
        key = (solved.cells.shape, solved.cells.tobytes(), *(marginal.tobytes() for marginal in solved.marginals))
        seen.setdefault(key, solved)
    return tuple(seen.values())
