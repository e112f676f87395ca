"""Distillation losses. Each formula exists once and works on the arrays of any framework.

Importing a module of losses registers them.
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
from kirsch.distillation.losses.logits import soft_target
from kirsch.distillation.losses.loss import LOSSES, Loss, check_same_shape, loss
from kirsch.tasks.label_losses import LABEL_LOSSES, hard_label

__all__ = [
    "LABEL_LOSSES",
    "LOSSES",
    "Loss",
    "binary",
    "check_same_shape",
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
