"""What a student is charged for. Each formula stands once, over the arrays of any framework."""

from kirsch.distillation.losses.detection import detection_features, detection_response, detr
from kirsch.distillation.losses.labels import hard_label
from kirsch.distillation.losses.logits import soft_target
from kirsch.distillation.losses.loss import LOSSES, Loss, loss
from kirsch.distillation.losses.sequences import ctc_frames
from kirsch.distillation.losses.tokens import (
    attention_ce,
    attention_kl,
    attention_mse,
    cls_pkd,
    hidden_cosine,
    hidden_mse,
    minilm,
    token_fsp,
    token_nst,
)

__all__ = [
    "LOSSES",
    "Loss",
    "attention_ce",
    "attention_kl",
    "attention_mse",
    "cls_pkd",
    "ctc_frames",
    "detection_features",
    "detection_response",
    "detr",
    "hard_label",
    "hidden_cosine",
    "hidden_mse",
    "loss",
    "minilm",
    "soft_target",
    "token_fsp",
    "token_nst",
]
