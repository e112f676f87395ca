"""Rules for the ATen operators; importing this package registers all of them."""

from kirsch.frameworks.pytorch.analysis.operators import (
    contraction,
    indexing,
    normalization,
    pointwise,
    recurrent,
    slicing,
    spatial,
    view,
)
from kirsch.frameworks.pytorch.analysis.operators.rule import RULES, apply

__all__ = [
    "RULES",
    "apply",
    "contraction",
    "indexing",
    "normalization",
    "pointwise",
    "recurrent",
    "slicing",
    "spatial",
    "view",
]
