"""What a student is charged for. Each formula stands once, over the arrays of any framework."""

from kirsch.distillation.losses.labels import hard_label
from kirsch.distillation.losses.logits import soft_target
from kirsch.distillation.losses.loss import LOSSES, Loss, loss

__all__ = ["LOSSES", "Loss", "hard_label", "loss", "soft_target"]
