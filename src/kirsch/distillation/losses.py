"""What a student is charged for. Each formula stands here once, over the arrays of any framework.

A loss takes the student's and the teacher's scores and gives a scalar; it is added under a name with
`@LOSSES.register("name")`, or by another package through the entry point group `kirsch.loss`.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from kirsch.distillation.arrays import constant, log_softmax, namespace, pick, same_shape
from kirsch.errors import UsageError
from kirsch.registry import Registry


class Loss(Protocol):
    """What a registered loss looks like."""

    def __call__(self, student: Any, teacher: Any, *, temperature: float) -> Any:
        """A scalar, smallest when the student equals the teacher; the teacher takes no gradient."""


LOSSES: Registry[Loss] = Registry("loss")


@LOSSES.register("kd")
def soft_target(student: Any, teacher: Any, *, temperature: float) -> Any:
    """Kullback-Leibler divergence from the softened teacher to the softened student, times temperature².

    Summed over classes, averaged over samples.

    Args:
        student, teacher: scores, shape (N, K), floating; the teacher takes no gradient.
        temperature: > 0; 1 leaves the scores as they are.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 when the softened outputs agree. Its gradient for the student's scores
        is T (p_student - p_teacher) / N.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2 (and why times T²).
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise UsageError(f"The temperature is {temperature}; a number above 0 is needed.")
    xp = namespace(student)
    same_shape(student, teacher)
    log_s = log_softmax(student / temperature)
    log_t = log_softmax(constant(teacher) / temperature)
    divergence = xp.sum(xp.exp(log_t) * (log_t - log_s), axis=-1)
    return divergence.mean() * temperature**2


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
