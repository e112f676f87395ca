"""Divergences between the softened outputs of student and teacher other than that of soft targets."""

from __future__ import annotations

import math
from typing import Any

from kirsch.distillation.arrays import log_sigmoid, mean_over, namespace, relative, same_shape
from kirsch.distillation.losses.logits import check_convention, check_temperature, softened
from kirsch.distillation.losses.loss import loss
from kirsch.errors import UsageError

NOTHING = 1e-30
"""A share below which 32 bits cannot hold its exponentials; the divergence is then its limit."""


@loss("reverse-kl")
def reverse_kl(student: Any, teacher: Any, *, temperature: float = 1.0, mask: Any = None) -> Any:
    """Kullback-Leibler divergence from the softened student to the softened teacher, times temperature².

    It charges what the student holds for likely and the teacher does not, so that a small student keeps to some of the
    teacher's modes, where soft targets spread it over all.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating; the teacher takes no gradient.
        temperature: > 0.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 when the softened outputs agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        DataError: the mask is false everywhere.

    Source: Gu et al. 2024 (MiniLLM), arXiv:2306.08543, here of each position by itself.
    """
    check_temperature(temperature)
    same_shape(student, teacher)
    log_s, log_t = softened(student, teacher, temperature=temperature, mask=mask)
    return mean_over(relative(log_s, log_t).sum(-1), mask) * temperature**2


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
    """Generalized Jensen-Shannon divergence: a smooth way from soft targets (beta 0) to the reverse (beta 1).

    With M = (1 - β) p_s + β p_t it is [β KL(p_t ‖ M) + (1 - β) KL(p_s ‖ M)] / [β (1 - β)], times temperature². The
    limits for β → 0 and β → 1 are KL(p_t ‖ p_s) and KL(p_s ‖ p_t), and the ends have them, so that a schedule may go
    from one to the other.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating; the teacher takes no gradient.
        beta: share of the teacher in the mixture, 0 to 1.
        temperature: > 0.
        convention: "trl" does not divide by β (1 - β) and knows no temperature². Its value goes to 0 at both ends, and
            jumps to the full divergence at β = 0 and β = 1.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 when the softened outputs agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: beta is no share, or the temperature is not above 0.
        UnknownNameError: there is no such convention.
        DataError: the mask is false everywhere.

    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649, as TRL has it, with β = 0.5 (there, text is sampled at
        temperature 0.9). Huszár 2015, arXiv:1511.05101, shows the limits that the division brings out.
    """
    check_temperature(temperature)
    check_convention(convention, ("kirsch", "trl"))
    if not 0 <= beta <= 1:
        raise UsageError(f"beta is {beta}; a share from 0 to 1 is needed.")
    xp = namespace(student)
    same_shape(student, teacher)
    log_s, log_t = softened(student, teacher, temperature=temperature, mask=mask)
    parts = _excess(log_s, log_t, beta) + _excess(log_t, log_s, 1 - beta)
    divergence = mean_over(xp.sum(parts, axis=-1), mask)
    if convention == "trl":
        return divergence * (beta * (1 - beta) if 0 < beta < 1 else 1.0)
    return divergence * temperature**2


def _excess(log_p: Any, log_q: Any, share: float) -> Any:
    """KL(p ‖ (1 - a) p + a q) / a of each class, plus q - p, whose sum is 0: so each class is >= 0, for a share a.

    With u = q / p - 1 it is p (a u - log(1 + a u)) / a. Nothing cancels for small shares, unlike in KL / a; and
    log(1 + a u) is written with the ratio's logarithm, since q / p itself may overflow.
    """
    xp = namespace(log_p)
    if share < NOTHING:
        return xp.zeros_like(log_p)
    p = xp.exp(log_p)
    # Where p is 0 its share of the sum is, whatever the ratio.
    ratio = xp.where(p == 0, xp.zeros_like(p), log_q) - xp.where(p == 0, xp.zeros_like(p), log_p)
    mixed = ratio  # log(1 + a u)
    if share < 1:
        rest = math.log1p(-share)
        mixed = rest - log_sigmoid(rest - math.log(share) - ratio)
    return xp.exp(log_q) - p - p * mixed / share
