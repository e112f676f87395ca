"""Choice of one alternative for each part of a model, with the least sum of scores under limits of the cost.

The cost is not linear in the choice: that of a layer is a product of its kept inputs and outputs. It is linearized
around a choice, the linear problem is solved by `scipy.optimize.milp`, and this is repeated around the solution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

ROUNDS = 8
"""Largest number of linear problems that are solved from one starting point."""

NODES = 5_000
"""Largest number of nodes of the search tree of a linear problem; then the best choice so far is used. A limit of the
time would give other choices on other machines."""

TRIALS = 2_000
"""Largest number of exchanges whose costs are computed in each pass of the local search."""

NEAR = 0.02
"""Excess of a linear cost over its limit, as a fraction of the original, up to which an exchange is tried."""

TOLERANCE = 1e-12
"""Rounding errors of the costs, as a fraction of the original, and of the sums of scores."""

Choice = tuple[int, ...]
"""Index of the alternative of each part."""


@dataclass(frozen=True)
class Allocation:
    """The alternatives of the parts of a model, their scores and costs, and the limits.

    Args:
        scores: scores of the alternatives of each part, smaller for better ones. Alternative 0 keeps the part unchanged
            and has score 0.
        costs: function that returns the costs of a choice, as an array of the shape of `limits`.
        limits: largest values of the costs.
        conflicts: pairs of parts of which at most one may be changed.
    """

    scores: Sequence[NDArray[np.float64]]
    costs: Callable[[Choice], NDArray[np.float64]]
    limits: NDArray[np.float64]
    conflicts: Sequence[tuple[int, int]] = ()
    _known: dict[Choice, NDArray[np.float64]] = field(default_factory=dict, repr=False)

    def cost(self, choice: Choice) -> NDArray[np.float64]:
        """Return the costs of a choice, computed once."""
        if choice not in self._known:
            self._known[choice] = self.costs(choice)
        return self._known[choice]

    def score(self, choice: Choice) -> float:
        """Return the sum of the scores of the chosen alternatives."""
        return float(sum(scores[index] for scores, index in zip(self.scores, choice, strict=True)))

    def fits(self, choice: Choice) -> bool:
        """Return whether a choice is within all limits and has no conflict."""
        free = not any(choice[a] and choice[b] for a, b in self.conflicts)
        return free and bool((self.cost(choice) <= self.limits + TOLERANCE).all())

    def best(self, starts: Iterable[Choice]) -> Choice | None:
        """Return the choice with the least score that is found from some starting points; None if none fits."""
        found: set[Choice] = set()
        for start in starts:
            found |= {choice for choice in (start, *self._solutions(start)) if self.fits(choice)}
        if not found:
            return None
        # Equal scores occur where a reduction has no effect on the outputs: the cheapest choice is taken.
        return self._improved(min(found, key=self._order))

    def _order(self, choice: Choice) -> tuple[float, float, Choice]:
        return self.score(choice), float(self.cost(choice).sum()), choice

    def _solutions(self, start: Choice) -> Iterable[Choice]:
        """Yield the solutions of linear problems, each linearized around the solution before it.

        If a solution exceeds a limit, because the linear cost of a product is too low, the limit is lowered by half of
        the excess in the next problems.
        """
        point, margin, seen = start, np.zeros_like(self.limits), {start}
        for _ in range(ROUNDS):
            solution = self._solve_linear(point, margin)
            if solution is None:
                return
            yield solution
            excess = np.maximum(self.cost(solution) - self.limits, 0)
            if solution in seen and not excess.any():
                return
            seen.add(solution)
            margin = margin + excess / 2
            point = solution

    def _changes(self, choice: Choice) -> NDArray[np.float64]:
        """Return the change of the costs by each alternative in place of the chosen one, shape (alternatives, limits).

        The alternatives of all parts follow each other.
        """
        cost = self.cost(choice)
        rows = [
            self.cost((*choice[:part], index, *choice[part + 1 :])) - cost
            for part, scores in enumerate(self.scores)
            for index in range(len(scores))
        ]
        return np.array(rows).reshape(-1, len(self.limits))

    @cached_property
    def _part_of(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.scores)), [len(scores) for scores in self.scores])

    @cached_property
    def _index_of(self) -> NDArray[np.int64]:
        return np.concatenate([np.arange(len(scores)) for scores in self.scores])

    @cached_property
    def _structure(self) -> LinearConstraint:
        """One alternative for each part, and no conflicts, as linear constraints."""
        count = len(self._part_of)
        one = csr_array((np.ones(count), (self._part_of, np.arange(count))), (len(self.scores), count))
        changed = [np.isin(self._part_of, pair) & (self._index_of > 0) for pair in self.conflicts]
        rows = vstack([one, csr_array(np.array(changed, float).reshape(-1, count))])
        least = np.repeat([1.0, -np.inf], [len(self.scores), len(changed)])
        return LinearConstraint(rows, least, 1.0)

    def _solve_linear(self, point: Choice, margin: NDArray[np.float64]) -> Choice | None:
        """Return the solution of the problem linearized around a choice; None if there is none."""
        flat = np.concatenate(self.scores)
        scale = self.score(point) or float(flat.max()) or 1.0
        limits = self.limits - self.cost(point) - margin
        result = milp(
            # HiGHS stops at an absolute gap of 1e-6: the sum of the scores is scaled to be near 1.
            np.minimum(flat / scale, 1e4),
            integrality=np.ones(len(flat), np.int64),
            bounds=Bounds(0, 1),
            constraints=[self._structure, LinearConstraint(self._changes(point).T, -np.inf, limits)],
            # With the presolver, HiGHS may print a line about its state; such small problems do not need it.
            options={"node_limit": NODES, "mip_rel_gap": 1e-3, "presolve": False},
        )
        if result.x is None:
            return None
        chosen = result.x > 0.5  # noqa: PLR2004 - binary variables
        return tuple(self._index_of[chosen].tolist())

    def _improved(self, choice: Choice) -> Choice:
        """Return a choice that no exchange of one or two alternatives improves, among the most promising ones."""
        while True:
            better = self._exchange(choice)
            if better is None:
                return choice
            choice = better

    def _exchange(self, choice: Choice) -> Choice | None:
        """Return a better choice that fits, with one or two other alternatives; None if none is found."""
        gains = np.concatenate(self.scores) - np.repeat(
            [scores[index] for scores, index in zip(self.scores, choice, strict=True)],
            [len(scores) for scores in self.scores],
        )
        cost, changes = self.cost(choice), self._changes(choice)
        total = gains[:, None] + gains[None, :]
        # The cost of two changes is not the sum of both, so that exchanges slightly above the limit are tried, too.
        near = (cost + changes[:, None] + changes[None, :] <= self.limits + NEAR).all(-1)
        other = self._part_of[:, None] < self._part_of[None, :]
        total[~(other & near) | (total > -TOLERANCE)] = np.inf
        order = np.argsort(total, axis=None, kind="stable")[:TRIALS]
        for first, second in zip(*np.unravel_index(order, total.shape), strict=True):
            if not np.isfinite(total[first, second]):
                return None
            trial = list(choice)
            for flat in (first, second):
                trial[self._part_of[flat]] = int(self._index_of[flat])
            if self.fits(tuple(trial)):
                return tuple(trial)
        return None
