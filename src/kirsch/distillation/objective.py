"""What a training run minimises, as data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from kirsch.distillation.losses import LOSSES
from kirsch.errors import UsageError


@dataclass(frozen=True)
class Term:
    """One distillation loss with its weight.

    Args:
        loss: its name among `LOSSES`.
        weight: >= 0.
        temperature: > 0.
    """

    loss: str = "kd"
    weight: float = 0.9
    temperature: float = 4.0


@dataclass(frozen=True)
class Objective:
    """weight of the labels · cross-entropy + Σ weight · distillation loss.

    Args:
        terms: distillation losses; empty for labels alone.
        label_weight: of the cross-entropy, >= 0.
        label_smoothing: 0 <= share < 1.

    Raises:
        UsageError: a number is out of range, or all weights are zero.
        UnknownNameError: there is no such loss.
    """

    terms: tuple[Term, ...] = ()
    label_weight: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        for term in self.terms:
            LOSSES[term.loss]  # an unknown name is answered here, before any work
            if not (math.isfinite(term.temperature) and term.temperature > 0):
                problems.append(f"the temperature of {term.loss!r} is {term.temperature}; a number above 0 is needed")
            if not (math.isfinite(term.weight) and term.weight >= 0):
                problems.append(f"the weight of {term.loss!r} is {term.weight}; a number of at least 0 is needed")
        if not (math.isfinite(self.label_weight) and self.label_weight >= 0):
            problems.append(f"label_weight is {self.label_weight}; a number of at least 0 is needed")
        if not 0 <= self.label_smoothing < 1:
            problems.append(f"label_smoothing is {self.label_smoothing}; a share of at least 0, below 1, is needed")
        if not problems and self.label_weight == 0 and all(term.weight == 0 for term in self.terms):
            problems.append("all weights are 0, so there is nothing to learn")
        if problems:
            raise UsageError("The objective is wrong: " + "; ".join(problems) + ".")

    @classmethod
    def kd(cls, temperature: float = 4.0, weight: float = 0.9) -> Objective:
        """Weight · soft targets + (1 - weight) · labels, after Hinton et al. 2015.

        Args:
            temperature: > 0; 4 is usual for small images, 1 to 2 where the teacher is unsure.
            weight: of the soft targets, 0 to 1; 0.9 is usual.
        """
        if not 0 <= weight <= 1:
            raise UsageError(f"The weight of the soft targets is {weight}; a share from 0 to 1 is needed.")
        return cls((Term("kd", weight, temperature),), label_weight=1 - weight)

    @classmethod
    def labels(cls, label_smoothing: float = 0.0) -> Objective:
        """Labels alone, without a teacher."""
        return cls((), 1.0, label_smoothing)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
