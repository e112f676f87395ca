"""Units of groups whose removal gives the sizes of a model that was built from a changed configuration."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph

    Decrease = Mapping[tuple[str, int], int]  # axis of a tensor → decrease of its size, for the axes that change


class Footprints:
    """Number of indices that a unit of each group occupies on each axis of the stored tensors.

    Args:
        graph: graph of the model.
        axes: (name, axis) of the stored tensors.
        names: name of each stored tensor → its name in the graph, which differs in a model with adapters.
    """

    def __init__(self, graph: Graph, axes: Sequence[tuple[str, int]], names: Mapping[str, str]) -> None:
        self._graph = graph
        self._rows = {axis: row for row, axis in enumerate(axes)}
        self._labels = [graph.tensors[names[name]].axes[axis] if name in names else None for name, axis in axes]
        self._counts = np.zeros((len(axes), len(graph.groups)))
        owner = np.full(len(graph.coupling.frozen), -1)
        for column, group in enumerate(graph.groups):
            owner[:] = -1
            owner[group.components] = group.unit_of()
            for row, labels in enumerate(self._labels):
                if labels is not None:
                    units = owner[graph.coupling.component[labels]]
                    counts = np.bincount(units[units >= 0], minlength=group.size)
                    # A group whose units occupy different numbers of indices has no width that a number could state.
                    self._counts[row, column] = counts[0] if (counts == counts[0]).all() else np.nan

    def within(self, path: str) -> bool:
        """Return whether a module, or a module inside it, has units of a group."""
        rows = [row for (name, _), row in self._rows.items() if not path or name.startswith(f"{path}.")]
        return bool((self._counts[rows] != 0).any())

    def touches(self, axis: tuple[str, int]) -> bool:
        """Return whether an axis has units of a group."""
        return bool((self._counts[self._rows[axis]] != 0).any())

    def removed(self, keep: NDArray[np.bool_]) -> dict[tuple[str, int], int]:
        """Return the decrease of each axis that loses indices, for a mask of kept components."""
        component = self._graph.coupling.component
        counts = [0 if labels is None else int((~keep[component[labels]]).sum()) for labels in self._labels]
        return {axis: count for axis, count in zip(self._rows, counts, strict=True) if count}

    def solutions(self, decrease: Decrease) -> Iterator[dict[str, int]]:
        """Yield numbers of units by group whose removal decreases the axes by given amounts, and no other axis.

        Groups of few kinds are tried first. There may be several solutions: fewer heads and narrower heads can give the
        same sizes.
        """
        wanted = np.zeros(len(self._rows))
        for axis, amount in decrease.items():
            wanted[self._rows[axis]] = amount
        groups = self._graph.groups
        unfit = np.isnan(self._counts) | ((self._counts > 0) & (wanted == 0)[:, None])
        usable = np.flatnonzero(~unfit.any(axis=0) & (self._counts > 0).any(axis=0)).tolist()
        kinds = list(dict.fromkeys(groups[column].kind for column in usable))
        for number in range(1, len(kinds) + 1):
            for chosen in itertools.combinations(kinds, number):
                columns = [column for column in usable if groups[column].kind in chosen]
                counts = np.rint(np.linalg.lstsq(self._counts[:, columns], wanted)[0])
                if (counts < 1).any() or not (self._counts[:, columns] @ counts == wanted).all():
                    continue
                units = {groups[column].name: int(n) for column, n in zip(columns, counts.tolist(), strict=True)}
                if self._gives(units, decrease):
                    yield units

    def _gives(self, units: dict[str, int], decrease: Decrease) -> bool:
        """Return whether the removal of units gives the decrease, also on axes that several groups share."""
        sizes = {group.name: group.size for group in self._graph.groups}
        if any(count >= sizes[name] for name, count in units.items()):
            return False
        return self.removed(self._graph.keep({name: tuple(range(n)) for name, n in units.items()})) == decrease
