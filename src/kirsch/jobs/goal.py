"""Goals of a job."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from kirsch.annotations import Between, Fix, Fraction, Positive, value_phrase
from kirsch.arguments import MismatchError, convert
from kirsch.errors import UsageError, listing, nearest
from kirsch.graph.cost import WORDS
from kirsch.graph.plan import Goal
from kirsch.options import Options, with_fields

MaxDrop = Annotated[
    float,
    Between(0, 1, exclusive="most"),
    Fix("For a drop of at most one percentage point, write max_drop=0.01."),
]
"""A drop of accuracy, as a fraction."""

OF_THE_FIRST = "as a fraction of the number in the model before the first prune step (the student, if there is one)"


class JobGoal(Options):
    """Goals of a job, which are checked at its end. The goals of its steps are checked, too."""

    macs: Fraction | None = Field(None, description=f"largest number of multiply-accumulates, {OF_THE_FIRST}")
    parameters: Fraction | None = Field(None, description=f"largest number of parameters, {OF_THE_FIRST}")
    max_drop: MaxDrop | None = Field(None, description="allowed drop of accuracy: 0.01 is one percentage point")
    speedup: Positive | None = Field(None, description="smallest speedup over the teacher")

    @property
    def cost(self) -> Goal | None:
        """Limits of the cost; None if there are none."""
        if self.macs is None and self.parameters is None:
            return None
        return Goal(macs=self.macs, parameters=self.parameters)


def _read(value: object) -> object:
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
