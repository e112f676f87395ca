"""The loss of CRD: which of many embeddings is of the same sample."""

from __future__ import annotations

from typing import Any

from kirsch.distillation.arrays import log_sigmoid, same_shape
from kirsch.distillation.losses.loss import loss


@loss("crd", takes="features", learned=True, least_at_teacher=False)
def noise_contrast(student: Any, teacher: Any) -> Any:
    """How badly the embedding of each sample is told from those of other samples, in both directions.

    It takes what the adapter "crd-bank" gives. There x is log(score / (K / rows)), of the positive first and of K
    negatives behind it, where rows is the number of embeddings the negatives are drawn from, so that K / rows is what
    noise is expected to score. The positive is one with probability score / (score + K / rows) = sigmoid(x).

    Args:
        student: of the student's embeddings against the teacher's, shape (N, 1 + K).
        teacher: of the teacher's embeddings against the student's, of the same shape; learned, too.

    Returns:
        Scalar in nats, >= 0: -log sigmoid(x of the positive) - Σ log sigmoid(-x of a negative), averaged over samples,
        summed over both directions. A negative of minus infinity costs nothing.

    Raises:
        ShapeError: the shapes differ.

    Source: Tian et al. 2020, arXiv:1910.10699, section 3.2, with Z fixed as in the authors' code, which adds 1e-7
        below its fractions. Weight 0.8 beside soft targets; K = 16384 there.
    """
    same_shape(student, teacher, "scores of positives and negatives")
    return _told_apart(student) + _told_apart(teacher)


def _told_apart(logits: Any) -> Any:
    found, refused = log_sigmoid(logits[:, 0]), log_sigmoid(-logits[:, 1:])
    return -(found.sum() + refused.sum()) / len(logits)
