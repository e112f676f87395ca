"""Soft targets for scores of which each is a yes or no of its own."""

from __future__ import annotations

from typing import Any

from kirsch.distillation.arrays import blank, log_sigmoid, mean_over, relative, same_shape
from kirsch.distillation.losses.logits import check_temperature
from kirsch.distillation.losses.loss import loss


@loss("binary-kd", activation="sigmoid")
def binary_soft_target(student: Any, teacher: Any, *, temperature: float = 1.0, mask: Any = None) -> Any:
    """Kullback-Leibler divergence of the softened yes or no of each class, times temperature².

    Summed over classes, averaged over samples or positions. Classes are not compared: it fits heads with a logistic
    function, of many labels a sample or of a single question.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating, or (N,) of a single question; the teacher takes
            no gradient.
        temperature: > 0; scores are divided by it before the logistic function.
        mask: shape (N,) or (N, L), true where a sample or position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 when the softened outputs agree. Its gradient for the student's scores
        is T (p_student - p_teacher) / N.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        DataError: the mask is false everywhere.

    Source: Yang et al. 2023, arXiv:2308.06453, whose multi-label logits distillation is this at temperature 1.
    """
    check_temperature(temperature)
    same_shape(student, teacher)
    student, teacher = blank(student, mask) / temperature, blank(teacher, mask) / temperature
    divergence: Any = 0.0
    for sign in (1.0, -1.0):  # yes, and no
        log_s, log_t = log_sigmoid(sign * student), log_sigmoid(sign * teacher)
        divergence = divergence + relative(log_t, log_s)
    return mean_over(divergence.sum(-1), mask) * temperature**2
