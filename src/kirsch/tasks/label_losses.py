"""Losses of the student on the labels of the data, without a teacher."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kirsch import ops
from kirsch.errors import DataError, ShapeError, UsageError
from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

IGNORED = -100
"""Label of samples and positions that are left out of the loss."""


class LabelLoss(Protocol):
    """A registered loss on labels."""

    def __call__(
        self,
        student: Any,
        targets: Any,
        *,
        mask: Any = None,
        label_smoothing: float = 0.0,
        axis: int | None = None,
    ) -> Any:
        """Return a scalar, smallest where the student predicts the targets.

        `axis` is the class axis of pixels: 1 for (N, K, H, W), -1 for (N, H, W, K). None: the convention of the library
        of the arrays; 1 for numpy and PyTorch.
        """


LABEL_LOSSES: Registry[LabelLoss] = Registry("label loss")


def _label_loss(name: str) -> Callable[[Callable[..., Any]], LabelLoss]:
    """Decorate a function to register it as a label loss.

    The function runs without autocast. It receives arrays of at least 32 bits with the classes on the last axis.
    """

    def register(formula: Callable[..., Any]) -> LabelLoss:
        @functools.wraps(formula)
        def compute(
            student: Any,
            targets: Any,
            *,
            mask: Any = None,
            label_smoothing: float = 0.0,
            axis: int | None = None,
        ) -> Any:
            _check_smoothing(label_smoothing)
            student, targets = ops.upcast(student), ops.upcast(targets)
            if len(targets.shape) == len(student.shape):
                targets = ops.classes_last(targets, axis)
            student = ops.classes_last(student, axis)
            with ops.without_autocast(student):
                return formula(student, targets, mask=mask, label_smoothing=label_smoothing)

        return LABEL_LOSSES.register(name)(compute)

    return register


@_label_loss("cross-entropy")
def hard_label(student: Any, targets: Any, *, mask: Any = None, label_smoothing: float = 0.0) -> Any:
    """Return the cross-entropy of the student's logits with the labels, averaged over samples or positions.

    Args:
        student: logits, shape (N, K), (N, L, K), or (N, K, H, W) for pixels, floating.
        targets: class numbers, shape (N,), (N, L) or (N, H, W), 0 <= target < K; those equal to -100 do not count.
        mask: same shape as the targets, true where a position counts; None counts all.
        label_smoothing: fraction of each label that is spread evenly over all K classes; 0 <= fraction < 1.

    Returns:
        Scalar in nats, >= 0.

    Raises:
        ShapeError: the number of labels differs from the number of samples or positions.
        UsageError: `label_smoothing` is out of range.
        DataError: all labels are masked, or a label is out of range.

    Source: smoothing after Szegedy et al. 2016, arXiv:1512.00567, section 7. Off by default, because a
        teacher softens the labels better than a constant does (Müller et al. 2019, arXiv:1906.02629).
    """
    targets, mask = check_labels(student, targets, mask)
    log_p = ops.log_softmax(ops.zero_masked(student, mask))
    losses = -ops.take_column(log_p, targets)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * ops.mean(log_p, -1)
    return ops.masked_mean(losses, mask)


@_label_loss("binary")
def binary_label(student: Any, targets: Any, *, mask: Any = None, label_smoothing: float = 0.0) -> Any:
    """Return the binary cross-entropy of each class, summed over classes, averaged over samples or positions.

    `F.binary_cross_entropy_with_logits` averages over classes, so its value is smaller by the number of classes.

    Args:
        student: logits, shape (N, K), (N, L, K), or (N, K, H, W) for pixels, floating, of classes that do not
            exclude each other; or (N,) or (N, 1) for a single binary output.
        targets: 0 to 1, same shape as the logits, or (N,) for logits (N, 1), (N, H, W) for (N, 1, H, W); those equal
            to -100 do not count.
        mask: shape (N,), (N, L) or (N, H, W), true where a sample or position counts; None counts all.
        label_smoothing: fraction of each target that is replaced by 1/2; 0 <= fraction < 1.

    Returns:
        Scalar in nats, >= 0. A sample counts if any of its targets counts.

    Raises:
        ShapeError: the targets have another shape.
        UsageError: `label_smoothing` is out of range.
        DataError: all targets are masked, or an unmasked target is not from 0 to 1.

    Source: Bishop 2006, Pattern Recognition and Machine Learning, equation 4.90.
    """
    student, targets = _align_targets(student, targets)
    known = targets != IGNORED
    if mask is not None:
        known = known & ops.expand_mask(mask, known)
    _check_domain(known & ~((targets >= 0) & (targets <= 1)), targets, '"binary" takes targets from 0 to 1')
    logits = ops.where(known, student, ops.zeros_like(student))
    truth = ops.where(known, targets, ops.zeros_like(targets)) * (1 - label_smoothing) + label_smoothing / 2
    losses = -(truth * ops.log_sigmoid(logits) + (1 - truth) * ops.log_sigmoid(-logits))
    losses = ops.sum(ops.where(known, losses, ops.zeros_like(losses)), -1)
    return ops.masked_mean(losses, ops.any(known, -1))


@_label_loss("squared-error")
def squared_error(student: Any, targets: Any, *, mask: Any = None, label_smoothing: float = 0.0) -> Any:
    """Return the squared error of a regression, summed over outputs, averaged over samples.

    Args:
        student: outputs, shape (N, D), (N, L, D), (N, D, H, W) for pixels, or (N,), floating.
        targets: finite values, same shape, or (N,) for (N, 1). -100 is a valid target here; use the mask for samples
            without a target.
        mask: shape (N,), (N, L) or (N, H, W), true where a sample or position counts; None counts all.
        label_smoothing: 0; smoothing is only defined for classes.

    Returns:
        Scalar, >= 0, in the unit of the targets squared; 0 if the outputs equal the targets.

    Raises:
        ShapeError: the targets have another shape.
        UsageError: `label_smoothing` is not 0.
        DataError: all targets are masked, or an unmasked target is NaN or infinite.
    """
    if label_smoothing:
        raise UsageError(
            f'`label_smoothing` is {label_smoothing} with the label loss "squared-error".',
            "Label smoothing is only defined for classes.",
            fix="Set it to 0.",
        )
    student, targets = _align_targets(student, targets)
    targets = ops.zero_masked(targets, mask)
    _check_domain(~ops.isfinite(targets), targets, '"squared-error" takes finite numbers')
    difference = ops.zero_masked(student, mask) - targets
    return ops.masked_mean(ops.sum(difference * difference, -1), mask)


def _fix_of_one_hot(student: Any, labels: Any) -> str:
    """Return the fix for labels that may be one-hot, with the shape of the logits; empty for others."""
    return "If they are one-hot, give labels.argmax(-1)." if tuple(labels.shape) == tuple(student.shape) else ""


def check_labels(student: Any, labels: Any, mask: Any = None) -> tuple[Any, Any]:
    """Check class numbers. Return them with 0 in place of masked labels, and the mask; None if all are known to count.

    Args:
        student: logits, shape (N, K) or (N, L, K).
        labels: class numbers, shape (N,) or (N, L); those equal to -100 do not count.
        mask: same shape as the labels; None counts all.

    Raises:
        ShapeError: the number of labels differs from the number of samples or positions.
        DataError: the labels are not integers, or an unmasked label is out of range.
    """
    if "int" not in ops.dtype(labels):  # PyTorch would silently truncate fractions
        raise DataError(
            f"The labels have type {ops.dtype(labels)}.",
            "Class numbers must be integers.",
            _fix_of_one_hot(student, labels)
            or "Convert class numbers to int64; for probabilities or real numbers choose another label loss.",
        )
    if tuple(labels.shape) != tuple(student.shape[:-1]):
        raise ShapeError(
            f"The labels have shape {tuple(labels.shape)}; the logits have shape {tuple(student.shape)}.",
            f"Labels of shape {tuple(student.shape[:-1])} are needed: one class number for each sample or position.",
            _fix_of_one_hot(student, labels),
        )
    if mask is None and ops.is_known_to_hold((labels >= 0) & (labels < student.shape[-1])):
        return labels, None
    known = labels != IGNORED
    mask = known if mask is None else known & ops.expand_mask(mask, known)
    labels = ops.zero_masked(labels, mask)
    wrong = (labels < 0) | (labels >= student.shape[-1])  # numpy would take -1 as the last class

    def out_of_range() -> DataError:
        sample, label = _first_wrong(wrong, labels)
        return DataError(
            f"Sample {sample} has the label {int(label)}.",
            f"The model has {student.shape[-1]} classes, so labels must be from 0 to {student.shape[-1] - 1}.",
            f"Fix the labels, or use a model with more classes. Use {IGNORED} for samples without a label.",
        )

    ops.raise_if(wrong, out_of_range)
    return labels, mask


def _first_wrong(wrong: Any, values: Any) -> tuple[int, float]:
    """Return the number of the first sample with a wrong value, and the value."""
    index = tuple(np.argwhere(ops.convert_to_numpy(wrong))[0])
    return int(index[0]), float(ops.convert_to_numpy(values)[index])


def _align_targets(student: Any, targets: Any) -> tuple[Any, Any]:
    """Return outputs and targets with equal shapes and types, and with the classes on the last axis."""
    if len(student.shape) == 1:
        student = student[:, None]
    if tuple(targets.shape) == tuple(student.shape[:-1]) and student.shape[-1] == 1:
        targets = targets[..., None]  # (N, 1) - (N,) would broadcast to (N, N)
    if tuple(targets.shape) != tuple(student.shape):
        raise ShapeError(
            f"The targets have shape {tuple(targets.shape)}; the student's output has shape {tuple(student.shape)}.",
            "One target for each output is needed.",
        )
    return student, ops.cast_like(targets, student)


def _check_domain(wrong: Any, targets: Any, domain: str) -> None:
    """Raise a DataError if a target is outside the domain of its loss."""

    def outside() -> DataError:
        sample, target = _first_wrong(wrong, targets)
        return DataError(f"Sample {sample} has the target {target:g}.", f"The label loss {domain}.", "Fix the data.")

    ops.raise_if(wrong, outside)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise UsageError(f"`label_smoothing` is {label_smoothing}; a number of at least 0 and below 1 is needed.")
