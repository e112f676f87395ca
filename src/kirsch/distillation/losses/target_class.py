"""Losses that treat the labeled class differently from the other classes."""

from __future__ import annotations

import math
from typing import Any

from kirsch import ops
from kirsch.distillation.losses.logits import check_temperature, softened, standardized
from kirsch.distillation.losses.loss import check_same_shape, loss
from kirsch.errors import UsageError
from kirsch.tasks.label_losses import check_labels


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
    """Return the soft-target loss with separate weights for the labeled class and for the other classes.

    The loss is alpha · KL of (p_label, 1 - p_label) + beta · KL of the softmax over the other classes, times
    temperature². In plain soft targets the second term has the weight 1 - p_label of the teacher, which is near 0 where
    the teacher is confident.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating, K >= 2; no gradient reaches the teacher.
        labels: class numbers, shape (N,) or (N, L); those equal to -100 do not count.
        alpha, beta: >= 0, weights of the two terms.
        temperature: > 0.
        standardize: see `kd`.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 if the softened outputs agree.

    Raises:
        ShapeError: the shapes differ, or there is only one class.
        UsageError: the temperature is not above 0, or a weight is below 0.
        DataError: all labels are masked, or a label is out of range.

    Source: Zhao et al. 2022, arXiv:2203.08679, equation 7. CIFAR-100: alpha 1, beta 8,
    temperature 4; beta is 2 for ResNet-56 → 20 and 110 → 32, and 6 for VGG and wide ResNets. ImageNet: temperature 1;
    beta is 0.5 for ResNet-34 → 18 and 2 for ResNet-50 → MobileNet. The label loss has weight 1. The weight of this loss
    rises from 0 during the first 20 epochs (ImageNet: 1 epoch).
    """
    check_temperature(temperature)
    for name, weight in (("alpha", alpha), ("beta", beta)):
        if not 0 <= weight < math.inf:
            raise UsageError(f"`{name}` is {weight}; a number of at least 0 is needed.")
    check_same_shape(student, teacher)
    labels, mask = check_labels(student, labels, mask)
    student, teacher = ops.zero_masked(student, mask), ops.zero_masked(teacher, mask)
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    labeled = ops.one_hot(labels, student.shape[-1], ops.dtype(student))
    logs_s, logs_t = (_label_and_others(logits / temperature, labeled) for logits in (student, teacher))
    target = sum(ops.kl_terms(log_t, log_s) for log_s, log_t in zip(logs_s[:2], logs_t[:2], strict=True))
    others = ops.sum((1 - labeled) * ops.kl_terms(logs_t[2], logs_s[2]), axis=-1)
    return ops.masked_mean(alpha * target + beta * others, mask) * temperature**2


def _label_and_others(logits: Any, labeled: Any) -> tuple[Any, Any, Any]:
    """Return log p_label, log(1 - p_label), and the log-softmax over the other classes (..., K), 0 at the label.

    The label is excluded from the sum. Subtracting a large number from its logit instead fails in low precision.
    """
    log_all, log_others = ops.logsumexp(logits), ops.logsumexp(logits, mask=labeled == 0)
    label = ops.sum(ops.safe_multiply(labeled, logits), -1)
    others = ops.where(labeled == 0, logits - log_others, ops.zeros_like(logits))
    return label - log_all[..., 0], (log_others - log_all)[..., 0], others


@loss("ofa", least_at_teacher=False)
def one_for_all(student: Any, teacher: Any, *, labels: Any, power: float = 1.5, mask: Any = None) -> Any:
    """Return the cross-entropy with the teacher's probabilities, in which the label has more weight.

    The loss is the mean of -Σ ((p_t + y)^power - y) log p_s, where y is 1 for the label and 0 for other classes. A
    power above 1 raises the weight of the label where the teacher is confident in it. The loss is meant for a teacher
    of another architecture.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating; no gradient reaches the teacher.
        labels: class numbers, shape (N,) or (N, L); those equal to -100 do not count.
        power: > 0; 1 is the cross-entropy with the teacher's probabilities.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0; minimal where the student's output is proportional to (p_t + y)^power - y, not p_t itself.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the power is not above 0.
        DataError: all labels are masked, or a label is out of range.

    Source: Hao et al. 2023, arXiv:2310.19444. Power 1 to 1.5, weight 1, without temperature, for the logits and
        for each stage of the student, through an additional head.
    """
    if not 0 < power < math.inf:
        raise UsageError(f"`power` is {power}; a number above 0 is needed.")
    check_same_shape(student, teacher)
    labels, mask = check_labels(student, labels, mask)
    labeled = ops.one_hot(labels, student.shape[-1], ops.dtype(student))
    target = (ops.exp(ops.log_softmax(ops.zero_masked(teacher, mask))) + labeled) ** power - labeled
    return ops.masked_mean(
        -ops.sum(ops.safe_multiply(target, ops.log_softmax(ops.zero_masked(student, mask))), -1), mask
    )


@loss("wsld", least_at_teacher=False)
def weighted_soft_labels(student: Any, teacher: Any, *, labels: Any, temperature: float = 1.0, mask: Any = None) -> Any:
    """Return the cross-entropy with the softened teacher, weighted by the student's loss on the label, times T².

    The weight of a sample is 1 - exp(-CE_student / CE_teacher), with the cross-entropies of the label at temperature 1.
    No gradient flows through the weight.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating; no gradient reaches the teacher.
        labels: class numbers, shape (N,) or (N, L); those equal to -100 do not count.
        temperature: > 0.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0. For fixed weights it is smallest where the softened outputs agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        DataError: all labels are masked, or a label is out of range.

    Source: Zhou et al. 2021 (weighted soft labels), arXiv:2102.00650; the constant 1e-7 is from mmrazor's `WSLD`.
    """
    check_temperature(temperature)
    check_same_shape(student, teacher)
    labels, mask = check_labels(student, labels, mask)
    loss_s, loss_t = (
        -ops.take_column(ops.log_softmax(ops.zero_masked(logits, mask)), labels)
        for logits in (ops.detach(student), teacher)
    )
    weight = 1 - ops.exp(-loss_s / (loss_t + 1e-7))  # the teacher's cross-entropy is 0 where it is certain of the label
    log_s, log_t = softened(student, teacher, temperature=temperature, mask=mask)
    return ops.masked_mean(-weight * ops.sum(ops.safe_multiply(ops.exp(log_t), log_s), -1), mask) * temperature**2
