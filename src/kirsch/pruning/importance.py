"""Importances of the units of a group.

An importance takes a graph and a group, and returns one number per unit, larger for units that should be kept. It is
registered under a name with `@IMPORTANCES.register("name")`, or through the entry point group `kirsch.importance`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from kirsch.registry import Registry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group


class Importance(Protocol):
    """Signature of a registered importance."""

    def __call__(self, graph: Graph, group: Group, *, norm: int, seed: int) -> NDArray[np.float64]:
        """Return finite scores of the units of a group, shape (units,), larger for units that should be kept.

        Args:
            graph: `graph.values(name)` returns the weights.
            group: the units.
            norm: 1 or 2, for importances that use a norm.
            seed: seed of importances that draw random numbers.
        """


IMPORTANCES: Registry[Importance] = Registry("importance")


@IMPORTANCES.register("magnitude")
def magnitude(graph: Graph, group: Group, *, norm: int, seed: int) -> NDArray[np.float64]:
    """Return the magnitude of the weights of each unit, relative to the other units of the group.

    The magnitude of a slice of a weight is the mean of |w| (norm 1) or the root of the mean of w² (norm 2). Each weight
    that has a slice for each unit contributes, both in layers that produce the units and in layers that read them.
    Weights with one axis are used only if there are no others. The magnitudes of each weight are divided by their mean
    over the units, and averaged over the weights: an average unit has magnitude 1 in any layer.

    Source: Li et al. 2017, arXiv:1608.08710 (norm 1 of filters); the average over coupled layers after Fang et al.
        2023, arXiv:2301.12900, section 3.2.
    """
    del seed
    # An empty parameter has no mean.
    not_empty = {name for name in graph.parameters if 0 not in graph.tensors[name].shape}
    parameters = [(name, axis) for name, axis in group.footprint if name in not_empty]
    weights = [(name, axis) for name, axis in parameters if len(graph.tensors[name].shape) > 1] or parameters
    total = np.zeros(group.size)
    for name, axis in weights:
        powers = np.abs(graph.values(name).astype(np.float64)) ** norm
        per_index = powers.mean(axis=tuple(other for other in range(powers.ndim) if other != axis))
        labels = graph.axes[name, axis]
        magnitudes = _mean_per_unit(graph, group, labels, per_index) ** (1 / norm)
        mean = magnitudes.mean()
        total += magnitudes / mean if mean != 0 else 1.0  # the caller refuses NaN and infinity
    return total / max(len(weights), 1)


@IMPORTANCES.register("random")
def random(graph: Graph, group: Group, *, norm: int, seed: int) -> NDArray[np.float64]:
    """Return uniform random numbers, the baseline for other importances. Equal seeds give equal numbers."""
    del norm
    index = [other.name for other in graph.groups].index(group.name)
    return np.random.default_rng([seed, index]).uniform(size=group.size)


def _mean_per_unit(
    graph: Graph, group: Group, labels: NDArray[np.int64], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the mean of the values of each unit, over the indices of the axis that belong to the unit."""
    unit = np.full(len(graph.coupling.frozen), -1)
    unit[group.components] = group.unit_of()
    of_index = unit[graph.coupling.component[labels]]
    member = of_index >= 0
    sums = np.bincount(of_index[member], values[member], group.size)
    counts = np.bincount(of_index[member], minlength=group.size)
    return np.asarray(sums / np.maximum(counts, 1))
