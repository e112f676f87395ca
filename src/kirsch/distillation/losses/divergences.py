"""Divergences between the softened outputs of student and teacher, besides the soft-target loss."""

from __future__ import annotations

import math
from typing import Any

from kirsch import ops
from kirsch.distillation.losses.logits import check_temperature, softened
from kirsch.distillation.losses.loss import check_convention, check_same_shape, loss
from kirsch.errors import UsageError

SMALLEST_SHARE = 1e-30
"""Mixture share below which 32-bit exponentials underflow; the divergence is then replaced by its limit."""


@loss("reverse-kl")
def reverse_kl(student: Any, teacher: Any, *, temperature: float = 1.0, mask: Any = None) -> Any:
    """Return the KL divergence from the softened student to the softened teacher, times temperature².

    The reverse divergence is large where the student assigns probability that the teacher does not. A small student
    therefore concentrates on some modes of the teacher, whereas soft targets make it cover all of them.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating; no gradient reaches the teacher.
        temperature: > 0.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 if the softened outputs agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        DataError: the mask is false everywhere.

    Source: Gu et al. 2024 (MiniLLM), arXiv:2306.08543; here for each position separately.
    """
    check_temperature(temperature)
    check_same_shape(student, teacher)
    log_s, log_t = softened(student, teacher, temperature=temperature, mask=mask)
    return ops.masked_mean(ops.sum(ops.kl_terms(log_s, log_t), -1), mask) * temperature**2


@loss("jsd")
def jensen_shannon(
    student: Any,
    teacher: Any,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    convention: str = "kirsch",
    mask: Any = None,
) -> Any:
    """Return the generalized Jensen-Shannon divergence: the forward KL at beta 0, the reverse KL at beta 1.

    With M = (1 - β) p_s + β p_t it is [β KL(p_t ‖ M) + (1 - β) KL(p_s ‖ M)] / [β (1 - β)], times temperature². At β = 0
    and β = 1 the value is the limit, KL(p_t ‖ p_s) or KL(p_s ‖ p_t), so a schedule can move β from 0 to 1.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating; no gradient reaches the teacher.
        beta: share of the teacher in the mixture, 0 to 1.
        temperature: > 0.
        convention: "kirsch", or "trl", which omits the division by β (1 - β) and the factor T². With "trl", the loss
            approaches 0 for β → 0 and β → 1, and jumps to the full divergence at β = 0 and β = 1.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 if the softened outputs agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: beta is not from 0 to 1, or the temperature is not above 0.
        UnknownNameError: the convention is unknown.
        DataError: the mask is false everywhere.

    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649, as in TRL, with β = 0.5 (TRL samples text at temperature
        0.9). The limits are derived in Huszár 2015, arXiv:1511.05101.
    """
    check_temperature(temperature)
    check_convention(convention, ("kirsch", "trl"))
    if not 0 <= beta <= 1:
        raise UsageError(f"`beta` is {beta}; a number from 0 to 1 is needed.")
    check_same_shape(student, teacher)
    log_s, log_t = softened(student, teacher, temperature=temperature, mask=mask)
    terms = _mixture_terms(log_s, log_t, beta) + _mixture_terms(log_t, log_s, 1 - beta)
    divergence = ops.masked_mean(ops.sum(terms, axis=-1), mask)
    if convention == "trl":
        return divergence * (beta * (1 - beta) if 0 < beta < 1 else 1.0)
    return divergence * temperature**2


def _mixture_terms(log_p: Any, log_q: Any, share: float) -> Any:
    """Return the terms of KL(p ‖ (1 - a) p + a q) / a for a share a, plus q - p, so that each term is >= 0.

    The sum of q - p over classes is 0. With u = q / p - 1 a term is p (a u - log(1 + a u)) / a, which avoids the
    cancellation in KL / a for small a. log(1 + a u) is computed from log(q / p), since q / p itself may overflow.
    """
    if share < SMALLEST_SHARE:
        return ops.zeros_like(log_p)
    p = ops.exp(log_p)
    # Where p is 0 the product below is 0 whatever the ratio, but an infinite ratio would give NaN.
    ratio = ops.where(p == 0, ops.zeros_like(p), log_q) - ops.where(p == 0, ops.zeros_like(p), log_p)
    log_mixture = ratio  # log(1 + a u)
    if share < 1:
        log_rest = math.log1p(-share)
        log_mixture = log_rest - ops.log_sigmoid(log_rest - math.log(share) - ratio)
    return ops.exp(log_q) - p - p * log_mixture / share
