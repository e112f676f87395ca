"""Units, the smallest sets of components that can go, and groups of units with the same footprint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from kirsch.graph.coupling import Coupling
    from kirsch.graph.facts import Grid
    from kirsch.graph.labels import Labels

ParameterAxis = tuple[str, int]

KINDS = {
    "expert": "one of several weights among which the data choose the k with the largest scores, with its score",
    "kv group": "heads of queries that share keys and values: heads that repeat, or the first axis of a grid of heads",
    "head in kv group": "the second axis of that grid",
    "head": "an index that two activations have in common when they are multiplied, as queries and keys do",
    "head dim": "a position inside of heads, the same in all: summed over between activations, or in the values",
    "recurrent unit": "a unit of the state of an LSTM, GRU or plain recurrent layer",
    "conv group": "the first axis of the grid (groups, channels of each) that a grouped convolution makes",
    "position in conv group": "the second axis of that grid",
    "norm group": "the first axis of the grid (groups, channels of each) that a group normalization makes",
    "position in norm group": "the second axis of that grid",
    "embedding dim": "a column of an embedding table, or of a residual sum that linear layers read and write",
    "rank": "what linear layers compute for linear layers without an activation between, such as the rank of LoRA",
    "ffn unit": "what linear layers compute for others, but not in a pooler or head that sees one vector a sample",
    "block": "the first axis of the grid that any other reshape makes",
    "position in block": "another axis of that grid",
    "channel": "everything else",
}
"""The kinds of units, and how each is told; where several fit, the first. Most come from what operations mark."""

OF_GRIDS = {
    "norm groups": ("norm group", "position in norm group"),
    "conv groups": ("conv group", "position in conv group"),
}
"""The kinds of units that the axes of a grid make, the first and all others."""


@dataclass(frozen=True, eq=False)
class Group:
    """Units that touch the same axes of the same parameters, so that any of them can stand for another.

    Args:
        name: path of the first layer that produces the units.
        kind: one of `KINDS`.
        components: all components of all units, one unit after the other.
        starts: where each unit begins in `components`; shape (units,).
        footprint: (parameter, axis) that the units touch, in the order of the model.
    """

    name: str
    kind: str
    components: NDArray[np.int64]
    starts: NDArray[np.int64]
    footprint: tuple[ParameterAxis, ...]

    @property
    def size(self) -> int:
        """How many units there are."""
        return len(self.starts)

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the modules whose parameters or buffers change with the group, in the order of the model."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name, _ in self.footprint))

    def unit_of(self) -> NDArray[np.int64]:
        """For each entry of `components` the unit it belongs to."""
        return np.repeat(np.arange(self.size), np.diff(np.append(self.starts, len(self.components))))

    def of(self, units: Iterable[int]) -> NDArray[np.int64]:
        """The components of some units."""
        chosen = np.zeros(self.size, bool)
        chosen[units if isinstance(units, np.ndarray) else list(units)] = True
        return self.components[chosen[self.unit_of()]]


def find_groups(coupling: Coupling, axes: Mapping[ParameterAxis, Labels]) -> tuple[Group, ...]:
    """All groups of two or more units, in the order in which the model owns their layers.

    Args:
        coupling: the solved facts.
        axes: the label array of each axis of each parameter and buffer, in the order of the model.
    """
    keys = list(axes)
    sites = _Sites(coupling, axes)
    in_grid = np.zeros(len(coupling.frozen), bool)
    for grid in coupling.grids:
        in_grid[grid.cells.ravel()] = True
        for marginal in grid.marginals:
            in_grid[marginal] = True
    grouped = {
        (_kind(coupling, alone, "channel"), footprint): [(alone, np.ones(len(alone), np.int64))]
        for footprint, alone in sites.alike(np.flatnonzero(sites.touched & ~coupling.frozen & ~in_grid)).items()
    }
    for kind, unit in _closed_units(coupling, in_grid):
        footprint = sites.of(unit)
        if footprint:
            grouped.setdefault((_kind(coupling, unit, kind), footprint), []).append((unit, np.array([len(unit)])))
    groups, names = [], dict[str, int]()
    for (kind, footprint), members in sorted(grouped.items(), key=lambda item: item[0][1]):
        lengths = np.concatenate([found for _, found in members])
        if len(lengths) == 1:
            continue
        touched = tuple(keys[site] for site in footprint)
        name = _name(touched)
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}#{names[name]}"
        starts = np.cumsum(lengths) - lengths
        groups.append(Group(name, kind, np.concatenate([units for units, _ in members]), starts, touched))
    return tuple(groups)


def _name(footprint: tuple[ParameterAxis, ...]) -> str:
    """The module whose output the units are: the first that has them on axis 0 of a weight, else the first at all."""
    first = next((name for name, axis in footprint if axis == 0), footprint[0][0])
    return first.rpartition(".")[0] or first


def _kind(coupling: Coupling, components: NDArray[np.int64], otherwise: str) -> str:
    """The kind of a unit of these components, by what operations use them as."""

    def has(use: str) -> bool:
        return use in coupling.marks and bool(coupling.marks[use][components].any())

    if otherwise.endswith("kv group"):
        return otherwise
    for kind in ("expert", "kv group", "head", "head dim", "recurrent unit"):
        if has(kind):
            return kind
    linear = has("out of linear") and has("into linear") and not has("into convolution")
    if otherwise != "channel":
        return otherwise
    if has("embedded") or (linear and has("summed")):
        return "embedding dim"
    if linear and not has("activated"):
        return "rank"
    # A pooler or the head of a classifier computes one vector of many positions, and adds it to nothing.
    many = "positions" in coupling.marks or "into convolution" in coupling.marks
    pooled = has("one position") and not has("positions") and many
    return "ffn unit" if linear and (has("into sum") or not pooled) else "channel"


class _Sites:
    """Which (parameter, axis) each component sits on.

    A model has some hundred thousand components and only a few hundred different sets of sites, its *classes*. They are
    told apart by a random 64-bit number for each site, summed over the sites of a component.
    """

    def __init__(self, coupling: Coupling, axes: Mapping[ParameterAxis, Labels]) -> None:
        signature = np.zeros(len(coupling.frozen), np.int64)
        numbers = np.random.default_rng(0).integers(1, 2**62, len(axes))
        for number, labels in zip(numbers, axes.values(), strict=True):
            signature[coupling.component[labels]] += number  # once, however often a component occurs; wraps around
        self.touched = signature != 0
        _, first, self._class = np.unique(signature, return_index=True, return_inverse=True)
        self._sites: list[list[int]] = [[] for _ in first]
        is_first = np.zeros(len(coupling.frozen), bool)
        is_first[first] = True
        for site, labels in enumerate(axes.values()):
            components = coupling.component[labels]
            for found in np.unique(self._class[components[is_first[components]]]).tolist():
                self._sites[found].append(site)

    def of(self, components: NDArray[np.int64]) -> tuple[int, ...]:
        """The sites of some components."""
        sites = [self._sites[found] for found in np.unique(self._class[components]).tolist()]
        return tuple(sorted(set().union(*sites)))

    def alike(self, components: NDArray[np.int64]) -> dict[tuple[int, ...], NDArray[np.int64]]:
        """Components that are units of their own, ascending, by their sites."""
        found = self._class[components]
        order = np.argsort(found, kind="stable")
        parts = np.split(components[order], np.flatnonzero(np.diff(found[order])) + 1)
        return {self.of(part[:1]): part for part in parts if len(part)}


def _closed_units(coupling: Coupling, in_grid: NDArray[np.bool_]) -> list[tuple[str, NDArray[np.int64]]]:
    """The units that grids make: each marginal that is not a cell itself, closed so that every grid stays a product."""
    cells = np.zeros(len(coupling.frozen), bool)
    for grid in coupling.grids:
        cells[grid.cells.ravel()] = True
    closure = _Closure(coupling)
    units: dict[bytes, tuple[str, NDArray[np.int64]]] = {}
    for seed in np.flatnonzero(in_grid & ~cells & ~coupling.frozen).tolist():
        closed = closure.of(seed)
        if closed is not None:
            units.setdefault(closed.tobytes(), (closure.kind(seed), closed))
    return list(units.values())


def _of_grid(coupling: Coupling, grid: Grid, axis: int) -> str:
    """The kind of the units on an axis of a grid."""
    if "head" in coupling.marks and coupling.marks["head"][grid.cells].all():
        return "head in kv group" if axis else "kv group"
    return OF_GRIDS.get(grid.kind, ("block", "position in block"))[axis > 0]


class _Closure:
    """Closes sets of components so that every grid stays a product.

    A marginal that goes takes its slab of cells along. A cell that goes must lie in a slab that goes, in every grid
    that holds it; where it does not, the slab that adds the fewest cells goes too.
    """

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        members = [np.unique(np.concatenate([g.cells.ravel(), *g.marginals])) for g in coupling.grids]
        grids = np.repeat(np.arange(len(members)), [len(own) for own in members])
        merged = np.concatenate([*members, np.zeros(0, np.int64)])
        order = np.argsort(merged, kind="stable")
        self._grids = grids[order]  # of each component in turn
        self._first = np.searchsorted(merged[order], np.arange(len(coupling.frozen) + 1))
        self._gone = np.zeros(len(coupling.frozen), bool)
        self._known: dict[int, NDArray[np.int64] | None] = {}
        self._is_known = np.zeros(len(coupling.frozen), bool)
        alone = np.diff(self._first) == 1
        sizes = [grid.cells.size + sum(len(np.unique(m)) for m in grid.marginals) for grid in coupling.grids]
        self._simple = [
            bool(alone[grid.cells].all()) and len(own) == size
            for grid, own, size in zip(coupling.grids, members, sizes, strict=True)
        ]
        self._kinds = [[_of_grid(coupling, grid, axis) for axis in range(grid.cells.ndim)] for grid in coupling.grids]
        self._on: dict[int, list[tuple[int, int]]] = {}  # marginal → the grids, by their places, and the axes it is on
        for place, grid in enumerate(coupling.grids):
            for axis, marginal in enumerate(grid.marginals):
                for component in np.unique(marginal).tolist():
                    self._on.setdefault(component, []).append((place, axis))

    def kind(self, seed: int) -> str:
        """What the units of a marginal are called."""
        kinds = [self._kinds[place][axis] for place, axis in self._on[seed]]
        return next((kind for kind in kinds if kind.endswith("kv group")), kinds[0])

    def of(self, seed: int) -> NDArray[np.int64] | None:
        """The smallest set found that holds the seed, sorted; None if it meets a frozen component."""
        gone, found = self._gone, [np.array([seed])]
        if all(self._simple[place] for place, _ in self._on[seed]):  # no cell of them lies in another grid, or twice
            on = [(self._coupling.grids[place], axis) for place, axis in self._on[seed]]
            slabs = [grid.cells.compress(grid.marginals[axis] == seed, axis).ravel() for grid, axis in on]
            closed = np.sort(np.concatenate([*found, *slabs]))
            return None if self._coupling.frozen[closed].any() else closed
        gone[seed] = True
        try:
            whole = self._closed(found)
        finally:
            for components in found:
                gone[components] = False
        self._known[seed] = whole
        self._is_known[seed] = True
        return whole

    def _closed(self, found: list[NDArray[np.int64]]) -> NDArray[np.int64] | None:
        """What is found grown until it is closed. A set that is closed already is taken as a whole.

        The first grids come first: their marginals are the seeds that were closed before.
        """
        waiting = self._of_components(found[0])
        while waiting:
            more = self._wanted(waiting.pop(0))
            if more is None or self._coupling.frozen[more].any():
                return None
            if not len(more):
                continue
            self._gone[more] = True
            found.append(more)
            whole = [self._known[seed] for seed in more[self._is_known[more]].tolist()]
            for closed in whole:
                if closed is None:
                    return None
                found.append(closed[~self._gone[closed]])
                self._gone[found[-1]] = True
                if sum(map(len, found)) == len(closed):
                    return closed
            known = {id(grid) for grid in waiting}
            waiting += [grid for grid in self._of_components(more) if id(grid) not in known]
        return np.sort(np.concatenate(found))

    def _of_components(self, components: NDArray[np.int64]) -> list[Grid]:
        """The grids that hold some components, as cells or as marginals."""
        first, last = self._first[components], self._first[components + 1]
        numbers = last - first
        within = np.arange(numbers.sum()) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        places = np.unique(self._grids[np.repeat(first, numbers) + within])
        return [self._coupling.grids[place] for place in places.tolist()]

    def _wanted(self, grid: Grid) -> NDArray[np.int64] | None:
        """What else must go for a grid to stay a product; None if it cannot."""
        covered = np.zeros(grid.cells.shape, bool)
        for axis, marginal in enumerate(grid.marginals):
            shape = [-1 if place == axis else 1 for place in range(covered.ndim)]
            covered |= self._gone[marginal].reshape(shape)
        cells = self._gone[grid.cells]
        if (covered & ~cells).any():
            return np.unique(grid.cells[covered & ~cells])
        bare = np.argwhere(cells & ~covered)
        return self._cheapest_slab(grid, grid.cells[tuple(bare[0])]) if len(bare) else bare[:, 0]

    def _cheapest_slab(self, grid: Grid, cell: np.int64) -> NDArray[np.int64] | None:
        """The marginals that must go for a cell to go; None if none can go."""
        best: tuple[int, NDArray[np.int64]] | None = None
        where = np.argwhere(grid.cells == cell)
        for axis, marginal in enumerate(grid.marginals):
            needed = np.unique(marginal[where[:, axis]])
            if self._coupling.frozen[needed].any():
                continue
            slab = np.unique(grid.cells.take(np.unique(where[:, axis]), axis))
            new = int((~self._gone[slab]).sum())
            if best is None or new < best[0]:
                best = (new, needed[~self._gone[needed]])
        return None if best is None else best[1]
