"""Losses on the logits of student and teacher, one sample at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kirsch import ops
from kirsch.distillation.losses.loss import check_convention, check_same_shape, loss
from kirsch.errors import UsageError


@dataclass(frozen=True)
class Convention:
    """Scaling of the soft-target loss in a code base.

    Args:
        temperature_squared: multiply the divergence by temperature².
        mean_over_classes: average over classes instead of summing, which makes the loss K times smaller.
        entropy_kept: compute the cross-entropy with the soft targets. It is larger than the divergence by the entropy
            of the targets, and has the same gradient.
        floor: lower bound to which probabilities are clipped.
    """

    temperature_squared: bool = True
    mean_over_classes: bool = False
    entropy_kept: bool = False
    floor: float = 0.0


CONVENTIONS = {
    "kirsch": Convention(),
    "repdistiller": Convention(),
    "mdistiller": Convention(),
    "mmrazor": Convention(),  # KLDivergence
    "torchdistill": Convention(temperature_squared=False),  # KDLoss without labels
    "modelopt": Convention(mean_over_classes=True),  # LogitsDistillationLoss
    "modelopt-megatron": Convention(temperature_squared=False),  # LogitsKLLoss
    "deit": Convention(mean_over_classes=True),  # soft distillation
    "neural-compressor": Convention(mean_over_classes=True),  # its loss for PyTorch
    "textbrewer": Convention(temperature_squared=False, entropy_kept=True),  # kd_ce_loss
    "trl": Convention(temperature_squared=False),  # generalized_jsd_loss, beta = 0
    "distillkit": Convention(),
    "keras": Convention(floor=1e-7),  # LogitsDistillation(loss=KLDivergence())
    "paddleslim": Convention(temperature_squared=False, entropy_kept=True),  # soft_label, equal temperatures
    "huggingface": Convention(),  # DistilBERT
    "distill-whisper": Convention(),
}
"""Scaling of soft targets by code base. A weight is only valid with the convention for which it was tuned."""


@loss("kd")
def soft_target(
    student: Any,
    teacher: Any,
    *,
    temperature: float = 1.0,
    standardize: bool = False,
    convention: str = "kirsch",
    mask: Any = None,
) -> Any:
    """Return the KL divergence from the softened teacher to the softened student, times temperature².

    The divergence is summed over classes and averaged over samples, or over the unmasked positions of sequences.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating; no gradient reaches the teacher.
        temperature: > 0; 1 leaves the logits unchanged.
        standardize: scale the logits of each sample to mean 0 and standard deviation 1 before the temperature, so that
            the student need not match the magnitude of the teacher's logits.
        convention: a key of `CONVENTIONS`, to reuse weights that were tuned with another code base.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 if the softened outputs agree. The gradient for the student's logits
        is T (p_student - p_teacher) / N. With a convention that keeps the entropy, the minimum is the
        entropy of the soft targets.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        UnknownNameError: the convention is unknown.
        DataError: the mask is false everywhere.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2 (and why times T²). Common settings: temperature 4,
        weight 0.9, and 0.1 for the labels (CIFAR-100); temperature 1, weights 0.5 and 0.5 (ImageNet). Standardization:
        Sun et al. 2024, arXiv:2403.01427, equation 7 and algorithm 2, with temperature 2 and weight 9.
    """
    check_temperature(temperature)
    check_convention(convention, CONVENTIONS)
    scale = CONVENTIONS[convention]
    check_same_shape(student, teacher)
    log_s, log_t = softened(student, teacher, temperature=temperature, standardize=standardize, mask=mask)
    if scale.floor:
        log_s, log_t = ops.clip(log_s, math.log(scale.floor)), ops.clip(log_t, math.log(scale.floor))
    terms = ops.safe_multiply(ops.exp(log_t), -log_s) if scale.entropy_kept else ops.kl_terms(log_t, log_s)
    divergence = ops.masked_mean(ops.sum(terms, -1), mask)
    if scale.mean_over_classes:
        divergence = divergence / student.shape[-1]
    return divergence * temperature**2 if scale.temperature_squared else divergence


@loss("hard", least_at_teacher=False)
def hard_teacher(student: Any, teacher: Any, *, mask: Any = None) -> Any:
    """Return the cross-entropy of the student's logits with the class that the teacher predicts as the label.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating; no gradient reaches the teacher.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, > 0. It approaches 0 as the student's probability of the teacher's class approaches 1.

    Raises:
        ShapeError: the shapes differ.
        DataError: the mask is false everywhere.

    Source: Touvron et al. 2021, arXiv:2012.12877, equation 3, with weight 0.5, and 0.5 for the labels.
    """
    check_same_shape(student, teacher)
    predicted = ops.argmax(ops.zero_masked(teacher, mask), -1)
    return ops.masked_mean(-ops.take_column(ops.log_softmax(ops.zero_masked(student, mask)), predicted), mask)


@loss("logit-l2", activation="identity")
def squared_logits(
    student: Any, teacher: Any, *, temperature: float = 1.0, convention: str = "kirsch", mask: Any = None
) -> Any:
    """Return the squared difference of the logits, summed over classes, averaged over samples or positions.

    The temperature matters only if the convention omits T², because (z_s / T - z_t / T)² T² does not depend on T.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating, or (N,) for one output per sample;
            no gradient reaches the teacher.
        temperature: > 0.
        convention: "kirsch", or "textbrewer", whose `kd_mse_loss` averages over classes and omits T², so that it is
            K T² times smaller.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0; 0 if the logits agree. Unlike `kd`, the loss changes if a constant is added to all logits.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        UnknownNameError: the convention is unknown.
        DataError: the mask is false everywhere.

    Source: Ba, Caruana 2014, arXiv:1312.6184, equation 1 (with a half); Kim et al. 2021, arXiv:2105.08919, equation 2.
    """
    check_temperature(temperature)
    check_convention(convention, ("kirsch", "textbrewer"))
    check_same_shape(student, teacher)
    difference = ops.zero_masked(student, mask) - ops.zero_masked(teacher, mask)
    distance = ops.masked_mean(ops.sum(difference * difference, -1), mask)
    return distance / (student.shape[-1] * temperature**2) if convention == "textbrewer" else distance


@loss("pixel-kd", takes="pixels")
def pixel_soft_target(student: Any, teacher: Any, *, temperature: float = 1.0, mask: Any = None) -> Any:
    """Return the soft-target loss (`kd`) of pixels: summed over classes, averaged over unmasked pixels, times T².

    Args:
        student, teacher: logits, shape (N, K, H, W), floating; no gradient reaches the teacher.
        temperature: > 0.
        mask: shape (N, H, W), true where a pixel counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 if the softened outputs agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        DataError: the mask is false everywhere.

    Source: Liu et al. 2019, arXiv:1903.04197, equation 1 (temperature 1, weight 10 beside the other terms).
    """
    check_same_shape(student, teacher)
    student, teacher = (ops.moveaxis(logits, 1, -1) for logits in (student, teacher))
    return soft_target(student, teacher, temperature=temperature, mask=mask)


def softened(
    student: Any, teacher: Any, *, temperature: float, standardize: bool = False, mask: Any = None
) -> tuple[Any, Any]:
    """Return the log-softmax of student and teacher at a temperature, with masked logits set to zero."""
    student, teacher = ops.zero_masked(student, mask), ops.zero_masked(teacher, mask)
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    return ops.log_softmax(student / temperature), ops.log_softmax(teacher / temperature)


def standardized(logits: Any) -> Any:
    """Scale logits (..., K) to mean 0 and standard deviation 1 over classes.

    The standard deviation has the denominator K - 1; 1e-7 is added to it.
    """
    centered = logits - ops.mean(logits, -1)[..., None]
    return centered / (ops.standard_deviation(logits) + 1e-7)


def check_temperature(temperature: float) -> None:
    """Raise a UsageError if a temperature is not a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise UsageError(f"The temperature is {temperature}; a number above 0 is needed.")
