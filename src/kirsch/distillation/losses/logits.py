"""Losses on the scores of student and teacher."""

from __future__ import annotations

import math
from typing import Any

from kirsch.distillation.arrays import blank, log_softmax, mean_over, namespace, same_shape
from kirsch.distillation.losses.loss import loss
from kirsch.errors import UsageError


@loss("kd")
def soft_target(student: Any, teacher: Any, *, temperature: float = 1.0, mask: Any = None) -> Any:
    """Kullback-Leibler divergence from the softened teacher to the softened student, times temperature².

    Summed over classes, averaged over samples, or over the positions of sequences that count.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating; the teacher takes no gradient.
        temperature: > 0; 1 leaves the scores as they are.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 when the softened outputs agree. Its gradient for the student's scores
        is T (p_student - p_teacher) / N.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        DataError: the mask is false everywhere.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2 (and why times T²).
    """
    check_temperature(temperature)
    xp = namespace(student)
    same_shape(student, teacher)
    log_s = log_softmax(blank(student, mask) / temperature)
    log_t = log_softmax(blank(teacher, mask) / temperature)
    divergence = xp.sum(xp.exp(log_t) * (log_t - log_s), axis=-1)
    return mean_over(divergence, mask) * temperature**2


def check_temperature(temperature: float) -> None:
    """Raise a UsageError if a temperature is not a number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise UsageError(f"The temperature is {temperature}; a number above 0 is needed.")
