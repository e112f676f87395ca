"""Schedules of sparsity over the steps or rounds of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kirsch.annotations import Count, Seed
from kirsch.arguments import checked
from kirsch.errors import UsageError
from kirsch.pruning.sparsity.options import Sparsity


@checked
@dataclass(frozen=True)
class SparsitySchedule:
    """Sparsity as a function of the step of a training; the unit of a step is yours: an optimizer step or a round.

    Args:
        final: sparsity after the last change, which is among the steps from `begin` to `begin + steps - 1`.
        steps: number of steps of the training. A loop of `steps` steps ends at the final sparsity.
        initial: sparsity before step `begin`.
        begin: step of the first change.
        every: number of steps between two changes, and at most from the last change to the end of the training.
        kind: "cubic" is final + (initial - final) (1 - n / N)³ after change n of N. It removes most weights early, when
            many are redundant; other tools call it AGP or polynomial decay. "constant" is the final sparsity from step
            `begin` on.

    Source: Zhu, Gupta 2017, arXiv:1710.01878, equation 1. There, the sparsity at the first step is still the initial
    one, and the final one is reached one change after a loop of `steps` steps.
    """

    final: Sparsity
    steps: Count = 1
    initial: Sparsity = 0.0
    begin: Seed = 0
    every: Count = 1
    kind: Literal["cubic", "constant"] = "cubic"

    def __post_init__(self) -> None:
        if self.initial > self.final:
            raise UsageError(
                f"`initial` of kirsch.SparsitySchedule is {self.initial:g}, above `final`, {self.final:g}.",
                "Masks only grow.",
                "Give a smaller `initial`.",
            )

    def __call__(self, step: int) -> float:
        """Return the sparsity at a step; it is constant between two changes."""
        if step < self.begin:
            return self.initial
        changes, done = -(-self.steps // self.every), (step - self.begin) // self.every + 1
        if self.kind == "constant" or done >= changes:
            return self.final
        return self.final + (self.initial - self.final) * (1 - done / changes) ** 3

    def changes_at(self, step: int) -> bool:
        """Return whether the sparsity at a step differs from that of the step before, or is that of the first step."""
        return step == 0 or self(step) != self(step - 1)

    @property
    def rounds(self) -> tuple[float, ...]:
        """The sparsities after `begin`, one for each change, for pruning and training in rounds."""
        found = [self(step) for step in range(self.begin, self.begin + self.steps) if self.changes_at(step)]
        return tuple(value for value in found if value > self.initial)
