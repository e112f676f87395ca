"""Goals of a job."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from kirsch.annotations import Fraction, MaxDrop, Positive, value_phrase
from kirsch.arguments import MismatchError, convert
from kirsch.errors import UsageError, listing, nearest
from kirsch.graph.cost_names import WORDS
from kirsch.graph.plan import Goal
from kirsch.options import FieldsError, Options, with_fields

OF_THE_FIRST = "as a fraction of that of the model before the first prune step (the student, if there is one)"


class JobGoal(Options):
    """Goals of a job, which are checked at its end. The goals of its steps are checked, too."""

    macs: Fraction | None = Field(None, description=f"largest number of multiply-accumulates, {OF_THE_FIRST}")
    parameters: Fraction | None = Field(None, description=f"largest number of parameters, {OF_THE_FIRST}")
    size: Fraction | None = Field(
        None, description=f"largest number of bytes of the parameters and buffers, {OF_THE_FIRST}"
    )
    memory: Fraction | None = Field(
        None, description=f"largest peak memory of the activations for one sample, {OF_THE_FIRST}"
    )
    max_drop: MaxDrop | None = Field(None, description="allowed drop of accuracy: 0.01 is one percentage point")
    speedup: Positive | None = Field(None, description="smallest speedup over the teacher")

    @property
    def cost(self) -> Goal | None:
        """Limits of the cost; None if there are none."""
        limits = {name: getattr(self, name) for name in WORDS}
        return None if all(limit is None for limit in limits.values()) else Goal(**limits)


def check_no_reference(goal: Goal) -> None:
    """Raise a UsageError for a goal that states the cost of its original: a job knows the model before its steps."""
    if goal.of is not None:
        raise UsageError(
            "The goal has a cost of the original, `of`.",
            "The limits of a job are fractions of the cost of its own model.",
            "Leave out `of`. With goal_of='job', the goal of a step prune refers to the model before the first one.",
        )


def _read(value: object) -> object:
    if isinstance(value, Goal):
        try:
            check_no_reference(value)
        except UsageError as error:
            raise FieldsError([((), error)]) from error
    return with_fields(_goal, value) if isinstance(value, dict) else value


def _goal(limits: dict[str, Any]) -> Goal:
    """Return the goal of the limits in a recipe; an error states the key and the value in the terms of the recipe."""
    unknown = next((name for name in limits if name not in WORDS and not Goal.refuse_argument(name)), None)
    if unknown is not None:
        raise UsageError("Unknown key.", listing(list(WORDS)), nearest(unknown, WORDS))
    for name in limits.keys() & WORDS.keys():
        try:
            convert(limits[name], float | None)
        except MismatchError as error:
            what = f"Expected a number above 0 and below 1, found {value_phrase(error.value)}."
            raise UsageError(what, fix=f"For half the cost write {name}: 0.5.") from error
    return Goal(**limits)


PlanGoal = Annotated[Goal, BeforeValidator(_read), PlainSerializer(Goal.to_dict)]
"""A `Goal` as a field of options; recipes write it as a dict of its limits."""
