"""Rounds of pruning and training in a job: the same steps several times, with goals that approach the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from kirsch.annotations import Between
from kirsch.arguments import checked
from kirsch.errors import UsageError
from kirsch.graph.goal import Goal, Spacing, spaced
from kirsch.jobs.goal import PlanGoal
from kirsch.jobs.step import Step
from kirsch.options import Options
from kirsch.pruning.step import Prune

if TYPE_CHECKING:
    from collections.abc import Mapping

Times = Annotated[int, Between(1, 1000)]  # a recipe of a few lines must not expand to one that fills the memory

ONE_PRUNE = "Each round needs exactly one step prune."
NO_GOAL = "Remove goal and goal_of of this step: the goal of the repetition sets them in each round."


class Rounds(Options):
    """Number and goals of the rounds of a repetition."""

    goal: PlanGoal = Field(
        description="limits of the cost after the last round, as fractions of the model before the first step prune"
    )
    times: Times = Field(description="number of rounds")
    spacing: Spacing = Field(
        "cubic",
        description=(
            "goals of the rounds before the last one: the removed fraction grows by the same amount in each round "
            "(linear), or most in the first rounds (cubic, after Zhu and Gupta 2017, arXiv:1710.01878)"
        ),
    )

    def prune_options(self) -> list[dict[str, Any]]:
        """Return the options of the step prune in each round that set its goal."""
        limits = {name: spaced(limit, self.times, self.spacing) for name, limit in self.goal.to_dict().items()}
        goals = [{name: fractions[number] for name, fractions in limits.items()} for number in range(self.times)]
        return [{"goal": goal, "goal_of": "job"} for goal in goals]


def check_round(prunings: Sequence[Mapping[str, Any]]) -> None:
    """Check the steps of a round.

    Args:
        prunings: options of each step prune of the round.

    Raises:
        UsageError: there is not exactly one step prune, or it has a goal.
    """
    if len(prunings) != 1:
        fix = "Add a step prune." if not prunings else "Put the others before or after the repetition."
        raise UsageError(f"The steps to repeat contain {len(prunings)} steps prune.", ONE_PRUNE, fix)
    given = next((name for name in ("goal", "goal_of") if prunings[0].get(name) is not None), None)
    if given is not None:
        raise UsageError(f"The step prune in the steps to repeat has its own `{given}`.", "", NO_GOAL)


@checked
def repeat(steps: Sequence[Step], *, goal: Goal, times: Times, spacing: Spacing = "cubic") -> list[Step]:
    """Return the steps of several rounds of pruning and training, for `kirsch.compress(model, data, steps=...)`.

        steps = kirsch.steps.repeat([Prune(), Recover(epochs=2)], goal=kirsch.Goal(macs=0.3), times=4)
        kirsch.compress(model, data, steps=[*steps, Recover(epochs=10), Export()])

    A recipe has the same as an item of its steps: `- repeat: {times: 4, goal: {macs: 0.3}, steps: [prune, recover]}`.

    Args:
        steps: steps of one round, with one step `Prune` that has no goal.
        goal: limits of the cost after the last round, as fractions of the model before the first step `Prune`.
        times: number of rounds.
        spacing: goals of the rounds before the last one; see `kirsch.graph.goal.spaced`.

    Raises:
        UsageError: there is not exactly one step `Prune`, or it has a goal.
    """
    check_round([_given(step) for step in steps if isinstance(step, Prune)])
    rounds = Rounds(goal=goal, times=times, spacing=spacing).prune_options()
    return [
        step.changed(goal=Goal(**options["goal"]), goal_of="job") if isinstance(step, Prune) else step
        for options in rounds
        for step in steps
    ]


def _given(step: Prune) -> dict[str, Any]:
    """Return the goal of a step, and the model that it refers to, if it is not the default."""
    return {"goal": step.goal, "goal_of": None if step.goal_of == "step" else step.goal_of}
