"""Losses on the scores of student and teacher, each sample for itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kirsch.distillation.arrays import (
    blank,
    deviation,
    expected,
    log_softmax,
    mean_over,
    namespace,
    pick,
    relative,
    same_shape,
)
from kirsch.distillation.losses.loss import loss
from kirsch.errors import UnknownNameError, UsageError


@dataclass(frozen=True)
class Convention:
    """How a code base scales its soft targets.

    Args:
        temperature_squared: the divergence is multiplied by temperature².
        mean_over_classes: it is averaged over classes, and not summed: K times smaller.
        entropy_kept: it is the cross-entropy to the soft targets: larger by their entropy, of the same gradient.
        floor: probabilities below it are raised to it.
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
    "neural-compressor": Convention(mean_over_classes=True),  # of PyTorch
    "textbrewer": Convention(temperature_squared=False, entropy_kept=True),  # kd_ce_loss
    "trl": Convention(temperature_squared=False),  # generalized_jsd_loss, beta = 0
    "distillkit": Convention(),
    "keras": Convention(floor=1e-7),  # LogitsDistillation(loss=KLDivergence())
    "paddleslim": Convention(temperature_squared=False, entropy_kept=True),  # soft_label, both of one temperature
    "huggingface": Convention(),  # DistilBERT
    "distill-whisper": Convention(),
}
"""Code base → how it scales the soft targets. A weight fits the convention with which it was found."""


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
    """Kullback-Leibler divergence from the softened teacher to the softened student, times temperature².

    Summed over classes, averaged over samples, or over the positions of sequences that count.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating; the teacher takes no gradient.
        temperature: > 0; 1 leaves the scores as they are.
        standardize: scores of each sample, of both, get mean 0 and standard deviation 1 before they are softened, so
            that the student need not match their size.
        convention: a key of `CONVENTIONS`, to take over weights that were found with another code base.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 when the softened outputs agree. Its gradient for the student's scores
        is T (p_student - p_teacher) / N. Where a convention keeps the entropy, the least value is that entropy.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        UnknownNameError: there is no such convention.
        DataError: the mask is false everywhere.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2 (and why times T²). Usual are temperature 4 with
        weights 0.9 and 0.1 of the labels for CIFAR-100, temperature 1 with 0.5 and 0.5 for ImageNet. Standardized
        after Sun et al. 2024, arXiv:2403.01427, equation 7 and algorithm 2, usual with temperature 2 and weight 9.
    """
    check_temperature(temperature)
    check_convention(convention, CONVENTIONS)
    scale = CONVENTIONS[convention]
    xp = namespace(student)
    same_shape(student, teacher)
    log_s, log_t = softened(student, teacher, temperature=temperature, standardize=standardize, mask=mask)
    if scale.floor:
        log_s, log_t = log_s.clip(min=math.log(scale.floor)), log_t.clip(min=math.log(scale.floor))
    charges = expected(xp.exp(log_t), -log_s) if scale.entropy_kept else relative(log_t, log_s)
    charge = mean_over(charges.sum(-1), mask)
    if scale.mean_over_classes:
        charge = charge / student.shape[-1]
    return charge * temperature**2 if scale.temperature_squared else charge


@loss("hard", least_at_teacher=False)
def hard_teacher(student: Any, teacher: Any, *, mask: Any = None) -> Any:
    """Cross-entropy of the student's scores to the class that the teacher holds for the likeliest.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating; the teacher takes no gradient.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, > 0; it nears 0 where the student is sure of the teacher's choice, surer than the teacher.

    Raises:
        ShapeError: the shapes differ.
        DataError: the mask is false everywhere.

    Source: Touvron et al. 2021, arXiv:2012.12877, equation 3, with weights 0.5 for this and 0.5 for the labels.
    """
    same_shape(student, teacher)
    choice = blank(teacher, mask).argmax(-1)
    return mean_over(-pick(log_softmax(blank(student, mask)), choice), mask)


@loss("logit-l2", activation="identity")
def squared_logits(
    student: Any, teacher: Any, *, temperature: float = 1.0, convention: str = "kirsch", mask: Any = None
) -> Any:
    """Squared distance of the scores, summed over classes, averaged over samples or positions.

    A temperature moves it only where the convention leaves out T²: (z_s / T - z_t / T)² T² is the same for each T.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating, or (N,) of one score a sample; the teacher takes
            no gradient.
        temperature: > 0.
        convention: "textbrewer", its `kd_mse_loss`, is a mean over classes without T²: K T² times smaller.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0; 0 when the scores agree, which fixes their sum too, that no softmax sees.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        UnknownNameError: there is no such convention.
        DataError: the mask is false everywhere.

    Source: Ba, Caruana 2014, arXiv:1312.6184, equation 1 (with a half); Kim et al. 2021, arXiv:2105.08919, equation 2.
    """
    check_temperature(temperature)
    check_convention(convention, ("kirsch", "textbrewer"))
    same_shape(student, teacher)
    apart = blank(student, mask) - blank(teacher, mask)
    charge = mean_over((apart * apart).sum(-1), mask)
    return charge / (student.shape[-1] * temperature**2) if convention == "textbrewer" else charge


@loss("pixel-kd", takes="pixels")
def pixel_soft_target(student: Any, teacher: Any, *, temperature: float = 1.0, mask: Any = None) -> Any:
    """Soft targets (`kd`) of every pixel: summed over classes, averaged over the pixels that count, times temperature².

    Args:
        student, teacher: scores, shape (N, K, H, W), floating; the teacher takes no gradient.
        temperature: > 0.
        mask: shape (N, H, W), true where a pixel counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 when the softened outputs agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        DataError: the mask is false everywhere.

    Source: Liu et al. 2019, arXiv:1903.04197, equation 1 (temperature 1, weight 10 beside their other terms).
    """
    xp = namespace(student)
    same_shape(student, teacher)
    student, teacher = (xp.moveaxis(scores, 1, -1) for scores in (student, teacher))
    return soft_target(student, teacher, temperature=temperature, mask=mask)


def softened(
    student: Any, teacher: Any, *, temperature: float, standardize: bool = False, mask: Any = None
) -> tuple[Any, Any]:
    """Logarithms of both softmaxes at a temperature, with zeros for the scores under the mask."""
    student, teacher = blank(student, mask), blank(teacher, mask)
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    return log_softmax(student / temperature), log_softmax(teacher / temperature)


def standardized(scores: Any) -> Any:
    """Scores (..., K) with mean 0 and standard deviation 1, divided by K - 1, over classes; 1e-7 is added to it."""
    centered = scores - scores.mean(-1)[..., None]
    return centered / (deviation(scores) + 1e-7)


def check_temperature(temperature: float) -> None:
    """Raise a UsageError if a temperature is not a number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise UsageError(f"The temperature is {temperature}; a number above 0 is needed.")


def check_convention(name: str, known: Any) -> None:
    """Raise an UnknownNameError if a convention is not among the known."""
    if name not in known:
        raise UnknownNameError("convention", name, known)
