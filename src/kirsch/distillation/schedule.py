"""Weights and temperatures that change during training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kirsch.arguments import checked


@checked
@dataclass(frozen=True)
class Ramp:
    """A number that changes linearly from `start` to `end` over some epochs, and then stays at `end`.

    Args:
        start, end: finite.
        epochs: number of epochs of the change, > 0.
        after: number of epochs before the change, >= 0.
    """

    made_by: ClassVar[str] = "kirsch.Ramp(start, end, epochs)"

    start: float
    end: float
    epochs: float
    after: float = 0.0

    def at(self, epoch: float) -> float:
        """Return the value after `epoch` epochs."""
        progress = min(max((epoch - self.after) / self.epochs, 0.0), 1.0)
        return self.start + (self.end - self.start) * progress


Number = float | Ramp
"""A constant, or a ramp."""


def at(number: Number, epoch: float) -> float:
    """Return the value of a number after `epoch` epochs."""
    return number.at(epoch) if isinstance(number, Ramp) else float(number)


def ends(number: Number) -> tuple[float, ...]:
    """Return the first and the last value of a ramp, or the constant."""
    return (number.start, number.end) if isinstance(number, Ramp) else (number,)


def problem(name: str, number: Number, *, above: float | None = None, least: float | None = None) -> str | None:
    """Return the problem as text if the number is not finite or leaves its range, else None."""
    if isinstance(number, Ramp) and not (number.epochs > 0 and number.after >= 0 and math.isfinite(number.epochs)):
        return (
            f"{name} changes over {number.epochs} epochs after {number.after}; more than 0 after at least 0 are needed"
        )
    for value in ends(number):
        if not isinstance(value, (int, float)):
            return f"{name} is {value!r}; a number is needed, or a Ramp"
        if above is not None and not (math.isfinite(value) and value > above):
            return f"{name} is {value}; a number above {above:g} is needed"
        if least is not None and not (math.isfinite(value) and value >= least):
            return f"{name} is {value}; a number of at least {least:g} is needed"
    return None
