"""Losses in which the class of the label plays a part of its own."""

from __future__ import annotations

import math
from typing import Any

from kirsch.distillation.arrays import (
    blank,
    constant,
    expected,
    log_softmax,
    log_sum_exp,
    mean_over,
    namespace,
    one_hot,
    pick,
    relative,
    same_shape,
)
from kirsch.distillation.losses.labels import counted
from kirsch.distillation.losses.logits import check_temperature, softened, standardized
from kirsch.distillation.losses.loss import loss
from kirsch.errors import UsageError


@loss("dkd")
def decoupled(
    student: Any,
    teacher: Any,
    *,
    labels: Any,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    standardize: bool = False,
    mask: Any = None,
) -> Any:
    """Soft targets in two parts with weights of their own: how sure of the label, and how the other classes compare.

    alpha · KL of (p_label, 1 - p_label) + beta · KL of the softmax over the other classes, times temperature².
    In plain soft targets the second part is weighted with 1 - p_label of the teacher, and fades where it is sure.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating, K >= 2; the teacher takes no gradient.
        labels: class numbers, shape (N,) or (N, L); those equal to -100 do not count.
        alpha, beta: >= 0, weights of the parts.
        temperature: > 0.
        standardize: as in `kd`.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 when the softened outputs agree.

    Raises:
        ShapeError: the shapes differ, or there is one class alone.
        UsageError: the temperature is not above 0, or a weight is below 0.
        DataError: nothing counts, or a label is out of range.

    Source: Zhao et al. 2022, arXiv:2203.08679, equation 7. Alpha 1, beta 8 and temperature 4 for CIFAR-100 (beta 2 for
        56 → 20 and 110 → 32 layers, 6 for VGG and wide ResNets), beta 0.5 and temperature 1 for ResNet-34 → 18 on
        ImageNet, 2 for ResNet-50 → MobileNet; beside the labels with weight 1, warmed up over 20 epochs (ImageNet: 1).
    """
    check_temperature(temperature)
    for name, weight in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"{name} is {weight}; a number of at least 0 is needed.")
    xp = namespace(student)
    same_shape(student, teacher)
    labels, mask = counted(student, labels, mask)
    student, teacher = blank(student, mask), blank(teacher, mask)
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    hot = one_hot(labels, student)
    of_s, of_t = (_label_and_others(scores / temperature, hot) for scores in (student, teacher))
    target = sum(relative(log_t, log_s) for log_s, log_t in zip(of_s[:2], of_t[:2], strict=True))
    others = xp.sum((1 - hot) * relative(of_t[2], of_s[2]), axis=-1)
    return mean_over(alpha * target + beta * others, mask) * temperature**2


def _label_and_others(scores: Any, hot: Any) -> tuple[Any, Any, Any]:
    """Of each item: log p_label, log(1 - p_label), and the log-softmax over the other classes (..., K), 0 at the label.

    The label is left out of the sum itself; to subtract a large number from its score would fail in low precision.
    """
    xp = namespace(scores)
    every, rest = log_sum_exp(scores), log_sum_exp(scores, where=hot == 0)
    label = expected(hot, scores).sum(-1)
    others = xp.where(hot == 0, scores - rest, xp.zeros_like(scores))
    return label - every[..., 0], (rest - every)[..., 0], others


@loss("ofa", least_at_teacher=False)
def one_for_all(student: Any, teacher: Any, *, labels: Any, power: float = 1.5, mask: Any = None) -> Any:
    """Cross-entropy to the teacher's output plus the labels, sharpened: mean of -Σ ((p_t + y)^power - y) log p_s.

    A power above 1 leans on the labels where the teacher is sure of them, for a teacher of another architecture.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating; the teacher takes no gradient.
        labels: class numbers, shape (N,) or (N, L); those equal to -100 do not count.
        power: > 0; 1 is the cross-entropy to the teacher's output.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0; least where the student's output is proportional to (p_t + y)^power - y, not p_t itself.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the power is not above 0.
        DataError: nothing counts, or a label is out of range.

    Source: Hao et al. 2023, arXiv:2310.19444. Power 1 to 1.5, weight 1, without temperature, for the scores
        and for each stage of the student that is given a head of its own.
    """
    if not (math.isfinite(power) and power > 0):
        raise UsageError(f"The power is {power}; a number above 0 is needed.")
    xp = namespace(student)
    same_shape(student, teacher)
    labels, mask = counted(student, labels, mask)
    hot = one_hot(labels, student)
    target = (xp.exp(log_softmax(blank(teacher, mask))) + hot) ** power - hot
    return mean_over(-expected(target, log_softmax(blank(student, mask))).sum(-1), mask)


@loss("wsld", least_at_teacher=False)
def weighted_soft_labels(student: Any, teacher: Any, *, labels: Any, temperature: float = 1.0, mask: Any = None) -> Any:
    """Cross-entropy to the softened teacher, less where the student does better on the labels, times temperature².

    The weight of a sample is 1 - exp(-CE_student / CE_teacher), of the cross-entropies against the labels, at
    temperature 1; it is held constant.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating; the teacher takes no gradient.
        labels: class numbers, shape (N,) or (N, L); those equal to -100 do not count.
        temperature: > 0.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0. For the weights of one step it is least where the softened outputs agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        DataError: nothing counts, or a label is out of range.

    Source: Zhou et al. 2021 (weighted soft labels), arXiv:2102.00650; the 1e-7 is that of mmrazor's `WSLD`.
    """
    check_temperature(temperature)
    xp = namespace(student)
    same_shape(student, teacher)
    labels, mask = counted(student, labels, mask)
    mine, theirs = (-pick(log_softmax(blank(scores, mask)), labels) for scores in (constant(student), teacher))
    weight = 1 - xp.exp(-mine / (theirs + 1e-7))  # a teacher that is sure of the label has no cross-entropy
    log_s, log_t = softened(student, teacher, temperature=temperature, mask=mask)
    return mean_over(-weight * expected(xp.exp(log_t), log_s).sum(-1), mask) * temperature**2
