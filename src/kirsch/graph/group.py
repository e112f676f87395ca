"""Units, the smallest sets of components that can be removed, and groups of units with the same footprint.

A component is a set of coupled labels; see `kirsch.graph.coupling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kirsch import figures
from kirsch.graph.kinds import GRID_UNIT_KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from kirsch.graph.coupling import Coupling
    from kirsch.graph.facts import Grid
    from kirsch.graph.labels import Labels

ParameterAxis = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Group:
    """Interchangeable units: all of them occur on the same axes of the same parameters.

    Args:
        name: path of the first layer that produces the units.
        kind: one of `kirsch.graph.kinds.KINDS`.
        components: components of the first unit, then of the second, ...; see `kirsch.graph.coupling`.
        starts: index in `components` at which each unit begins, shape (units,).
        footprint: the parameter axes (name, axis) on which the units occur, in the order of the model.
    """

    name: str
    kind: str
    components: NDArray[np.int64]
    starts: NDArray[np.int64]
    footprint: tuple[ParameterAxis, ...]

    def __repr__(self) -> str:
        """Return one line."""
        layers = figures.counted(len(self.layers), "layer")
        return f"<Group {self.name}: {figures.counted(self.size, 'unit')} of kind {self.kind}, in {layers}>"

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.starts)

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the modules whose parameters or buffers are pruned with the group, in the order of the model."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name, _ in self.footprint))

    def unit_of(self) -> NDArray[np.int64]:
        """Return the index of the unit to which each entry of `components` belongs."""
        return np.repeat(np.arange(self.size), np.diff(np.append(self.starts, len(self.components))))

    def components_of(self, units: Iterable[int]) -> NDArray[np.int64]:
        """Return the components of the given units."""
        selected = np.zeros(self.size, bool)
        selected[units if isinstance(units, np.ndarray) else list(units)] = True
        return self.components[selected[self.unit_of()]]


def find_groups(coupling: Coupling, axes: Mapping[ParameterAxis, Labels]) -> tuple[Group, ...]:
    """Return all groups of two or more units, in the order of the model's layers.

    Args:
        coupling: the components of the model.
        axes: labels of each axis of each parameter and buffer, in the order of the model.
    """
    parameter_axes = list(axes)
    footprints = _Footprints(coupling, axes)
    in_grid = np.zeros(len(coupling.frozen), bool)
    for grid in coupling.grids:
        in_grid[grid.cells.ravel()] = True
        for marginal in grid.marginals:
            in_grid[marginal] = True
    single = np.flatnonzero(footprints.on_parameter & ~coupling.frozen & ~in_grid)
    members = {  # (kind, footprint) → components of units, with the number of components of each unit
        (_kind(coupling, components, "channel"), footprint): [(components, np.ones(len(components), np.int64))]
        for footprint, components in footprints.partition(single).items()
    }
    for kind, unit in _closed_units(coupling, in_grid):
        footprint = footprints.of(unit)
        if footprint:
            members.setdefault((_kind(coupling, unit, kind), footprint), []).append((unit, np.array([len(unit)])))
    groups, names = [], dict[str, int]()
    for (kind, footprint), units in sorted(members.items(), key=lambda item: item[0][1]):
        lengths = np.concatenate([lengths for _, lengths in units])
        if len(lengths) == 1:
            continue
        touched = tuple(parameter_axes[index] for index in footprint)
        name = _name(touched)
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}#{names[name]}"
        starts = np.cumsum(lengths) - lengths
        groups.append(Group(name, kind, np.concatenate([components for components, _ in units]), starts, touched))
    return tuple(groups)


def _name(footprint: tuple[ParameterAxis, ...]) -> str:
    """Return the path of the first module with the units on axis 0 of a parameter, or else of the first module."""
    first = next((name for name, axis in footprint if axis == 0), footprint[0][0])
    return first.rpartition(".")[0] or first


def _kind(coupling: Coupling, components: NDArray[np.int64], default: str) -> str:
    """Return the kind of a unit from the marks of its components; `default` if no mark gives a kind."""

    def has(mark: str) -> bool:
        return mark in coupling.marks and bool(coupling.marks[mark][components].any())

    if default.endswith("kv group"):
        return default
    for kind in ("expert", "kv group", "head", "head dim", "recurrent unit"):
        if has(kind):
            return kind
    linear = has("out of linear") and has("into linear") and not has("into convolution")
    if default != "channel":
        return default
    if has("embedded") or (linear and has("summed")):
        return "embedding dim"
    if linear and not has("activated"):
        return "rank"
    # A pooler or classifier head computes one vector from many positions and does not add it to a residual stream.
    many_positions = "positions" in coupling.marks or "into convolution" in coupling.marks
    pooled = has("one position") and not has("positions") and many_positions
    return "ffn unit" if linear and (has("into sum") or not pooled) else "channel"


class _Footprints:
    """The footprint of each component: indices of the parameter axes on which the component occurs, ascending.

    A model has some hundred thousand components and only a few hundred different footprints. The hash of a footprint
    is the sum of a random 64-bit number per parameter axis.
    """

    def __init__(self, coupling: Coupling, axes: Mapping[ParameterAxis, Labels]) -> None:
        hashes = np.zeros(len(coupling.frozen), np.int64)
        numbers = np.random.default_rng(0).integers(1, 2**62, len(axes))
        for number, labels in zip(numbers, axes.values(), strict=True):
            # `+=` adds the number once to each component, however often it occurs. The sum may wrap around.
            hashes[coupling.component[labels]] += number
        self.on_parameter = hashes != 0
        _, first, self._footprint = np.unique(hashes, return_index=True, return_inverse=True)
        self._axes: list[list[int]] = [[] for _ in first]
        is_first = np.zeros(len(coupling.frozen), bool)
        is_first[first] = True
        for index, labels in enumerate(axes.values()):
            components = coupling.component[labels]
            for footprint in np.unique(self._footprint[components[is_first[components]]]).tolist():
                self._axes[footprint].append(index)

    def of(self, components: NDArray[np.int64]) -> tuple[int, ...]:
        """Return the union of the footprints of some components."""
        axes = [self._axes[footprint] for footprint in np.unique(self._footprint[components]).tolist()]
        return tuple(sorted(set().union(*axes)))

    def partition(self, components: NDArray[np.int64]) -> dict[tuple[int, ...], NDArray[np.int64]]:
        """Return the components of each footprint, ascending."""
        footprints = self._footprint[components]
        order = np.argsort(footprints, kind="stable")
        parts = np.split(components[order], np.flatnonzero(np.diff(footprints[order])) + 1)
        return {self.of(part[:1]): part for part in parts if len(part)}


def _closed_units(coupling: Coupling, in_grid: NDArray[np.bool_]) -> list[tuple[str, NDArray[np.int64]]]:
    """Return the kind and components of the units of grids.

    Each marginal that is not itself a cell gives a unit: the components that must be removed together with the marginal
    so that every grid stays consistent; see `_Closure`.
    """
    cells = np.zeros(len(coupling.frozen), bool)
    for grid in coupling.grids:
        cells[grid.cells.ravel()] = True
    closure = _Closure(coupling)
    units: dict[bytes, tuple[str, NDArray[np.int64]]] = {}
    for seed in np.flatnonzero(in_grid & ~cells & ~coupling.frozen).tolist():
        closed = closure.close(seed)
        if closed is not None:
            units.setdefault(closed.tobytes(), (closure.kind(seed), closed))
    return list(units.values())


def _grid_unit_kind(coupling: Coupling, grid: Grid, axis: int) -> str:
    if "head" in coupling.marks and coupling.marks["head"][grid.cells].all():
        return "head in kv group" if axis else "kv group"
    return GRID_UNIT_KINDS.get(grid.kind, ("chunk", "position in chunk"))[axis > 0]


class _Closure:
    """Extends sets of removed components until every grid is consistent.

    A grid is consistent if a cell is kept if and only if all its marginals are kept. Removing a marginal removes its
    slab: all cells with this index on the axis of the marginal, such as a row or a column. If a removed cell lies in
    another grid, a slab of that grid that contains the cell must be removed, too. The slab that removes the fewest
    further cells is chosen.
    """

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        members = [np.unique(np.concatenate([g.cells.ravel(), *g.marginals])) for g in coupling.grids]
        grids = np.repeat(np.arange(len(members)), [len(components) for components in members])
        merged = np.concatenate([*members, np.zeros(0, np.int64)])
        order = np.argsort(merged, kind="stable")
        self._grids = grids[order]  # grid indices of component 0, then of component 1, ...
        self._first = np.searchsorted(merged[order], np.arange(len(coupling.frozen) + 1))
        self._removed = np.zeros(len(coupling.frozen), bool)
        self._known: dict[int, NDArray[np.int64] | None] = {}
        self._is_known = np.zeros(len(coupling.frozen), bool)
        in_one_grid = np.diff(self._first) == 1
        sizes = [grid.cells.size + sum(len(np.unique(m)) for m in grid.marginals) for grid in coupling.grids]
        self._simple = [  # whether no cell of the grid lies in another grid or occurs twice in this one
            bool(in_one_grid[grid.cells].all()) and len(components) == size
            for grid, components, size in zip(coupling.grids, members, sizes, strict=True)
        ]
        self._kinds = [
            [_grid_unit_kind(coupling, grid, axis) for axis in range(grid.cells.ndim)] for grid in coupling.grids
        ]
        self._grid_axes: dict[int, list[tuple[int, int]]] = {}  # marginal → (index of a grid, axis)
        for index, grid in enumerate(coupling.grids):
            for axis, marginal in enumerate(grid.marginals):
                for component in np.unique(marginal).tolist():
                    self._grid_axes.setdefault(component, []).append((index, axis))

    def kind(self, seed: int) -> str:
        """Return the kind of the unit that the removal of the marginal `seed` gives."""
        kinds = [self._kinds[index][axis] for index, axis in self._grid_axes[seed]]
        return next((kind for kind in kinds if kind.endswith("kv group")), kinds[0])

    def close(self, seed: int) -> NDArray[np.int64] | None:
        """Return the components removed together with a marginal, sorted; None if one of them is frozen."""
        parts = [np.array([seed])]
        if all(self._simple[index] for index, _ in self._grid_axes[seed]):
            grid_axes = [(self._coupling.grids[index], axis) for index, axis in self._grid_axes[seed]]
            slabs = [grid.cells.compress(grid.marginals[axis] == seed, axis).ravel() for grid, axis in grid_axes]
            closed = np.sort(np.concatenate([*parts, *slabs]))
            return None if self._coupling.frozen[closed].any() else closed
        self._removed[seed] = True
        try:
            result = self._extend(parts)
        finally:
            for components in parts:
                self._removed[components] = False
        self._known[seed] = result
        self._is_known[seed] = True
        return result

    def _extend(self, parts: list[NDArray[np.int64]]) -> NDArray[np.int64] | None:
        """Extend `parts`, disjoint sets of removed components, until every grid is consistent.

        Returns:
            The union of the parts, sorted; None if a frozen component would have to be removed.
        """
        # The grids are visited in their order, so that the grids of earlier seeds, whose closed sets are known, come
        # first.
        waiting = self._grids_with(parts[0])
        while waiting:
            more = self._missing(waiting.pop(0))
            if more is None or self._coupling.frozen[more].any():
                return None
            if not len(more):
                continue
            self._removed[more] = True
            parts.append(more)
            for closed in [self._known[seed] for seed in more[self._is_known[more]].tolist()]:
                if closed is None:
                    return None
                parts.append(closed[~self._removed[closed]])
                self._removed[parts[-1]] = True
                if sum(map(len, parts)) == len(closed):
                    return closed
            queued = {id(grid) for grid in waiting}
            waiting += [grid for grid in self._grids_with(more) if id(grid) not in queued]
        return np.sort(np.concatenate(parts))

    def _grids_with(self, components: NDArray[np.int64]) -> list[Grid]:
        """Return the grids that contain some of the components, as cells or marginals."""
        first, last = self._first[components], self._first[components + 1]
        counts = last - first
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        indices = np.unique(self._grids[np.repeat(first, counts) + offsets])
        return [self._coupling.grids[index] for index in indices.tolist()]

    def _missing(self, grid: Grid) -> NDArray[np.int64] | None:
        """Return further components to remove so that the grid is consistent; None if that is impossible."""
        in_slab = np.zeros(grid.cells.shape, bool)
        for axis, marginal in enumerate(grid.marginals):
            shape = [-1 if other == axis else 1 for other in range(in_slab.ndim)]
            in_slab |= self._removed[marginal].reshape(shape)
        cells = self._removed[grid.cells]
        if (in_slab & ~cells).any():
            return np.unique(grid.cells[in_slab & ~cells])
        uncovered = np.argwhere(cells & ~in_slab)
        return self._cheapest_slab(grid, grid.cells[tuple(uncovered[0])]) if len(uncovered) else uncovered[:, 0]

    def _cheapest_slab(self, grid: Grid, cell: np.int64) -> NDArray[np.int64] | None:
        """Return the marginals of the slab that contains the cell and removes the fewest further cells.

        Return None if these marginals are frozen on every axis.
        """
        best: tuple[int, NDArray[np.int64]] | None = None
        indices = np.argwhere(grid.cells == cell)
        for axis, marginal in enumerate(grid.marginals):
            needed = np.unique(marginal[indices[:, axis]])
            if self._coupling.frozen[needed].any():
                continue
            slab = np.unique(grid.cells.take(np.unique(indices[:, axis]), axis))
            added = int((~self._removed[slab]).sum())
            if best is None or added < best[0]:
                best = (added, needed[~self._removed[needed]])
        return None if best is None else best[1]
