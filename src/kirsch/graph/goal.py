"""Goal of a plan: limits of the cost of the pruned model, in one step or spaced over several rounds."""

from __future__ import annotations

import math
import re
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from kirsch import figures
from kirsch.annotations import Count, Fix
from kirsch.arguments import checked
from kirsch.errors import GoalError
from kirsch.graph.cost import Cost
from kirsch.graph.cost_names import WORDS
from kirsch.tables import Part, Piece, Printable

LATENCY = re.compile(r"(?i)latency|speed|fps|milli|(?<![a-z])ms(?![a-z])")
"""Pattern of argument names that ask for a latency limit."""
NO_LATENCY = "latency goals do not exist yet."
WHY_NO_LATENCY = "A plan is made from counts of MACs and parameters; latency is known only after a measurement."
IN_PLACE_OF_LATENCY = (
    "Use macs, such as macs=0.5, measure the result with kirsch.measure, and lower macs if it is too slow. "
    "The key goal.speedup of a recipe checks the measured speedup."
)

Spacing: TypeAlias = Literal["linear", "cubic"]
Reference = Annotated[Cost, Fix("Give the cost of a trace of the original model: of=graph.cost.")]


@checked
@dataclass(frozen=True)
class Goal(Printable):
    """Largest cost of the pruned model, as a fraction of the original.

    MACs are counted for one forward pass on the example inputs of `kirsch.trace`, with all samples of the batch.

    Args:
        macs: largest number of multiply-accumulates of the pruned model, as a fraction of that of the original; above 0
            and below 1.
        parameters: largest number of parameters of the pruned model, as a fraction of that of the original; above 0 and
            below 1.
        size: largest number of bytes of the parameters and buffers, as in a file of the weights; above 0 and below 1.
        memory: largest peak memory of the activations for the example inputs; above 0 and below 1. See
            `kirsch.graph.cost.Cost`.
        of: cost of the original, `graph.cost` of its trace. None: the original is the model that is planned. If a model
            is pruned several times, give the cost before the first pruning, so that each goal is a fraction of it.

    Raises:
        GoalError: all limits are None, or a fraction is out of range.
    """

    made_by: ClassVar[str] = "kirsch.Goal(macs=0.5)"

    _: KW_ONLY
    macs: float | None = None
    parameters: float | None = None
    size: float | None = None
    memory: float | None = None
    of: Reference | None = None

    @staticmethod
    def refuse_argument(name: str) -> GoalError | None:
        """Return the error for a limit of latency or FLOPs; None for other names, for `kirsch.arguments.checked`."""
        if "flop" in name.lower():
            return GoalError(
                f"The goal {name}: FLOPs are not counted, but multiply-accumulates are.",
                "One multiply-accumulate is two FLOPs, so that fractions of both are the same.",
                "Use macs, such as macs=0.5.",
            )
        if not LATENCY.search(name):
            return None
        return GoalError(f"The goal {name}: {NO_LATENCY}", WHY_NO_LATENCY, IN_PLACE_OF_LATENCY)

    def __post_init__(self) -> None:
        limits = self.to_dict()
        if not limits:
            raise GoalError(
                "A goal needs at least one limit.", fix="Pass macs=0.5, parameters=0.5, size=0.5 or memory=0.5."
            )
        for name, value in limits.items():
            if not (math.isfinite(value) and 0 < value < 1):
                raise GoalError(
                    f"The goal {name}={value} is out of range.",
                    "A goal is a fraction of the original, between 0 and 1 (exclusive).",
                    f"For half the cost use {name}=0.5.",
                )

    @checked
    def rounds(self, count: Count, *, of: Reference, spacing: Spacing = "cubic") -> tuple[Goal, ...]:
        """Return a goal for each of several rounds of pruning and training; the last one has the limits of this goal.

        Each goal is a fraction of the cost `of`, whatever the rounds before have removed:

            original = kirsch.trace(model, inputs)
            for goal in kirsch.Goal(macs=0.3).rounds(4, of=original.cost):
                plan = kirsch.plan(kirsch.trace(model, inputs), goal)

        Args:
            count: number of rounds.
            of: cost of the model before the first round.
            spacing: see `spaced`.
        """
        limits = {name: spaced(limit, count, spacing) for name, limit in self.to_dict().items()}
        rounds: list[dict[str, Any]] = [{name: limits[name][number] for name in limits} for number in range(count)]
        return tuple(Goal(of=of, **fractions) for fractions in rounds)

    def parts(self) -> list[Part]:
        """Return the limits in one line."""
        limits = [
            f"{WORDS[name]} ≤ {100 * limit:g} %{f' of {figures.count(getattr(self.of, name))}' if self.of else ''}"
            for name, limit in self.to_dict().items()
        ]
        return [[Piece(", ".join(limits) + ("" if self.of else " of the original"))]]

    def fractions(self, cost: Cost, original: Cost) -> dict[str, tuple[float, float]]:
        """Return for each limit (cost as a fraction of the original, largest fraction allowed), keyed by its name.

        Args:
            cost: cost of a model.
            original: cost of the original, which is used unless the goal states the original in `of`.
        """
        reference = self.of or original
        return {
            name: (getattr(cost, name) / max(getattr(reference, name), 1), limit)
            for name, limit in self.to_dict().items()
        }

    def met_by(self, cost: Cost, original: Cost) -> bool:
        """Return whether a cost is within every limit."""
        return all(value <= limit for value, limit in self.fractions(cost, original).values())

    def shortfall(self, least: Cost, original: Cost) -> str:
        """Return a text that compares the limits with the least reachable cost, for the limits that are missed."""
        missed = [(name, *pair) for name, pair in self.fractions(least, original).items() if pair[0] > pair[1]]
        texts = [(name, *figures.distinct_percents(limit, value)) for name, value, limit in missed]
        return "; ".join(
            f"{name} {limit} is requested, {value} is the least reachable with these options"
            for name, limit, value in texts
        )

    def to_dict(self) -> dict[str, float]:
        """Return the limits as JSON."""
        limits = {name: getattr(self, name) for name in WORDS}
        return {name: limit for name, limit in limits.items() if limit is not None}


def spaced(limit: float, count: int, spacing: Spacing) -> list[float]:
    """Return the largest fraction of the cost after each of several rounds of pruning; the last one is `limit`.

    After round i of n, the removed fraction s_i is s_n · i/n ("linear"), or s_n · (1 - (1 - i/n)³) ("cubic"), where s_n
    is 1 - limit. "cubic" removes most in the first rounds, where many units have little effect, and little in the last.

    Args:
        limit: fraction of the original cost after the last round, above 0 and below 1.
        count: number of rounds.
        spacing: "linear" or "cubic".

    Source: Zhu, Gupta 2017, arXiv:1710.01878, equation 1, with the initial sparsity 0; there s is a fraction of the
        weights, here of a cost.
    """
    removed = 1 - limit
    done = [number / count for number in range(1, count)]  # without the last round, whose limit has no rounding error
    parts = done if spacing == "linear" else [1 - (1 - fraction) ** 3 for fraction in done]
    return [*(1 - removed * part for part in parts), limit]
