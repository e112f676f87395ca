"""Search for the number of units to remove from each group, so that the cost meets the goal."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.cost import Cost
    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.graph.plan import Goal


@dataclass
class Candidate:
    """Groups that lose units together: the same number from each, or numbers in a given proportion.

    Each removal takes one portion of units from every group. A portion is a single unit unless `portions` is given.

    Args:
        groups: the groups; all have the same number of portions.
        group_scores: importance of the units of each group.
        multiple: the number of kept portions is a multiple of this number.
        min_keep: fraction of each group that is always kept.
        unit_cost: number by which importances are divided for the ranking.
        kept: number of kept portions, if it is given.
        portions: number of units in a portion of each group; empty for single units.
        removal_scores: importance of the first, second, ... portion to be removed, if it is not that of `group_scores`.
    """

    groups: Sequence[Group]
    group_scores: Sequence[NDArray[np.float64]]
    multiple: int
    min_keep: float
    unit_cost: float = 1.0
    kept: int | None = None
    portions: Sequence[int] = ()
    removal_scores: NDArray[np.float64] | None = None

    @cached_property
    def size(self) -> int:
        """Number of portions of each group, which are single units unless `portions` is given."""
        return min(group.size // portion for group, portion in zip(self.groups, self._portions, strict=True))

    @property
    def units_per_portion(self) -> int:
        """Number of units of all groups that one removal takes."""
        return sum(self._portions)

    @property
    def _portions(self) -> Sequence[int]:
        return self.portions or [1] * len(self.groups)

    @cached_property
    def orders(self) -> list[NDArray[np.int64]]:
        """The units of each group, the least important first."""
        return [np.argsort(scores, kind="stable") for scores in self.group_scores]

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """Importance of the first, second, ... portion to be removed: the mean over its units, divided by the cost."""
        if self.removal_scores is not None:
            return self.removal_scores
        portions = [
            np.sort(scores)[: self.size * portion].reshape(self.size, portion).mean(axis=1)
            for scores, portion in zip(self.group_scores, self._portions, strict=True)
        ]
        scores: NDArray[np.float64] = np.mean(portions, axis=0)
        return scores / self.unit_cost

    def removed_units(self, count: int) -> dict[str, tuple[int, ...]]:
        """Return the indices of the units that the first `count` portions remove, by name of the group."""
        return {
            group.name: tuple(sorted(order[: count * portion].tolist()))
            for group, order, portion in zip(self.groups, self.orders, self._portions, strict=True)
            if count
        }

    @cached_property
    def _removal_order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All components in the order of removal, and the number of components of the first n portions, for each n."""
        ranks = [
            np.argsort(order)[group.unit_of()] // portion
            for group, order, portion in zip(self.groups, self.orders, self._portions, strict=True)
        ]
        rank = np.concatenate(ranks)
        order = np.argsort(rank, kind="stable")
        components = np.concatenate([group.components for group in self.groups])
        return components[order], np.searchsorted(rank[order], np.arange(self.size + 1))

    def removed_components(self, count: int) -> NDArray[np.int64]:
        """Return the components of the first `count` portions to be removed from each group."""
        components, numbers = self._removal_order
        return components[: numbers[count]]

    @cached_property
    def steps(self) -> list[int]:
        """Allowed numbers of removed units: 0, and those that leave a multiple of `multiple`, at least `min_keep`.

        If the number of kept units is given, only this number is allowed.
        """
        if self.kept is not None:
            return [self.size - self.kept]
        fewest = max(1, int(np.ceil(self.min_keep * self.size)))
        return [0] + [n for n in range(1, self.size - fewest + 1) if (self.size - n) % self.multiple == 0]

    def allowed(self, most: int) -> int:
        """Return the largest allowed number of removed units up to `most`, or the smallest one."""
        steps = self.steps
        return steps[max(0, int(np.searchsorted(steps, most, side="right")) - 1)]

    def next_step(self, count: int) -> int:
        """Return the smallest allowed number of removed units above `count`, or the largest one."""
        return next((step for step in self.steps if step > count), self.steps[-1])


class Chooser:
    """Search over choices. A choice is the number of removed units, or portions of units, of each candidate.

    Args:
        graph: graph of the model.
        goal: the goal; None without a limit.
        candidates: groups that may lose units.
        without: paths of the residual blocks that are removed in every choice.
    """

    def __init__(
        self, graph: Graph, goal: Goal | None, candidates: list[Candidate], without: Sequence[str] = ()
    ) -> None:
        self._graph = graph
        self._goal = goal
        self.candidates = candidates
        self.without = tuple(without)
        self._prices: dict[tuple[tuple[int, ...], tuple[str, ...]], Cost] = {}

    def keep(self, counts: Sequence[int]) -> NDArray[np.bool_]:
        """Return whether each component is kept."""
        keep = np.ones(len(self._graph.coupling.frozen), bool)
        for candidate, count in zip(self.candidates, counts, strict=True):
            keep[candidate.removed_components(count)] = False
        return keep

    def price(self, counts: Sequence[int]) -> Cost:
        """Return the cost of a choice, computed once."""
        key = tuple(counts), self.without
        if key not in self._prices:
            self._prices[key] = self._graph.prices.price(self.keep(counts), self.without)
        return self._prices[key]

    def fits(self, counts: Sequence[int]) -> bool:
        """Return whether a choice meets the goal, if there is one."""
        return self._goal is None or self._goal.met_by(self.price(counts), self._graph.cost)

    def given(self) -> list[int]:
        """Return the choice that only removes the units of the candidates whose number of kept units is given."""
        return [0 if candidate.kept is None else candidate.steps[0] for candidate in self.candidates]

    def fixed(self, counts: Mapping[int, int]) -> Chooser:
        """Return the search in which some candidates lose a given number of portions, by index of the candidate."""
        candidates = [
            replace(candidate, kept=candidate.size - counts[index]) if index in counts else candidate
            for index, candidate in enumerate(self.candidates)
        ]
        return Chooser(self._graph, self._goal, candidates, self.without)

    def least(self) -> list[int]:
        """Return the choice that removes all units that may be removed."""
        return self.repaired([candidate.steps[-1] for candidate in self.candidates])

    def repaired(self, counts: Sequence[int]) -> list[int]:
        """Return the choice, changed so that each axis keeps enough units.

        On an axis with too few units, the most important of the removed units are restored.
        """
        counts = list(counts)
        while (found := self._graph.too_small(self.keep(counts))) is not None:
            axis, _ = found
            sharing = [
                index
                for index, candidate in enumerate(self.candidates)
                if counts[index] and candidate.kept is None and any(axis in g.footprint for g in candidate.groups)
            ]
            if not sharing:  # the caller reports the axis
                break
            best = max(sharing, key=lambda index: float(self.candidates[index].scores[counts[index] - 1]))
            counts[best] = self.candidates[best].allowed(counts[best] - 1)
        return counts

    def search(self, classes: Sequence[Sequence[int]] | None, close: float) -> list[int]:
        """Return a choice that meets the goal, if possible with a distance to the goal of at most `close`.

        The units of some groups may cost so much that the threshold of a ranking jumps over the goal. Then fewer units
        are removed from one group, and more from the others, as long as the choice comes closer to the goal and the
        removed units are hardly more important in sum; see `_is_worth`.

        Args:
            classes: see `descend`.
            close: distance to the goal, as a fraction of the original cost.
        """
        limits = [candidate.steps[-1] for candidate in self.candidates]
        best = self.refine(*self.descend(classes, limits))
        if self.distance(best) > close:  # the same fraction of each list is too far from the goal
            best = self.refine(best, [0] * len(best))
        return self.fill(best, limits, close, partial(self.descend, classes))

    def fill(
        self,
        best: list[int],
        limits: Sequence[int],
        close: float,
        descend: Callable[[Sequence[int]], tuple[list[int], list[int]]],
    ) -> list[int]:
        """Return a choice that is closer to the goal: fewer units of one candidate, and more of others, as in `search`.

        If no limit on one candidate helps, single steps of two candidates are exchanged.

        Args:
            best: a choice that meets the goal.
            limits: largest number of removed units of each candidate.
            close: distance to the goal that is sufficient.
            descend: takes limits, and returns a choice and the smallest numbers of removed units; see `descend`.
        """
        while self.distance(best) > close:
            trials = []
            for index in (i for i, c in enumerate(self.candidates) if best[i] and c.kept is None):
                fewer = self.candidates[index].allowed(best[index] - 1)
                changed = [*limits[:index], fewer, *limits[index + 1 :]]
                trial, fewest = descend(changed)
                if self.fits(trial):
                    trials.append((self.refine(trial, fewest), changed))
            worth = [trial for trial in trials if self._is_worth(trial[0], best)]
            worth = worth or [(trial, [*limits]) for trial in self._exchanges(best) if self._is_worth(trial, best)]
            if not worth:
                break
            best, limits = min(worth, key=lambda trial: self.removed_importance(trial[0]))
        return best

    def _exchanges(self, counts: Sequence[int]) -> Iterator[list[int]]:
        """Yield the choices that meet the goal with one step less of one candidate and one step more of another."""
        free = [index for index, candidate in enumerate(self.candidates) if candidate.kept is None]
        for less, more in itertools.permutations(free, 2):
            trial = list(counts)
            trial[less] = self.candidates[less].allowed(counts[less] - 1)
            trial[more] = self.candidates[more].next_step(counts[more])
            if trial[less] < counts[less] and trial[more] > counts[more]:
                trial = self.repaired(trial)
                if self.fits(trial):
                    yield trial

    def filled(self, counts: Sequence[int], close: float) -> list[int]:
        """Return a choice that is closer to the goal than another one, of which only a few numbers change."""

        def beside(limits: Sequence[int]) -> tuple[list[int], list[int]]:
            least = [min(pair) for pair in zip(counts, limits, strict=True)]
            return self.descend(None, limits, least)[0], [0] * len(least)

        return self.fill(list(counts), [candidate.steps[-1] for candidate in self.candidates], close, beside)

    def removed_importance(self, counts: Sequence[int]) -> float:
        """Return the sum of the importances of the removed units, relative to the lowest one if it is negative."""
        lowest = min([0.0, *(float(candidate.scores[0]) for candidate in self.candidates)])
        pairs = zip(self.candidates, counts, strict=True)
        return float(sum((c.scores[:count] - lowest).sum() * c.unit_cost * c.units_per_portion for c, count in pairs))

    def _is_worth(self, trial: Sequence[int], counts: Sequence[int]) -> bool:
        """Return whether a choice is closer to the goal than another one, without much more important removed units.

        The importance of the removed units may be larger by the fraction of that of all units by which the cost comes
        closer to the goal: a choice that is larger and removes far more important units is worse, although it is
        closer to the goal.
        """
        total = self.removed_importance([candidate.size for candidate in self.candidates])
        more = self.removed_importance(trial) - self.removed_importance(counts)
        closer = self.distance(counts) - self.distance(trial)
        return closer > 0 and more <= closer * total

    def distance(self, counts: Sequence[int]) -> float:
        """Return the distance from a choice up to the nearest limit of the goal, as a fraction of the original cost."""
        if self._goal is None:
            return 0.0
        fractions = self._goal.fractions(self.price(counts), self._graph.cost)
        return min(limit - value for value, limit in fractions.values())

    def descend(
        self, classes: Sequence[Sequence[int]] | None, limits: Sequence[int], least: Sequence[int] = ()
    ) -> tuple[list[int], list[int]]:
        """Return the choice with the lowest threshold that meets the goal, found by bisection.

        Args:
            classes: lists of indices of candidates. The threshold is the fraction of the units of each list that is
                removed, the least important first. None: the threshold is the largest importance of the removed units.
            limits: largest number of removed units of each candidate.
            least: smallest number of removed units of each candidate; empty for 0.

        Returns:
            The choice, and the smallest numbers of removed units to which units may be restored: those of the next
            lower threshold, so that the same fraction of each list is removed; 0 without lists.
        """
        if classes is None:
            thresholds = sorted(score for candidate in self.candidates for score in candidate.scores.tolist())

            def counts(threshold: float) -> list[int]:
                return [int((c.scores <= threshold).sum()) for c in self.candidates]
        else:
            orders = [self._removal_order_of(indices) for indices in classes]
            thresholds = sorted({n / len(order) for order in orders for n in range(len(order) + 1)})

            def counts(threshold: float) -> list[int]:
                removed = [order[: int(threshold * len(order) + 1e-9)] for order in orders]
                return [int(n) for n in np.bincount(np.concatenate(removed), minlength=len(self.candidates))]

        def choice(index: int) -> list[int]:
            most = [min(pair) for pair in zip(counts(thresholds[index]), limits, strict=True)]
            most = [max(pair) for pair in zip(most, least or most, strict=True)]
            return self.repaired([c.allowed(count) for c, count in zip(self.candidates, most, strict=True)])

        low, high = 0, len(thresholds) - 1
        while low < high:
            middle = (low + high) // 2
            if self.fits(choice(middle)):
                high = middle
            else:
                low = middle + 1
        found = choice(high)
        lower = choice(high - 1) if classes is not None and high else [0] * len(found)
        return found, [min(pair) for pair in zip(lower, found, strict=True)]

    def _removal_order_of(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Return the index of the candidate of each unit of some candidates, the least important unit first."""
        scores = np.concatenate([self.candidates[index].scores for index in indices])
        owners = np.concatenate([np.full(self.candidates[index].size, index) for index in indices])
        return owners[np.argsort(scores, kind="stable")]

    def refine(self, counts: Sequence[int], fewest: Sequence[int]) -> list[int]:
        """Restore units as long as the goal is met, the most important first.

        Args:
            counts: a choice.
            fewest: smallest number of removed units of each candidate.
        """
        counts = list(counts)
        active = set(range(len(counts)))
        while active:
            best = None
            for index in sorted(active):
                candidate, count = self.candidates[index], counts[index]
                fewer = candidate.allowed(count - 1) if count else 0
                trial = [*counts[:index], fewer, *counts[index + 1 :]]
                if fewer == count or fewer < fewest[index] or not self.fits(trial):
                    active.discard(index)
                    continue
                score = float(candidate.scores[fewer:count].mean())
                if best is None or score > best[0]:
                    best = (score, index, fewer)
            if best is None:
                break
            counts[best[1]] = best[2]
        return counts
