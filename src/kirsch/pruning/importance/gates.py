"""The entries of parameters from whose derivatives the derivative for the gate of a unit is computed.

The gate of a unit is a factor, with value 1, by which the unit is multiplied. For the values a of the unit, the
derivative of the loss L for the gate is the sum of a · ∂L/∂a. No activation is needed to compute it:

- If weights w read the unit, in sums of w · a, it is the sum of w · ∂L/∂w over these weights. It is exact for values
  after normalization and activation, for all layers that multiply the unit with a weight.
- If two activations are multiplied and summed over the unit, such as queries and keys, the gate multiplies one of the
  two. It is the sum of w · ∂L/∂w over the weights and biases that produce this one, a = w · x. If the values are
  normalized, the sum is over scale and bias of the normalization instead. The mean over the two activations is used.
- The gate of an expert multiplies its output: it is the sum over its last weight and bias.

A unit may be used in several of these ways; its gate multiplies all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kirsch.graph.kinds import EXPERT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group, ParameterAxis
    from kirsch.graph.labels import Labels


@dataclass(frozen=True)
class GatingEntries:
    """Entries of a parameter whose w · ∂L/∂w count for the gates of the units of a group.

    Args:
        name, axis: the parameter, and its axis on which the units occur.
        labels: labels of the axis.
        factor: factor of the sum over these entries.
    """

    name: str
    axis: int
    labels: Labels
    factor: float


def gating_entries(graph: Graph, group: Group) -> list[GatingEntries]:
    """Return the entries of the parameters whose w · ∂L/∂w are summed for the gates of the units of a group."""
    read = graph.input_axes(group) or (_last_weights(graph, group) if group.kind == EXPERT else [])
    produced = [key for key in group.footprint if key[0] in graph.parameters and key not in read]
    pairs = graph.coupling.marks.get("contracted with activations")
    if pairs is None or not pairs[group.components].any():
        return _entries(graph, read or produced, 1.0)
    scales = graph.axes_among(produced, "scale")
    if scales:
        shifts = graph.axes_among(produced, "shift")
        return [*_entries(graph, [*scales, *shifts], 1 / len(scales)), *_entries(graph, read, 1.0)]
    # The sum over all producing weights is that of queries, keys and, if they are in the group, values. The sum over
    # the weights that read the values equals that of the values, so that half of both sums counts them once.
    return _entries(graph, [*produced, *read], 1 / 2)


def _entries(graph: Graph, keys: Iterable[ParameterAxis], factor: float) -> list[GatingEntries]:
    return [GatingEntries(name, axis, graph.axes[name, axis], factor) for name, axis in keys]


def _last_weights(graph: Graph, experts: Group) -> list[ParameterAxis]:
    """Return the axes of experts in the weights whose products are the outputs of the experts, and in their biases.

    No other weight of the experts reads the outputs of such a weight. Empty if it is not known which weights these are.
    """
    component, contracted = graph.coupling.component, "contracted"
    inputs: dict[str, set[int]] = {}
    outputs: dict[str, set[int]] = {}
    for name, _ in experts.footprint:
        read = [axis for axis in (1, 2) if graph.has_mark((name, axis), contracted)]
        if name in graph.parameters and len(graph.tensors[name].shape) == len("EIO") and len(read) == 1:
            inputs[name] = set(component[graph.axes[name, read[0]]].tolist())
            outputs[name] = set(component[graph.axes.get((name, 3 - read[0]), np.zeros(0, np.int64))].tolist())
    last = [name for name in outputs if not any(outputs[name] & inputs[other] for other in inputs if other != name)]
    produced = set().union(*(outputs[name] for name in last))
    biases = [
        name
        for name, _ in experts.footprint
        if name in graph.parameters
        and len(graph.tensors[name].shape) == len("EO")
        and produced & set(component[graph.axes.get((name, 1), np.zeros(0, np.int64))].tolist())
    ]
    return [(name, 0) for name in (*last, *biases)]
