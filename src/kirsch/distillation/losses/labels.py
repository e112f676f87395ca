"""What a student is charged for against the labels of the data, without a teacher."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

from kirsch.distillation.arrays import (
    blank,
    classes_last,
    full_precision,
    log_sigmoid,
    log_softmax,
    mean_over,
    namespace,
    pick,
    spread,
    typed,
    wide,
)
from kirsch.errors import DataError, ShapeError, UsageError
from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

IGNORED = -100
"""A label that does not count."""


class LabelLoss(Protocol):
    """What the student puts out, and what the data says: a scalar."""

    def __call__(self, student: Any, targets: Any, *, mask: Any = None, label_smoothing: float = 0.0) -> Any:
        """A scalar, smallest when the student says what the data says."""


LABEL_LOSSES: Registry[LabelLoss] = Registry("label-loss")


def _label_loss(name: str) -> Callable[[LabelLoss], LabelLoss]:
    """Decorator that names a formula, which then sees at least 32 bits and computes without autocast."""

    def put(formula: LabelLoss) -> LabelLoss:
        @functools.wraps(formula)
        def charged(student: Any, targets: Any, *, mask: Any = None, label_smoothing: float = 0.0) -> Any:
            _check_share(label_smoothing)
            student, targets = wide(student), wide(targets)
            with full_precision(student):
                return formula(student, targets, mask=mask, label_smoothing=label_smoothing)

        return LABEL_LOSSES.register(name)(charged)

    return put


@_label_loss("cross-entropy")
def hard_label(student: Any, targets: Any, *, mask: Any = None, label_smoothing: float = 0.0) -> Any:
    """Cross-entropy of the student's scores against the labels, averaged over samples or positions.

    Args:
        student: scores, shape (N, K), (N, L, K), or of pixels (N, K, H, W), floating.
        targets: class numbers, shape (N,), (N, L) or (N, H, W), 0 <= target < K; those equal to -100 do not count.
        mask: of the shape of the targets, true where a position counts; None counts all.
        label_smoothing: this share of each label is spread evenly over all K classes; 0 <= share < 1.

    Returns:
        Scalar in nats, >= 0.

    Raises:
        ShapeError: there is not one label a sample or position.
        UsageError: the share is none.
        DataError: nothing counts, or a label is out of range.

    Source: smoothing after Szegedy et al. 2016, arXiv:1512.00567, section 7. Off by default: a teacher that is matched
        softens the labels better than a constant does (Müller et al. 2019, arXiv:1906.02629).
    """
    student = classes_last(student)
    targets, mask = counted(student, targets, mask)
    log_p = log_softmax(blank(student, mask))
    charge = -pick(log_p, targets)
    if label_smoothing:
        charge = (1 - label_smoothing) * charge - label_smoothing * log_p.mean(-1)
    return mean_over(charge, mask)


@_label_loss("binary")
def binary_label(student: Any, targets: Any, *, mask: Any = None, label_smoothing: float = 0.0) -> Any:
    """Cross-entropy of a yes or no for each class, summed over classes, averaged over samples or positions.

    A mean over classes, as `F.binary_cross_entropy_with_logits` takes it, is smaller by the number of classes.

    Args:
        student: scores, shape (N, K), (N, L, K), or of pixels (N, K, H, W), floating, of classes that may hold
            together; or (N,) or (N, 1) of a single question.
        targets: 0 to 1, of the shape of the scores, or (N,) for scores (N, 1), (N, H, W) for (N, 1, H, W); those equal
            to -100 do not count.
        mask: shape (N,), (N, L) or (N, H, W), true where a sample or position counts; None counts all.
        label_smoothing: this share of each target becomes 1/2; 0 <= share < 1.

    Returns:
        Scalar in nats, >= 0. A sample counts if one of its targets does.

    Raises:
        ShapeError: there is not one target a score.
        UsageError: the share is none.
        DataError: nothing counts, or a target that counts is not from 0 to 1.

    Source: Bishop 2006, Pattern Recognition and Machine Learning, equation 4.90.
    """
    xp = namespace(student)
    student, targets = _paired(student, targets)
    known = targets != IGNORED
    if mask is not None:
        known = known & spread(mask, known)
    _require(known & ~((targets >= 0) & (targets <= 1)), targets, '"binary" takes targets from 0 (no) to 1 (yes)')
    scores = xp.where(known, student, xp.zeros_like(student))
    truth = xp.where(known, targets, xp.zeros_like(targets)) * (1 - label_smoothing) + label_smoothing / 2
    charge = -(truth * log_sigmoid(scores) + (1 - truth) * log_sigmoid(-scores))
    charge = xp.where(known, charge, xp.zeros_like(charge)).sum(-1)
    return mean_over(charge, known.any(-1))


@_label_loss("squared-error")
def squared_error(student: Any, targets: Any, *, mask: Any = None, label_smoothing: float = 0.0) -> Any:
    """Squared distance of the student's numbers from the true ones, summed over numbers, averaged over samples.

    Args:
        student: numbers, shape (N, D), (N, L, D), of pixels (N, D, H, W), or (N,), floating.
        targets: finite numbers of the same shape, or (N,) for (N, 1). -100 is a number like any other; samples without
            a target are left out by the mask.
        mask: shape (N,), (N, L) or (N, H, W), true where a sample or position counts; None counts all.
        label_smoothing: 0, since numbers are no classes.

    Returns:
        Scalar, >= 0, in the unit of the targets squared; 0 when the student is right.

    Raises:
        ShapeError: there is not one target a number.
        UsageError: label smoothing is asked for.
        DataError: nothing counts, or a target that counts is NaN or infinity.
    """
    if label_smoothing:
        raise UsageError(
            f"label_smoothing is {label_smoothing} beside a squared error.",
            "Numbers are no classes that a label could be spread over.",
            "Leave it at 0.",
        )
    student, targets = _paired(student, targets)
    targets = blank(targets, mask)
    _require(~namespace(targets).isfinite(targets), targets, '"squared-error" takes finite numbers')
    apart = blank(student, mask) - targets
    return mean_over((apart * apart).sum(-1), mask)


def shifted(scores: Any, labels: Any) -> tuple[Any, Any]:
    """The scores and the labels that belong together where each position predicts the next one.

    Args:
        scores: shape (N, L, K), of position i for the token at i + 1.
        labels: shape (N, L), the token at each position, or a mask of the tokens that count.

    Returns:
        Scores of all positions but the last, (N, L - 1, K); labels of all but the first, (N, L - 1).

    Raises:
        ShapeError: there is not one label a position, or one position alone.
    """
    if tuple(labels.shape) != tuple(scores.shape[:2]) or scores.shape[1] == 1:
        raise ShapeError(
            f"The scores have shape {tuple(scores.shape)}, the labels {tuple(labels.shape)}.",
            "To predict the next token, (N, L, K) and (N, L) with L of at least 2 are needed.",
        )
    return scores[:, :-1], labels[:, 1:]


def counted(student: Any, labels: Any, mask: Any = None) -> tuple[Any, Any]:
    """Class numbers with 0 for those that do not count, and the mask of those that do; None where all do.

    Args:
        student: scores, shape (N, K) or (N, L, K).
        labels: class numbers, shape (N,) or (N, L); those equal to -100 do not count.
        mask: of the shape of the labels; None counts all.

    Raises:
        ShapeError: there is not one label a sample or position.
        DataError: the labels are not whole numbers, or one that counts is no class of the scores.
    """
    if "int" not in str(labels.dtype):  # PyTorch would cut off the fractions, and nobody would see it
        raise DataError(
            f"The labels have type {str(labels.dtype).removeprefix('torch.')}.",
            "They must be class numbers, which are whole.",
            "Give them as int64 if they are; for shares of classes or numbers take another label loss.",
        )
    if tuple(labels.shape) != tuple(student.shape[:-1]):
        raise ShapeError(
            f"The labels have shape {tuple(labels.shape)}; the scores have shape {tuple(student.shape)}.",
            f"One class number for each of {tuple(student.shape[:-1])} is needed.",
        )
    if int(labels.min()) < 0:
        known = labels != IGNORED
        mask = known if mask is None else known & spread(mask, known)
    labels = blank(labels, mask)
    wrong = (labels < 0) | (labels >= student.shape[-1])
    if bool(wrong.any()):  # numpy would count -1 from the end, and a class beyond the last would be no class at all
        raise DataError(
            f"Sample {int(namespace(wrong).argwhere(wrong)[0][0])} has the label {int(labels[wrong][0])}.",
            f"The model puts out {student.shape[-1]} classes, so labels go from 0 to {student.shape[-1] - 1}.",
            f"Repair the labels, or give the model a larger head; {IGNORED} says that a label does not count.",
        )
    return labels, mask


def _paired(student: Any, targets: Any) -> tuple[Any, Any]:
    """Scores and targets of one shape with classes on the last axis, and of the type of the scores."""
    if student.ndim == 1:
        student = student[:, None]
    if student.ndim >= len("NKHW"):
        targets = classes_last(targets) if targets.ndim == student.ndim else targets
        student = classes_last(student)
    if tuple(targets.shape) == tuple(student.shape[:-1]) and student.shape[-1] == 1:
        targets = targets[..., None]  # (N, 1) - (N,) would be every sample against every other
    if tuple(targets.shape) != tuple(student.shape):
        raise ShapeError(
            f"The targets have shape {tuple(targets.shape)}; the student's output has shape {tuple(student.shape)}.",
            "One target for each number is needed.",
        )
    return student, typed(targets, student)


def _require(wrong: Any, targets: Any, what: str) -> None:
    """Raise a DataError if there is a target outside the domain of its loss."""
    if bool(wrong.any()):
        place = int(namespace(wrong).argwhere(wrong)[0][0])
        raise DataError(
            f"Sample {place} has the target {float(targets[wrong][0]):g}.",
            f"The label loss {what}.",
            "Repair the data.",
        )


def _check_share(label_smoothing: float) -> None:
    """Raise a UsageError if a share of smoothing is none."""
    if not 0 <= label_smoothing < 1:
        raise UsageError(f"label_smoothing is {label_smoothing}; a share of at least 0, below 1, is needed.")
