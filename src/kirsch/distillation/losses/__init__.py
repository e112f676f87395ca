"""What a student is charged for. Each formula stands once, over the arrays of any framework.

To import a file of losses is to register them.
"""

from kirsch.distillation.losses import (
    binary,
    contrast,
    correlation,
    detection,
    divergences,
    maps,
    regression,
    relations,
    sequences,
    stages,
    target_class,
    tokens,
    top_k,
)
from kirsch.distillation.losses.labels import LABEL_LOSSES, hard_label
from kirsch.distillation.losses.logits import soft_target
from kirsch.distillation.losses.loss import LOSSES, Loss, loss

__all__ = [
    "LABEL_LOSSES",
    "LOSSES",
    "Loss",
    "binary",
    "contrast",
    "correlation",
    "detection",
    "divergences",
    "hard_label",
    "loss",
    "maps",
    "regression",
    "relations",
    "sequences",
    "soft_target",
    "stages",
    "target_class",
    "tokens",
    "top_k",
]
