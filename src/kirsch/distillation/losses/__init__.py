"""What a student is charged for. Each formula stands once, over the arrays of any framework.

To import a file of losses is to register them.
"""

from kirsch.distillation.losses import detection, maps, relations, sequences, stages, tokens
from kirsch.distillation.losses.labels import hard_label
from kirsch.distillation.losses.logits import soft_target
from kirsch.distillation.losses.loss import LOSSES, Loss, loss

__all__ = [
    "LOSSES",
    "Loss",
    "detection",
    "hard_label",
    "loss",
    "maps",
    "relations",
    "sequences",
    "soft_target",
    "stages",
    "tokens",
]
