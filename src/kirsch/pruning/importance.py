"""How much each unit of a group matters.

An importance takes a graph and a group and gives one number per unit, larger for what should stay. It is added under a
name with `@IMPORTANCES.register("name")`, or by another package through the entry point group `kirsch.importance`.
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
    """What a registered importance looks like."""

    def __call__(self, graph: Graph, group: Group, *, norm: int, seed: int) -> NDArray[np.float64]:
        """Scores of the units of a group, finite, shape (units,), larger for what should stay.

        Args:
            graph: gives the weights by `graph.values(name)`.
            group: the units.
            norm: 1 or 2, for those that measure a size.
            seed: for those that draw.
        """


IMPORTANCES: Registry[Importance] = Registry("importance")


@IMPORTANCES.register("magnitude")
def magnitude(graph: Graph, group: Group, *, norm: int, seed: int) -> NDArray[np.float64]:
    """The size of the weights that go with a unit, relative to the other units of the group.

    For each weight of two or more axes that the group touches, producers and consumers alike, the size of a unit's
    slice is the mean of |w| (norm 1) or the root of the mean of w² (norm 2). Each weight's sizes are divided by their
    mean over the units, and the weights are averaged: 1 is a unit of ordinary size, in any layer.

    Source: Li et al. 2017, arXiv:1608.08710 (norm 1 of filters); the average over coupled layers after Fang et al.
        2023, arXiv:2301.12900, section 3.2.
    """
    del seed
    full = {name for name in graph.parameters if 0 not in graph.tensors[name].shape}  # others have no mean
    sites = [(name, axis) for name, axis in group.footprint if name in full]
    weights = [(name, axis) for name, axis in sites if len(graph.tensors[name].shape) > 1] or sites
    total = np.zeros(group.size)
    for name, axis in weights:
        powers = np.abs(graph.values(name).astype(np.float64)) ** norm
        per_index = powers.mean(axis=tuple(other for other in range(powers.ndim) if other != axis))
        labels = graph.axes[name, axis]
        sizes = _per_unit(graph, group, labels, per_index) ** (1 / norm)
        mean = sizes.mean()
        total += sizes / mean if mean != 0 else 1.0  # NaN and infinity go on, and are refused by the caller
    return total / max(len(weights), 1)


@IMPORTANCES.register("random")
def random(graph: Graph, group: Group, *, norm: int, seed: int) -> NDArray[np.float64]:
    """Uniform numbers: the baseline that any other importance has to beat. Equal seeds give equal numbers."""
    del norm
    place = [found.name for found in graph.groups].index(group.name)
    return np.random.default_rng([seed, place]).uniform(size=group.size)


def _per_unit(
    graph: Graph, group: Group, labels: NDArray[np.int64], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The mean over the indices of an axis that belong to each unit."""
    unit = np.full(len(graph.coupling.frozen), -1)
    unit[group.components] = group.unit_of()
    of_index = unit[graph.coupling.component[labels]]
    member = of_index >= 0
    sums = np.bincount(of_index[member], values[member], group.size)
    counts = np.bincount(of_index[member], minlength=group.size)
    return np.asarray(sums / np.maximum(counts, 1))
