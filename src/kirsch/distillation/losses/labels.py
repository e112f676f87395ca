"""What a student is charged for against the labels of the data, without a teacher."""

from __future__ import annotations

from typing import Any

from kirsch.distillation.arrays import log_softmax, pick


def hard_label(student: Any, targets: Any, *, label_smoothing: float = 0.0) -> Any:
    """Cross-entropy of the student's scores against the labels, averaged over samples.

    Args:
        student: scores, shape (N, K), floating.
        targets: class numbers, shape (N,), 0 <= target < K.
        label_smoothing: this share of each label is spread evenly over all K classes; 0 <= share < 1.

    Returns:
        Scalar in nats, >= 0.

    Source: smoothing after Szegedy et al. 2016, arXiv:1512.00567, section 7. Off by default: a teacher that is matched
        softens the labels better than a constant does (Müller et al. 2019, arXiv:1906.02629).
    """
    log_p = log_softmax(student)
    loss = -pick(log_p, targets).mean()
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean()
    return loss
