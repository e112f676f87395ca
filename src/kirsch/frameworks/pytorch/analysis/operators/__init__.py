"""What each ATen operator does to labels; importing this registers all rules."""

from kirsch.frameworks.pytorch.analysis.operators import (
    contraction,
    indexing,
    normalization,
    part,
    pointwise,
    recurrent,
    space,
    view,
)
from kirsch.frameworks.pytorch.analysis.operators.rule import RULES, apply

__all__ = [
    "RULES",
    "apply",
    "contraction",
    "indexing",
    "normalization",
    "part",
    "pointwise",
    "recurrent",
    "space",
    "view",
]
