"""The search for a choice: how many units go from each group so that the cost lands on the goal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.graph.cost import Cost
    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.graph.plan import Goal


@dataclass
class Candidate:
    """Groups of one size that lose the same number of units, each with its units in the order in which they go."""

    groups: Sequence[Group]
    own: Sequence[NDArray[np.float64]]
    multiple: int
    min_keep: float

    @property
    def size(self) -> int:
        """Units of each group."""
        return self.groups[0].size

    @cached_property
    def orders(self) -> list[NDArray[np.int64]]:
        """The units of each group, the least important first."""
        return [np.argsort(scores, kind="stable") for scores in self.own]

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """The importance of what goes first, second, ... from each group; their mean."""
        scores: NDArray[np.float64] = np.mean([np.sort(scores) for scores in self.own], axis=0)
        return scores

    @cached_property
    def _going(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All components in the order in which their units would go, and how many of them the first n units have."""
        places = [np.argsort(o)[g.unit_of()] for g, o in zip(self.groups, self.orders, strict=True)]
        place = np.concatenate(places)
        order = np.argsort(place, kind="stable")
        components = np.concatenate([group.components for group in self.groups])
        return components[order], np.searchsorted(place[order], np.arange(self.size + 1))

    def gone(self, count: int) -> NDArray[np.int64]:
        """The components of the units that go when so many do."""
        components, numbers = self._going
        return components[: numbers[count]]

    @cached_property
    def steps(self) -> list[int]:
        """How many units may go: 0, and each number that leaves a multiple, up to what must stay."""
        floor = max(1, int(np.ceil(self.min_keep * self.size)))
        return [0] + [n for n in range(1, self.size - floor + 1) if (self.size - n) % self.multiple == 0]

    def allowed(self, wanted: int) -> int:
        """The largest number of steps that is no more than wanted."""
        steps = self.steps
        return steps[int(np.searchsorted(steps, wanted, side="right")) - 1]


class Chooser:
    """Prices choices. A choice is how many units go from each candidate."""

    def __init__(self, graph: Graph, goal: Goal, candidates: list[Candidate]) -> None:
        self._graph = graph
        self._goal = goal
        self.candidates = candidates
        self._prices: dict[tuple[int, ...], Cost] = {}

    def keep(self, counts: Sequence[int]) -> NDArray[np.bool_]:
        """Component → whether it stays."""
        keep = np.ones(len(self._graph.coupling.frozen), bool)
        for candidate, count in zip(self.candidates, counts, strict=True):
            keep[candidate.gone(count)] = False
        return keep

    def price(self, counts: Sequence[int]) -> Cost:
        """The cost of a choice, computed once."""
        key = tuple(counts)
        if key not in self._prices:
            self._prices[key] = self._graph.prices.price(self.keep(counts))
        return self._prices[key]

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether a choice meets the goal."""
        return self._goal.met_by(self.price(counts), self._graph.cost)

    def least(self) -> list[int]:
        """Everything that may go."""
        return self.repaired([candidate.steps[-1] for candidate in self.candidates])

    def repaired(self, counts: Sequence[int]) -> list[int]:
        """A choice that leaves something of every axis: groups that share one give back their most important units."""
        counts = list(counts)
        while (empty := self._graph.emptied(self.keep(counts))) is not None:
            on = [
                place
                for place, candidate in enumerate(self.candidates)
                if counts[place] and any(empty in group.footprint for group in candidate.groups)
            ]
            best = max(on, key=lambda place: float(self.candidates[place].scores[counts[place] - 1]))
            counts[best] = self.candidates[best].allowed(counts[best] - 1)
        return counts

    def descend(self, *, local: bool) -> list[int]:
        """The smallest choice on the way from nothing to everything that meets the goal, by bisection."""
        if local:
            way: list[float] = sorted({n / c.size for c in self.candidates for n in c.steps})

            def choice(place: int) -> list[int]:
                return self.repaired([c.allowed(int(way[place] * c.size + 1e-9)) for c in self.candidates])
        else:
            way = sorted(score for candidate in self.candidates for score in candidate.scores.tolist())

            def choice(place: int) -> list[int]:
                return self.repaired([c.allowed(int((c.scores <= way[place]).sum())) for c in self.candidates])

        low, high = 0, len(way) - 1
        while low < high:
            middle = (low + high) // 2
            if self.fits(choice(middle)):
                high = middle
            else:
                low = middle + 1
        return choice(high)

    def refine(self, counts: list[int]) -> list[int]:
        """Give back what the goal leaves room for, the most important units first."""
        counts = list(counts)
        open_ = set(range(len(counts)))
        while open_:
            best = None
            for place in sorted(open_):
                candidate, count = self.candidates[place], counts[place]
                fewer = candidate.allowed(count - 1) if count else 0
                tried = [*counts[:place], fewer, *counts[place + 1 :]]
                if not count or not self.fits(tried):
                    open_.discard(place)
                    continue
                value = float(candidate.scores[fewer:count].mean())
                if best is None or value > best[0]:
                    best = (value, place, fewer)
            if best is None:
                break
            counts[best[1]] = best[2]
        return counts
