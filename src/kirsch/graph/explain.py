"""Why parameters go together: the chain of operations that ties one to another, in words."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kirsch.errors import UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.coupling import Coupling
    from kirsch.graph.facts import Facts, Operation
    from kirsch.graph.group import Group, ParameterAxis

SHOWN = 4
"""Operations of a chain that are named; of a longer one the ends."""


class CoupledGraph(Protocol):
    """The parts of a `Graph` that explain the coupling of its parameters."""

    @property
    def facts(self) -> Facts:
        """What the operations say of the labels."""

    @property
    def tensors(self) -> Mapping[str, object]:
        """Parameters and buffers by name."""

    @property
    def coupling(self) -> Coupling:
        """The components of the labels."""

    @property
    def axes(self) -> Mapping[ParameterAxis, NDArray[np.int64]]:
        """The labels of each axis of each parameter."""

    @property
    def groups(self) -> Sequence[Group]:
        """Groups of units."""


def explain(graph: CoupledGraph, layer: str) -> str:
    """See `Graph.explain`."""
    own = [name for name in graph.tensors if name == layer or name.startswith(f"{layer}.")]
    if not own:
        layers = {name.rpartition(".")[0] or name for name in graph.tensors}  # those of the model itself by their names
        raise UnknownNameError("layer with parameters named", layer, layers)
    sites = [site for site in graph.axes if site[0] in own]
    lines: list[str] = []
    told: set[ParameterAxis] = set()
    for group in graph.groups:
        touched = [site for site in group.footprint if site in sites]
        if touched:
            told.update(touched)
            lines += _group(graph, group, touched)
    for site in sites:
        if site not in told:
            lines.append(f"{_axis(site)} stays: {_reason(graph, site)}.")
    return "\n".join(lines)


def _group(graph: CoupledGraph, group: Group, touched: list[ParameterAxis]) -> list[str]:
    """One group: its units, and what goes with them."""
    held = f"{', '.join(_axis(site) for site in touched)}: the {group.size} units ({group.kind}) of {group.name!r}."
    roads = _roads(graph, group.of([0]), touched[0])
    chains: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    for site in group.footprint:
        if site not in touched:
            layer, _, own = _axis(site).rpartition(".")
            chain = f"by {_chain(roads[site])}" if site in roads else "as one number in the code gives both their sizes"
            chains[layer] = min(chains.get(layer, chain), chain, key=len)  # a bias is tied by way of the weight
            names.setdefault(layer, []).append(own)
    lines = [f"  {f'{layer}: ' if layer else ''}{', '.join(names[layer])}  {chain}" for layer, chain in chains.items()]
    return [held, "With each of them go:" if lines else "Nothing else goes with them.", *lines]


def _axis(site: ParameterAxis) -> str:
    name, axis = site
    return f"{name}[{', '.join([*(':' * axis), 'i'])}]"


def _chain(operations: list[Operation]) -> str:
    """The operations on the way, each once in a row, with the module or line that runs them."""
    names: list[str] = []
    for operation in operations:
        place = operation.module or operation.source
        name = f"{operation.name.removeprefix('aten.')}{f' ({place})' if place else ''}"
        if not names or names[-1] != name:
            names.append(name)
    if len(names) > SHOWN:
        names = [*names[: SHOWN // 2], f"… {len(names) - SHOWN} more …", *names[-SHOWN // 2 :]]
    return " → ".join(names)


def _reason(graph: CoupledGraph, site: ParameterAxis) -> str:
    component, why = graph.coupling.component, graph.coupling.why
    found = [why[c] for c in np.unique(component[graph.axes[site]]).tolist() if c in why]
    if not found:
        return "no smaller part of it can go alone"
    freeze = found[0]
    place = freeze.operation.source or freeze.operation.module or freeze.operation.name
    return f"{freeze.reason} ({place})"


def _roads(graph: CoupledGraph, unit: NDArray[np.int64], start: ParameterAxis) -> dict[ParameterAxis, list[Operation]]:
    """(parameter, axis) → the operations on the shortest way to it from the start, over what ties labels of a unit."""
    component = graph.coupling.component
    inside = np.zeros(len(graph.coupling.frozen), bool)
    inside[unit] = True
    edges = _edges(graph, inside[component])
    places: dict[int, list[ParameterAxis]] = {}
    for site, labels in graph.axes.items():
        for label in labels[inside[component[labels]]].tolist():
            places.setdefault(label, []).append(site)
    first = next(label for label, found in places.items() if start in found)
    roads: dict[ParameterAxis, list[Operation]] = {}
    seen, queue = {first}, deque[tuple[int, "list[Operation]"]]([(first, [])])
    while queue:
        label, way = queue.popleft()
        for site in places.get(label, ()):
            roads.setdefault(site, way)
        for other, operation in edges.get(label, ()):
            if other not in seen:
                seen.add(other)
                queue.append((other, [*way, operation]))
    return roads


def _edges(graph: CoupledGraph, inside: NDArray[np.bool_]) -> dict[int, list[tuple[int, Operation]]]:
    """Label → the labels that are tied to it, and by which operation; of the labels inside of a unit."""
    facts = graph.facts
    edges: dict[int, list[tuple[int, Operation]]] = {}

    def tie(first: int, second: int, operation: Operation) -> None:
        edges.setdefault(first, []).append((second, operation))
        edges.setdefault(second, []).append((first, operation))

    for left, right, operation in zip(facts.left, facts.right, facts.equated_by, strict=True):
        here = inside[left]
        for first, second in zip(left[here].tolist(), right[here].tolist(), strict=True):
            tie(first, second, operation)
    for grid in facts.grids:
        for axis, marginal in enumerate(grid.marginals):
            for position in np.flatnonzero(inside[marginal]).tolist():
                for cell in np.unique(grid.cells.take(position, axis)).tolist():
                    tie(int(marginal[position]), int(cell), grid.operation)
    return edges
