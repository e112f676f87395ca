"""Description of the groups of a layer in words: the operations through which parameters are pruned together."""

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
"""Largest number of operations of a chain that are shown. For a longer chain, the first and last two are shown."""


class CoupledGraph(Protocol):
    """The parts of a `Graph` that explain the coupling of its parameters."""

    @property
    def facts(self) -> Facts:
        """Facts about labels, recorded from the operations."""

    @property
    def tensors(self) -> Mapping[str, object]:
        """Parameters and buffers, keyed by name."""

    @property
    def parameters(self) -> Sequence[str]:
        """Names in `tensors` that are parameters."""

    @property
    def coupling(self) -> Coupling:
        """The components of the labels, and which of them are frozen."""

    @property
    def axes(self) -> Mapping[ParameterAxis, NDArray[np.int64]]:
        """Labels of each axis of each parameter."""

    @property
    def groups(self) -> Sequence[Group]:
        """Groups of units."""


def explain(graph: CoupledGraph, layer: str) -> str:
    """Describe the groups of a layer; see `Graph.explain`."""
    parameters = [name for name in graph.tensors if name == layer or name.startswith(f"{layer}.")]
    if not parameters:
        layers = {
            name.rpartition(".")[0] or name for name in graph.tensors
        }  # parameters of the top-level module have no layer name
        raise UnknownNameError("layer with parameters named", layer, layers)
    layer_axes = [key for key in graph.axes if key[0] in parameters]
    lines: list[str] = []
    grouped: set[ParameterAxis] = set()
    for group in graph.groups:
        in_group = [key for key in group.footprint if key in layer_axes]
        if in_group:
            grouped.update(in_group)
            lines += _describe_group(graph, group, in_group)
    for key in layer_axes:
        if key not in grouped:
            lines.append(f"{_axis_text(key)} stays: {_reason(graph, key)}.")
    return "\n".join(lines)


def _describe_group(graph: CoupledGraph, group: Group, layer_axes: list[ParameterAxis]) -> list[str]:
    """Return lines on one group: its units on the axes of the layer, and the other axes that are pruned with them."""
    axes = ", ".join(map(_axis_text, layer_axes))
    paths = _shortest_paths(graph, group.components_of([0]), layer_axes[0])
    chains: dict[str, str] = {}
    indices: dict[str, list[str]] = {}
    for key in group.footprint:
        if key not in layer_axes:
            layer, _, parameter = _axis_text(key).rpartition(".")
            chain = f"by {_chain_text(paths[key])}" if key in paths else "by a number in the code that sets both sizes"
            # The path to a bias goes through the weight of its layer. The shorter text, for the weight, is shown.
            chains[layer] = min(chains.get(layer, chain), chain, key=len)
            indices.setdefault(layer, []).append(parameter)
    lines = [
        f"  {f'{layer}: ' if layer else ''}{', '.join(indices[layer])}  {chain}" for layer, chain in chains.items()
    ]
    return [
        f"{axes}: the {group.size} units ({group.kind}) of {group.name!r}.",
        "Each unit is removed together with:" if lines else "No other parameter is pruned with them.",
        *lines,
    ]


def _axis_text(key: ParameterAxis) -> str:
    """Return a parameter axis as an index expression, such as "conv.weight[:, i]"."""
    name, axis = key
    return f"{name}[{', '.join([*(':' * axis), 'i'])}]"


def _chain_text(operations: list[Operation]) -> str:
    """Return the operations with the module or line that runs them; repeats in a row are shown once."""
    names: list[str] = []
    for operation in operations:
        location = operation.module or operation.source
        name = f"{operation.name.removeprefix('aten.')}{f' ({location})' if location else ''}"
        if not names or names[-1] != name:
            names.append(name)
    if len(names) > SHOWN:
        names = [*names[: SHOWN // 2], f"… {len(names) - SHOWN} more …", *names[-SHOWN // 2 :]]
    return " → ".join(names)


def _reason(graph: CoupledGraph, key: ParameterAxis) -> str:
    """Return the reason why an axis that is in no group cannot be pruned."""
    component, why = graph.coupling.component, graph.coupling.why
    freezes = [why[c] for c in np.unique(component[graph.axes[key]]).tolist() if c in why]
    if not freezes and key[0] not in graph.parameters:
        return "it is an axis of a buffer, and neither parameters nor MACs depend on its size"
    if not freezes:
        return "its indices do not form a group of two or more units"
    operation = freezes[0].operation
    return f"{freezes[0].reason} ({operation.source or operation.module or operation.name})"


def _shortest_paths(
    graph: CoupledGraph, unit: NDArray[np.int64], start: ParameterAxis
) -> dict[ParameterAxis, list[Operation]]:
    """Return the operations on the shortest path from `start` to each parameter axis, by breadth-first search.

    The nodes of the search are the labels of the unit. The edges are the equalities and grids that tie the labels.
    """
    component = graph.coupling.component
    in_unit = np.zeros(len(graph.coupling.frozen), bool)
    in_unit[unit] = True
    edges = _edges(graph, in_unit[component])
    axes_with: dict[int, list[ParameterAxis]] = {}
    for key, labels in graph.axes.items():
        for label in labels[in_unit[component[labels]]].tolist():
            axes_with.setdefault(label, []).append(key)
    first = next(label for label, keys in axes_with.items() if start in keys)
    paths: dict[ParameterAxis, list[Operation]] = {}
    seen, queue = {first}, deque[tuple[int, "list[Operation]"]]([(first, [])])
    while queue:
        label, path = queue.popleft()
        for key in axes_with.get(label, ()):
            paths.setdefault(key, path)
        for other, operation in edges.get(label, ()):
            if other not in seen:
                seen.add(other)
                queue.append((other, [*path, operation]))
    return paths


def _edges(graph: CoupledGraph, in_unit: NDArray[np.bool_]) -> dict[int, list[tuple[int, Operation]]]:
    """Return the neighbors of each label of a unit, with the operation that ties the two."""
    facts = graph.facts
    edges: dict[int, list[tuple[int, Operation]]] = {}

    def tie(first: int, second: int, operation: Operation) -> None:
        edges.setdefault(first, []).append((second, operation))
        edges.setdefault(second, []).append((first, operation))

    for left, right, operation in zip(facts.left, facts.right, facts.equated_by, strict=True):
        selected = in_unit[left]
        for first, second in zip(left[selected].tolist(), right[selected].tolist(), strict=True):
            tie(first, second, operation)
    for grid in facts.grids:
        for axis, marginal in enumerate(grid.marginals):
            for index in np.flatnonzero(in_unit[marginal]).tolist():
                for cell in np.unique(grid.cells.take(index, axis)).tolist():
                    tie(int(marginal[index]), int(cell), grid.operation)
    return edges
