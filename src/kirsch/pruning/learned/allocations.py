"""Allocations of a search: how many units each group loses, and the quality of the pruned model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import NumericError
from kirsch.pruning.notes import CLOSE
from kirsch.pruning.search import Chooser

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Goal
    from kirsch.pruning.search import Candidate

Counts = tuple[int, ...]
"""An allocation: the number of units that each candidate loses."""

MOST_DRAWS = 10
"""A search ends after this number of drawn allocations for each evaluation; repeated allocations are not evaluated."""


class Allocations:
    """Allocations that meet a goal, each with the quality of the pruned model, which is evaluated once.

    Args:
        graph, goal: graph of the model, and the goal.
        levels: candidates with the widths of the plan, then with finer widths, for allocations that cannot come close
            to the goal otherwise.
        quality: function that returns the quality of the model without these units, larger for better models; NaN and
            infinity reject the allocation.
        evaluations: number of allocations that may be evaluated.
        starts: allocations that are evaluated first, by the names of the rankings that give them.
    """

    def __init__(
        self,
        graph: Graph,
        goal: Goal,
        levels: Sequence[list[Candidate]],
        quality: Callable[[Counts], float],
        evaluations: int,
        starts: Mapping[str, Counts],
    ) -> None:
        self.graph, self.goal, self.evaluations, self.starts = graph, goal, evaluations, starts
        self._levels = levels
        self._choosers = [Chooser(graph, goal, candidates) for candidates in levels]
        self._quality = quality
        self._known: dict[Counts, float] = {}
        self._draws = 0
        self._report: Callable[[int, float], None] = lambda _number, _best: None
        self.improvements: list[tuple[int, float]] = []

    def begin(self, report: Callable[[int, float], None]) -> None:
        """Evaluate the starts.

        Args:
            report: function that is called after each evaluation with the number of evaluations and the best quality.
        """
        self._report = report
        for counts in self.starts.values():
            self.evaluate(counts)

    @property
    def candidates(self) -> list[Candidate]:
        """The groups that lose units."""
        return self._levels[0]

    @property
    def chooser(self) -> Chooser:
        """Costs of allocations."""
        return self._choosers[0]

    @property
    def progress(self) -> float:
        """Fraction of the search that is done, at least 1 at the end."""
        return max(len(self._known) / self.evaluations, self._draws / (MOST_DRAWS * self.evaluations))

    @property
    def evaluated(self) -> int:
        """Number of evaluated allocations."""
        return len(self._known)

    def evaluate(self, counts: Counts) -> float:
        """Return the quality of an allocation; minus infinity if it is not finite, or no more may be evaluated."""
        self._draws += 1
        if counts not in self._known:
            if self.evaluated >= self.evaluations:
                return -math.inf
            found = self._quality(counts)
            quality = found if math.isfinite(found) else -math.inf
            self._known[counts] = quality
            if quality > (self.improvements[-1][1] if self.improvements else -math.inf):
                self.improvements.append((self.evaluated, quality))
            self._report(self.evaluated, self.improvements[-1][1] if self.improvements else math.nan)
        return self._known[counts]

    def best(self) -> Counts:
        """Return the allocation with the best quality; of equal ones, the first.

        Raises:
            NumericError: no allocation has a finite quality.
        """
        if not self.improvements:
            raise NumericError(
                f"The quality of all {self.evaluated} evaluated plans is NaN or infinite.",
                fix="Check the weights of the model, the calibration data, and the function `loss` or `quality`.",
            )
        return max(self._known, key=lambda counts: self._known[counts])

    # ------------------------------------------------------------------------------------------------ the goal

    def of_scores(self, scales: NDArray[np.float64], shifts: NDArray[np.float64]) -> Counts:
        """Return the allocation of a global ranking of the importances times scales plus shifts.

        It is the first start if the ranking does not come close to the goal.

        Args:
            scales, shifts: a number for each candidate; scales are positive.
        """
        for candidates in self._levels:
            moved = [
                replace(c, group_scores=[scale * scores + shift for scores in c.group_scores])
                for c, scale, shift in zip(candidates, scales.tolist(), shifts.tolist(), strict=True)
            ]
            found = tuple(Chooser(self.graph, self.goal, moved).search(None, CLOSE))
            if self._is_close(found):
                return found
        return next(iter(self.starts.values()))

    def shifts_of(self, counts: Counts) -> NDArray[np.float64]:
        """Return shifts of the importances with which a global ranking with the threshold 0 removes these units.

        The shift of a group is minus the mean of the largest importance that is removed and the smallest that is kept.
        """
        shifts = []
        for candidate, count in zip(self.candidates, counts, strict=True):
            scores = candidate.scores
            gap = (scores[-1] - scores[0]) / candidate.size
            ends = np.concatenate([[scores[0] - gap], scores, [scores[-1] + gap]])
            shifts.append(-(ends[count] + ends[count + 1]) / 2)
        return np.array(shifts)

    def _is_close(self, counts: Sequence[int]) -> bool:
        """Return whether an allocation meets the goal, and is close to it, or as close as the first start."""
        first = next(iter(self.starts.values()))
        return 0 <= self.chooser.distance(counts) <= max(CLOSE, self.chooser.distance(first))

    # ------------------------------------------------------------------------------------------------ the record

    def record(self, quality: str) -> dict[str, Any]:
        """Return the course of the search as JSON: the qualities of the starts, and each improvement.

        Args:
            quality: what the quality is, in words.
        """
        return {
            "quality": quality,
            "evaluated": self.evaluated,
            "starts": {name: _number(self._known.get(counts)) for name, counts in self.starts.items()},
            "improvements": [[number, value] for number, value in self.improvements],
        }


def _number(quality: float | None) -> float | None:
    """Return a quality as a JSON value; None if it is not finite or not known."""
    return quality if quality is not None and math.isfinite(quality) else None
