"""Goals of a job."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer

from kirsch.annotations import Between, Fix, Fraction, Positive
from kirsch.errors import UsageError
from kirsch.graph.plan import Goal
from kirsch.options import FieldsError, Options

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
    if not isinstance(value, dict):
        return value
    try:
        return Goal(**value)
    except UsageError as error:
        raise FieldsError([((), error)]) from error


PlanGoal = Annotated[Goal, BeforeValidator(_read), PlainSerializer(Goal.to_dict)]
"""A `Goal` as a field of options; recipes write it as a dict of its limits."""
