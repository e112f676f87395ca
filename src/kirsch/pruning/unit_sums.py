"""Sums over the units of several groups at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.pruning.traced_parameters import PlacedArrays

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group, ParameterAxis


class UnitSums:
    """Adds values that are given for each index of parameter axes, over the indices of each unit.

    Args:
        graph: graph of the model.
        axes: the axes whose values count, by group, with a factor. An axis may belong to several groups.

    Attributes:
        groups: the groups, in order. The units of the first group come first.
        axes: the parameter axes, each once.
        size: number of units of all groups.
        counts: number of parameters of each unit, float64 of shape (units,); a parameter that belongs to a unit on two
            axes counts twice.
    """

    def __init__(self, graph: Graph, axes: Mapping[Group, Mapping[ParameterAxis, float]]) -> None:
        self.groups = tuple(axes)
        self.axes = list(dict.fromkeys(key for keys in axes.values() for key in keys))
        self._position = {key: position for position, key in enumerate(self.axes)}
        lengths = np.array([len(graph.axes[key]) for key in self.axes], np.int64)
        starts, component = np.cumsum(lengths) - lengths, graph.coupling.component
        unit_of = np.full(len(graph.coupling.frozen), -1)
        indices, units, factors, self.size = [], [], [], 0
        for group, keys in axes.items():
            unit_of[group.components] = self.size + group.unit_of()
            for key, factor in keys.items():
                of_index = unit_of[component[graph.axes[key]]]
                members = np.flatnonzero(of_index >= 0)
                indices.append(starts[self._position[key]] + members)
                units.append(of_index[members])
                factors.append(np.full(len(members), factor, np.float32))
            unit_of[group.components] = -1
            self.size += group.size
        self._placed = PlacedArrays(
            index=np.concatenate(indices), unit=np.concatenate(units), factor=np.concatenate(factors)
        )
        slices = [
            np.full(n, np.prod(graph.tensors[name].shape) / n) for (name, _), n in zip(self.axes, lengths, strict=True)
        ]
        index, unit = self._placed.arrays["index"], self._placed.arrays["unit"]
        self.counts = np.bincount(unit, np.concatenate(slices)[index], self.size)

    def __call__(self, model: Any, values: Mapping[str, Any]) -> Any:
        """Return the sums of the entries of arrays over the slices of each unit, shape (units,).

        Args:
            model: the model to which the arrays belong.
            values: arrays by name of the parameter.
        """
        sums = []
        for name, axis in self.axes:
            others = tuple(other for other in range(len(values[name].shape)) if other != axis)
            sums.append(ops.sum(values[name], others) if others else values[name])
        return self.over_units(model, sums)

    def over_units(self, model: Any, sums: Sequence[Any]) -> Any:
        """Return the sums over each unit of values for each index of the axes, one array for each of `axes`."""
        joined = ops.concatenate(sums)
        placed = self._placed.beside(joined, model)
        values = ops.take_along_axis(joined, placed["index"]) * placed["factor"]
        return ops.segment_sum(values, placed["unit"], self.size)

    def by_group(self, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return an array of shape (units,) as one array for each group, by name."""
        ends = np.cumsum([group.size for group in self.groups])[:-1]
        return {group.name: part for group, part in zip(self.groups, np.split(values, ends), strict=True)}
