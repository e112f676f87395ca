"""The smallest model whose measured drop of quality, without training, stays inside a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.errors import GoalError, NumericError, UsageError
from kirsch.graph.cost_names import WORDS
from kirsch.graph.plan import Goal
from kirsch.pruning.notes import landing_note

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.graph.cost import Cost
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Plan
    from kirsch.pruning.options import PlanOptions
    from kirsch.pruning.quality import Measured, Quality

RESOLUTION = 0.01
"""The bisection ends when the cost is known up to this fraction of the original."""

ROUNDING = 1e-9
"""A drop may exceed its limit by this much, since differences of fractions are rounded."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan whose model was evaluated.

    Args:
        cost: cost of the plan, as a fraction of the original.
        drop: quality of the original minus that of the pruned model.
        plan: the plan.
        measured: the quality of the pruned model.
    """

    cost: float
    drop: float
    plan: Plan
    measured: Measured


def smallest(
    trial_at: Callable[[float], Trial | None], least: float, limit: float, resolution: float = RESOLUTION
) -> tuple[Trial | None, list[Trial]]:
    """Return the trial of the smallest model with a drop of at most `limit`, and all trials in their order.

    Bisects over the cost. This finds the smallest model if the drop grows as the cost falls. Otherwise it finds a model
    that was measured to be inside the limit, and smaller ones may exist.

    Args:
        trial_at: function that takes a fraction of the cost, and returns the trial of a model that costs at most that
            much; None if there is no such model.
        least: least cost that can be reached, as a fraction.
        limit: largest drop.
        resolution: largest difference between the costs at which the search ends.

    Returns:
        None in place of the first trial if no model was measured to be inside the limit.
    """
    trials: list[Trial] = []

    def inside(fraction: float) -> Trial | None:
        trial = trial_at(fraction)
        if trial is not None and trial not in trials:
            trials.append(trial)
        return trial if trial is not None and trial.drop <= limit + ROUNDING else None

    found = inside(least)
    low, high = least, least if found is not None else 1.0
    while high - low > resolution:
        middle = (low + high) / 2
        trial = inside(middle)
        if trial is None:
            low = middle
        else:
            found, high = trial, trial.cost
    return found, trials


class DropSearch:
    """Search for plans whose models stay inside a limit of the drop.

    Args:
        graph: graph of the model.
        quality: evaluation of the original and of pruned models.
        limit: largest drop.
        minimize: name of the cost that is minimized.
        plan_for: function that returns the plan for a goal.
    """

    def __init__(
        self, graph: Graph, quality: Quality, limit: float, minimize: str, plan_for: Callable[[Goal], Plan]
    ) -> None:
        self._graph, self._quality, self._limit, self._minimize = graph, quality, limit, minimize
        self._plan_for = plan_for
        self._known: dict[tuple[Any, ...], Trial] = {}

    def within(self, goal: Goal | None, least: Cost) -> Plan:
        """Return the smallest plan inside the limit; with a goal, the plan for the goal, if it is inside the limit.

        Args:
            goal: limits of the cost, or None.
            least: least cost that plans reach.

        Raises:
            GoalError: no plan stays inside the limit, or none that meets the goal; the message has what is reachable.
        """
        if goal is not None:
            trial = self._trial(self._plan_for(goal))
            if trial.drop <= self._limit + ROUNDING:
                return self._with_notes(trial, [trial])
            found, _ = smallest(self._trial_at, self._fraction(trial.plan.after), self._limit)
            raise self._contradiction(goal, trial, found)
        found, trials = smallest(self._trial_at, self._fraction(least), self._limit)
        if found is None:
            raise self._unreachable(trials)
        plan = self._with_notes(found, trials)
        # The search chose the goal of the plan; the user has none.
        return replace(
            plan, goal={}, notes=tuple(note for note in plan.notes if note != landing_note(plan, self._graph))
        )

    def _fraction(self, cost: Cost) -> float:
        return float(getattr(cost, self._minimize) / max(getattr(self._graph.cost, self._minimize), 1))

    def _trial_at(self, fraction: float) -> Trial | None:
        if fraction >= 1:  # nothing can be removed
            return None
        try:
            limits: dict[str, Any] = {self._minimize: fraction}
            plan = self._plan_for(Goal(**limits))
        except GoalError:  # the least cost is computed for equal importances, and may be just out of reach
            return None
        try:
            return self._trial(plan)
        except NumericError:  # a model that returns NaN is outside of any limit
            return None

    def _trial(self, plan: Plan) -> Trial:
        key = (plan.groups, plan.without)
        if key not in self._known:
            measured = self._quality.without(plan.groups, plan.blocks)
            drop = self._quality.original.value - measured.value
            self._known[key] = Trial(self._fraction(plan.after), drop, plan, measured)
        return self._known[key]

    # ------------------------------------------------------------------------------------------------ texts

    def _with_notes(self, found: Trial, trials: list[Trial]) -> Plan:
        """Return the plan with its measured drop, and all trials, in its method and notes."""
        metric, original = self._quality.metric, self._quality.original
        difference = self._quality.drop(found.measured)
        values = " → ".join(self.value_text(each.value) for each in (original, found.measured))
        interval = "unknown"  # the metric is not defined for most bootstrap samples
        if math.isfinite(difference.low):
            interval = f"{self.drop_text(difference.low)} to {self.drop_text(difference.high)}"
        note = (
            f"max_drop={self._limit:g}: {metric.name} {values} on {figures.counted(original.n, 'sample')} without "
            f"training, a drop of {self.drop_text(found.drop)} (95 % interval {interval})."
        )
        others = sorted((trial for trial in trials if trial is not found), key=lambda trial: -trial.cost)
        if others:
            word = WORDS[self._minimize]
            shown = ", ".join(f"{figures.percent(each.cost)}: {self.drop_text(each.drop)}" for each in others)
            note += (
                f" Other measured drops, by share of the {word}: {shown}. The search assumes that a smaller model has "
                "a larger drop; models between these were not measured."
            )
        method = {
            **found.plan.method,
            "metric": metric.name,
            "measured": [
                {self._minimize: round(trial.cost, 6), "quality": trial.measured.value, "drop": trial.drop}
                for trial in sorted(trials, key=lambda trial: -trial.cost)
            ],
        }
        return replace(found.plan, method=method, notes=(note, *found.plan.notes))

    def value_text(self, value: float) -> str:
        """Return a value of the metric as text."""
        return figures.percent(value) if self._quality.metric.fraction else figures.digits(value)

    def drop_text(self, drop: float) -> str:
        """Return a difference of values of the metric as text."""
        return figures.points(drop) if self._quality.metric.fraction else figures.digits(drop)

    def _contradiction(self, goal: Goal, trial: Trial, found: Trial | None) -> GoalError:
        word, n = WORDS[self._minimize], figures.counted(self._quality.original.n, "sample")
        limits = ", ".join(f"{name}={limit:g}" for name, limit in goal.to_dict().items())
        if found is None:
            why, fix = "No larger model that was measured stays inside the limit either.", ""
        else:
            why = (
                f"The smallest model that was found inside the limit has {figures.percent(found.cost)} of the {word}, "
                f"with a drop of {self.drop_text(found.drop)}."
            )
            fix = f"Raise the goal to {self._minimize}={_rounded_up(found.cost)}, or "
        return GoalError(
            f"The goal {limits} and max_drop={self._limit:g} cannot both be met: the plan for the goal has a drop of "
            f"{self.drop_text(trial.drop)} without training, measured on {n} by the metric "
            f"{self._quality.metric.name!r}.",
            why,
            f"{fix}{'r' if fix else 'R'}aise max_drop to {_rounded_up(trial.drop)}, try another importance, or prune "
            "without max_drop and train the pruned model.",
        )

    def _unreachable(self, trials: list[Trial]) -> GoalError:
        word = WORDS[self._minimize]
        largest = max(trials, key=lambda trial: trial.cost, default=None)
        if largest is None:
            why = "No units can be removed with these options."
        else:
            why = (
                f"The largest model that was measured keeps {figures.percent(largest.cost)} of the {word}, and has a "
                f"drop of {self.drop_text(largest.drop)} by the metric {self._quality.metric.name!r}."
            )
        return GoalError(
            f"No pruned model has a measured drop of at most max_drop={self._limit:g}.",
            why,
            "Raise max_drop, try another importance or other options, or prune to a goal without max_drop and train "
            "the pruned model.",
        )


def _rounded_up(value: float) -> str:
    """Return a fraction rounded up to three decimals."""
    return f"{-(-value * 1000 // 1) / 1000:g}"


def check_validation(options: PlanOptions, goal: Goal | None, data: Any, validation: Any) -> None:
    """Raise a UsageError if `max_drop` has no samples, or an argument of `kirsch.plan` has no effect."""
    if options.max_drop is None and validation is not None:
        raise UsageError(
            "`validation` of kirsch.plan has no effect without `max_drop`.",
            fix="Give max_drop, such as max_drop=0.02, or remove `validation`.",
        )
    if options.max_drop is not None and data is None and validation is None:
        raise UsageError(
            "`max_drop` needs samples on which the drop is measured.",
            fix="Give validation=(inputs, labels), a DataLoader, or inputs alone with metric='kl'. On the command "
            "line, give --data SOURCE.",
        )
    if goal is not None and options.minimize is not None:
        raise UsageError(
            "`minimize` has no effect with a goal.",
            "With a goal, `max_drop` is a condition on the plan for the goal.",
            "Remove one of them.",
        )


def minimized_cost(graph: Graph, goal: Goal | None, minimize: str | None) -> str:
    """Return the name of the cost that is minimized: the one that is given, or else the MACs or the parameters."""
    if minimize is not None:
        return minimize
    if goal is not None:
        return next(iter(goal.to_dict()))
    return "macs" if graph.cost.macs else "parameters"
