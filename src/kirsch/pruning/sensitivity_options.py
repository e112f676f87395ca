"""Options of the sensitivity of a model: one definition for `kirsch.sensitivity`, recipes and the command line."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kirsch.annotations import Count, Fix, Fraction, Names
from kirsch.options import Options
from kirsch.pruning.options import ClassWeights, KindNames

Fractions = Annotated[
    tuple[Fraction, ...], Fix("Give the fractions of units to remove, such as [0.25, 0.5], each above 0 and below 1.")
]
FRACTIONS = (0.1, 0.25, 0.5, 0.75)
SAMPLES = 256


class SensitivityOptions(Options):
    """Options of `kirsch.sensitivity`, where each is described in full, and of the step `sensitivity`."""

    fractions: Fractions = Field(FRACTIONS, description="fractions of the units of a group that are removed")
    importance: str = Field(
        "magnitude", description="importance that ranks the units; the least important ones are removed"
    )
    metric: str | None = Field(
        None, description="metric of the quality, as for max_drop of a plan; default: by the form of the labels"
    )
    class_weights: ClassWeights = Field(
        None, description="a dict from class to weight for the accuracy; the weight of other classes is 1"
    )
    kinds: KindNames | None = Field(
        None, description="only units of these kinds, and block for residual blocks; default: all units and blocks"
    )
    exclude: Names = Field((), description="layers or residual blocks that are left out; glob patterns")
    samples: Count = Field(SAMPLES, description="largest number of samples on which the quality is measured")
