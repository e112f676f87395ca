"""The loss of contrastive representation distillation (CRD)."""

from __future__ import annotations

from typing import Any

from kirsch import ops
from kirsch.distillation.losses.loss import check_same_shape, loss


@loss("crd", takes="features", learned=True, least_at_teacher=False)
def noise_contrast(student: Any, teacher: Any) -> Any:
    """Return the noise-contrastive loss that identifies each sample's embedding among negatives, in both directions.

    The inputs are the outputs of the adapter "crd-bank": logits of one positive, in column 0, and of K negatives. The
    score of two embeddings v and w is exp(v · w / temperature) / Z, with a normalization constant Z. The adapter draws
    the negatives from its R stored embeddings, each with the probability 1 / R. The probability that a pair is the
    positive is therefore score / (score + K / R) = sigmoid(x), with the logit x = log(score / (K / R)).

    Args:
        student: logits of the student's embeddings with the teacher's, shape (N, 1 + K).
        teacher: logits of the teacher's embeddings with the student's, same shape. They receive a gradient, too.

    Returns:
        Scalar in nats, >= 0: -log sigmoid(x of the positive) - Σ log sigmoid(-x of a negative), averaged over samples
        and summed over both directions. A negative with a logit of minus infinity adds nothing.

    Raises:
        ShapeError: the shapes differ.

    Source: Tian et al. 2020, arXiv:1910.10699, section 3.2, with Z fixed as in the authors' code; that code also
        adds 1e-7 to denominators. The paper uses weight 0.8 beside soft targets, and K = 16384.
    """
    check_same_shape(student, teacher, "logits of positives and negatives")
    return _binary_cross_entropy(student) + _binary_cross_entropy(teacher)


def _binary_cross_entropy(logits: Any) -> Any:
    positive, negatives = ops.log_sigmoid(logits[:, 0]), ops.log_sigmoid(-logits[:, 1:])
    return -(ops.sum(positive) + ops.sum(negatives)) / logits.shape[0]
