"""LeGR: an affine transformation of the importances of each group, found by evolution.

The transformed importances of all groups are ranked together. Any allocation is the ranking of some transformation, so
that the search decides how much each group loses, and the importance decides which units.

Source: Chin et al. 2020, arXiv:1904.12368, section 3 and algorithm 1; regularized evolution: Real et al. 2019,
arXiv:1802.01548. As in the authors' code, the pool is first filled with random transformations, and mutations become
smaller. Different from it: the pool has at most a quarter of the evaluations and starts with the allocations of the
fixed rankings; the importances of a group are scaled about their mean, so that a scale does not move the whole group;
the shifts are of different sizes; and a mutation changes three of ten groups instead of one. With 60 evaluations, the
first version sometimes found nothing better than the fixed rankings on a network of ten groups.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.pruning.learned.allocations import Allocations
    from kirsch.pruning.search import Candidate

POOL = 64
"""Largest number of transformations in the pool; the oldest one is replaced."""

SAMPLE = 0.25
"""Fraction of the pool from which the best transformation is mutated."""

MUTATED = 0.3
"""Fraction of the groups whose transformation is changed by a mutation."""


class Individual(NamedTuple):
    """An affine transformation of the importances of each group.

    Args:
        quality: quality of the model that is pruned by the global ranking of the transformed importances.
        scales, shifts: factor and summand of each group, shape (groups,).
    """

    quality: float
    scales: NDArray[np.float64]
    shifts: NDArray[np.float64]


def evolve(allocations: Allocations, random: np.random.Generator) -> None:
    """Search for the transformation whose global ranking gives the model of the best quality."""
    groups = len(allocations.candidates)
    unchanged = Individual(0.0, np.ones(groups), np.zeros(groups))
    size = int(np.clip(allocations.evaluations // 4, 2, POOL))
    pool: deque[Individual] = deque(maxlen=size)
    for counts in allocations.starts.values():
        shifts = allocations.shifts_of(counts)
        pool.append(Individual(allocations.evaluate(counts), np.ones(groups), shifts))
    while allocations.progress < 1:
        if len(pool) < size:
            scales, shifts = mutated(unchanged, np.ones(groups, bool), allocations.candidates, 1.0, random)
        else:
            sampled = random.choice(size, max(1, round(SAMPLE * size)), replace=False)
            parent = max((pool[index] for index in sampled.tolist()), key=lambda individual: individual.quality)
            changed = np.zeros(groups, bool)
            changed[random.choice(groups, max(1, round(MUTATED * groups)), replace=False)] = True
            step = 1 - allocations.progress / 1.25
            scales, shifts = mutated(parent, changed, allocations.candidates, step, random)
        counts = allocations.of_scores(scales, shifts)
        pool.append(Individual(allocations.evaluate(counts), scales, shifts))


def mutated(
    parent: Individual,
    changed: NDArray[np.bool_],
    candidates: Sequence[Candidate],
    step: float,
    random: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the scales and shifts of a transformation with other scales and shifts of the changed groups.

    A scale is multiplied by exp(N(0, step²)); the shift is changed so that the mean of the importances stays. Then
    step · N(0, 1) standard deviations of the importances are added to it, times exp(N(0, 1)), which is the same for all
    groups: some mutations are much larger than others.
    """
    means = np.array([candidate.scores.mean() for candidate in candidates])
    deviations = np.array([candidate.scores.std() for candidate in candidates])
    scales = np.where(changed, parent.scales * np.exp(step * random.normal(size=len(means))), parent.scales)
    moves = step * deviations * random.normal(size=len(means)) * np.exp(random.normal())
    return scales, parent.shifts + (parent.scales - scales) * means + np.where(changed, moves, 0)
