"""Soft targets for independent binary outputs."""

from __future__ import annotations

from typing import Any

from kirsch import ops
from kirsch.distillation.losses.logits import check_temperature
from kirsch.distillation.losses.loss import check_same_shape, loss


@loss("binary-kd", activation="sigmoid")
def binary_soft_target(student: Any, teacher: Any, *, temperature: float = 1.0, mask: Any = None) -> Any:
    """Return the KL divergence of the softened Bernoulli distribution of each class, times temperature².

    The divergence is summed over classes and averaged over samples or positions. It suits heads with a sigmoid: several
    labels per sample, or a single binary output.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating, or (N,) for a single binary output;
            no gradient reaches the teacher.
        temperature: > 0; logits are divided by it before the sigmoid.
        mask: shape (N,) or (N, L), true where a sample or position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 if the softened outputs agree. The gradient for the student's logits
        is T (p_student - p_teacher) / N.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        DataError: the mask is false everywhere.

    Source: Yang et al. 2023, arXiv:2308.06453, multi-label logits distillation, which has temperature 1.
    """
    check_temperature(temperature)
    check_same_shape(student, teacher)
    student, teacher = ops.zero_masked(student, mask) / temperature, ops.zero_masked(teacher, mask) / temperature
    divergence: Any = 0.0
    for sign in (1.0, -1.0):  # p and 1 - p
        log_s, log_t = ops.log_sigmoid(sign * student), ops.log_sigmoid(sign * teacher)
        divergence = divergence + ops.kl_terms(log_t, log_s)
    return ops.masked_mean(ops.sum(divergence, -1), mask) * temperature**2
