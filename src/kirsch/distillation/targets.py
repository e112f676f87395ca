"""Checks of targets against the label loss; errors suggest a fix based on the values and shape of the targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.data.arrays import host, is_on_accelerator
from kirsch.data.structure import summary
from kirsch.distillation.losses.labels import IGNORED
from kirsch.distillation.losses.loss import OUTPUT_KINDS, get_loss, step_arguments
from kirsch.distillation.term import end_values
from kirsch.errors import DataError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.distillation.objective import Objective

SUM_TOLERANCE = 1e-4
"""Largest difference from 1 of the sum of a row of probabilities."""

KHW = 3
"""Number of axes of one sample's logits for dense prediction: classes, height, width."""

MASK_LEVEL = 255
"""Value of foreground pixels in masks that are stored as images; in other data sets, of pixels without a label."""


def uses_labels(objective: Objective) -> bool:
    """Return whether the objective uses the values of the targets."""
    terms = [term for term in objective.terms if any(end_values(term.weight))]
    return any(end_values(objective.label_weight)) or any("labels" in step_arguments(get_loss(t.loss)) for t in terms)


def _uses_targets(objective: Objective, targets: NDArray[Any]) -> bool:
    """Return whether the objective uses the values of the targets, or the mask of positions without a label."""
    masks_positions = objective.label_loss == "cross-entropy" and targets.ndim > 1 and targets.dtype.kind in "iu"
    return uses_labels(objective) or (
        masks_positions and any(get_loss(term.loss).takes in OUTPUT_KINDS for term in objective.terms)
    )


def check_labels(labels: Any, shape: tuple[int, ...] | None, objective: Objective) -> None:
    """Refuse targets that the label loss does not take.

    Args:
        labels: all targets, or those of the first batch; None if there are none.
        shape: shape of the logits of one sample; None leaves the targets unchecked.
        objective: supplies the label loss and the terms.

    Raises:
        DataError: the targets have another type or shape or are out of range, or there is nothing to learn from.
        UsageError: the objective is causal, and the logits have no axis of positions.
    """
    if shape is None:
        return
    if objective.causal and len(shape) == 1:
        raise UsageError(
            f"The objective is causal, and the student returns logits of shape {shape} per sample.",
            "A causal objective compares the logits of each position with the next token.",
            "Leave causal out, or give a model of sequences.",
        )
    if labels is None:
        if not objective.terms:
            raise DataError("The data has no targets, and there is no teacher.", fix="Give (inputs, targets).")
        return
    targets = host(labels)
    if not targets.ndim:
        raise DataError(f"The targets are {labels!r}, a single value.", fix="Give one target for each sample.")
    if not _uses_targets(objective, targets):
        return
    _check_values(targets, shape, objective)
    if objective.label_loss != "cross-entropy":
        return
    without_labels = [term for term in objective.terms if "labels" not in step_arguments(get_loss(term.loss))]
    if not without_labels and not _is_labeled(targets, objective.ignore_index).any():
        raise DataError(
            f"All targets are masked: the label of all {len(targets)} samples is {objective.ignore_index}.",
            "Each term of the objective needs labels, so there is nothing to learn from.",
            "Check the mask and the labels of the data.",
        )


def check_batch(labels: Any, shape: tuple[int, ...], objective: Objective, *, on_any_device: bool = False) -> bool:
    """Refuse targets of one batch that the label loss does not take; batches may have different numbers of positions.

    Args:
        labels: targets of the batch, or None.
        shape: shape of the logits of one sample.
        objective: supplies the label loss and the terms.
        on_any_device: also check targets on an accelerator, which synchronizes with it.

    Returns:
        Whether the targets were checked. False if they are on an accelerator and `on_any_device` is False.

    Raises:
        DataError: see `check_labels`.
    """
    if labels is None:
        return True
    if is_on_accelerator(labels) and not on_any_device:
        return False
    if _uses_targets(objective, targets := host(labels)):
        check_evaluable(targets, shape, objective)
    return True


def check_evaluable(targets: NDArray[Any], shape: tuple[int, ...], objective: Objective) -> None:
    """Refuse targets that the label loss cannot compare with the outputs of a model.

    Raises:
        DataError: see `check_labels`.
    """
    sizes, dense = targets.shape[1:], len(shape) >= KHW
    if len(sizes) == len(shape) - 1:
        shape = (shape[0], *sizes) if dense else (*sizes, *shape[-1:])
    elif len(sizes) == len(shape) > 1:
        shape = (shape[0], *sizes[1:]) if dense else (*sizes[:-1], shape[-1])
    _check_values(targets, shape, objective)


def _check_values(targets: NDArray[Any], shape: tuple[int, ...], objective: Objective) -> None:
    if objective.label_loss == "cross-entropy":
        _check_classes(targets, shape, objective)
    elif objective.label_loss == "binary":
        _check_binary(targets, shape)
    elif objective.label_loss == "squared-error":
        _check_regression(targets, shape)


# ------------------------------------------------------------------------------------------------ cross-entropy


def _check_classes(targets: NDArray[Any], shape: tuple[int, ...], objective: Objective) -> None:
    positions, classes = positions_and_classes(shape)
    if classes == 1 and targets.dtype.kind in "biuf":
        raise _single_class_error(targets, shape)
    if targets.shape[1:] != positions or not np.issubdtype(targets.dtype, np.integer):
        raise not_class_numbers(targets, shape)
    largest = np.iinfo(targets.dtype).max
    if classes > largest + 1:
        raise DataError(
            f"The targets have the type {targets.dtype}, which holds numbers up to {largest}; the model returns "
            f"{classes} classes.",
            "Larger class numbers have overflowed in that type.",
            "Read the targets as int64.",
        )
    wrong = ((targets < 0) | (targets >= classes)) & _is_labeled(targets, objective.ignore_index)
    if wrong.any():
        raise out_of_range(targets, wrong, classes, objective.ignore_index)


def _single_class_error(targets: NDArray[Any], shape: tuple[int, ...]) -> DataError:
    """Return the error for a model with one logit, whose softmax is constant."""
    values = set(np.unique(targets).tolist()) if targets.dtype.kind != "f" or np.isfinite(targets).all() else {None}
    binary = f'take label_loss="binary", and {_binary_term(shape)} if there is a teacher'
    fix = _regression_fix(targets, shape)
    if not _fits(targets, shape):
        fix = _reshape_fix(targets, shape)
    elif values <= {0, 1}:
        fix = f"For binary labels {binary}."
    elif values <= {-1, 1}:
        fix = f"For binary labels give (targets + 1) / 2, and {binary}."
    elif values <= {0, MASK_LEVEL}:
        fix = f"For binary labels give targets / {MASK_LEVEL}, and {binary}."
    return DataError(
        f"The model returns one logit for each {'sample' if len(shape) < 2 else 'position'}: shape {shape} per sample; "  # noqa: PLR2004 - (1,) or none
        f"the targets have shape {targets.shape} and type {targets.dtype}{_range(targets)}.",
        'The label loss "cross-entropy" applies a softmax over classes, which is always 1 for a single class.',
        fix,
    )


def _binary_term(shape: tuple[int, ...]) -> str:
    """Return the term to suggest for binary labels."""
    return 'Term("fitnet", student_layer="logits")' if len(shape) >= KHW else 'the term "binary-kd"'


def _fits(targets: NDArray[Any], shape: tuple[int, ...]) -> bool:
    """Return whether there is one target for each logit; the axis of a single class may be missing."""
    positions, classes = positions_and_classes(shape)
    return targets.shape[1:] == shape or (classes == 1 and targets.shape[1:] == positions)


def positions_and_classes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return the shape of the labels of one sample, and the number of classes.

    Args:
        shape: shape of the logits of one sample: (K,), (L, K) or (K, H, W).
    """
    return (shape[1:], shape[0]) if len(shape) >= KHW else (shape[:-1], shape[-1] if shape else 1)


def _is_labeled(targets: NDArray[Any], ignore_index: int) -> NDArray[np.bool_]:
    """Return True where a target is not the ignored label, compared as 64-bit integers."""
    labeled: NDArray[np.bool_] = targets.astype(np.int64) != ignore_index
    return labeled


def _first_sample(wrong: NDArray[np.bool_]) -> int:
    """Return the index of the first sample for which any element is true."""
    return int(wrong.reshape(len(wrong), -1).any(axis=1).argmax())


def out_of_range(targets: NDArray[Any], wrong: NDArray[np.bool_], classes: int, ignore_index: int) -> DataError:
    """Return the error for targets that are not class numbers of the model; `wrong` is True for these targets."""
    values, wrong_values = (set(np.unique(array).tolist()) for array in (targets, targets[wrong]))
    fix = f"Correct the labels, or give the model a larger head; {ignore_index} stands for no label."
    if values <= {0, MASK_LEVEL} and classes == len((0, MASK_LEVEL)):
        fix = f"These look like masks of 0 and {MASK_LEVEL}: give (targets == {MASK_LEVEL}) as integers."
    elif values == {-1, 1} and classes == len((-1, 1)):
        fix = "The targets are -1 and 1: give (targets + 1) // 2."
    elif wrong_values == {MASK_LEVEL} and ignore_index != MASK_LEVEL:
        fix = f"If {MASK_LEVEL} marks pixels without a label, give the objective ignore_index={MASK_LEVEL}."
    elif wrong_values == {classes} and targets.min() == 1:
        fix = f"The labels go from 1 to {classes}: give targets - 1."
    elif targets.dtype == np.int8 and targets.min() < 0:
        fix = "int8 holds numbers up to 127: if there are larger labels, read the targets as int64."
    return DataError(
        f"Sample {_first_sample(wrong)} has the label {int(targets[wrong][0])}.",
        f"The model returns {classes} classes, so labels go from 0 to {classes - 1}.",
        fix,
    )


def not_class_numbers(targets: NDArray[Any], shape: tuple[int, ...]) -> DataError:
    """Return the error for targets that are not class numbers, for the label loss "cross-entropy"."""
    positions, _ = positions_and_classes(shape)
    item = "position" if positions else "sample"
    expected = f"(N, {', '.join(map(str, positions))})" if positions else "(N,)"
    return DataError(
        f"The targets have shape {targets.shape} and type {targets.dtype}{_range(targets)}.",
        f'The label loss "cross-entropy" takes class numbers: one integer per {item}, shape {expected}, '
        f"because the model returns logits of shape {shape} per sample.",
        _class_number_fix(targets, shape),
    )


def _class_number_fix(targets: NDArray[Any], shape: tuple[int, ...]) -> str:  # noqa: PLR0911 - one per pattern
    """Return the fix for targets that are not class numbers, from their values and shape."""
    positions, _ = positions_and_classes(shape)
    if targets.dtype.kind not in "biuf":
        return "Convert class names to class numbers."
    finite = targets[np.isfinite(targets)] if targets.dtype.kind == "f" else targets
    integral = bool(finite.size == targets.size and (finite == np.round(finite)).all())
    binary = bool(integral and np.isin(finite, (0, 1)).all())
    if targets.shape[1:] == positions:
        return _type_fix(targets, shape, integral=integral)
    if targets.shape[1:] == shape or _classes_are_last(targets, shape):
        axis = 1 if targets.shape[1:] == shape and len(shape) >= KHW else -1
        return _class_axis_fix(targets, shape, axis, binary=binary)
    if (integral and positions) or _has_single_pixel(shape):
        return _positions_fix(targets, shape)
    if targets.ndim == len("ND") and not positions and (targets.shape[1] == 1 or binary):
        return _columns_fix(targets, shape, integral=integral)
    if integral:
        return "Give one class number for each position of the logits, or a model with logits of that shape."
    return _regression_fix(targets, shape)


def _classes_are_last(targets: NDArray[Any], shape: tuple[int, ...]) -> bool:
    """Return whether targets of pixels have their classes on the last axis, as in TensorFlow."""
    positions, classes = positions_and_classes(shape)
    return len(shape) >= KHW and targets.shape[1:] == (*positions, classes)


def _has_single_pixel(shape: tuple[int, ...]) -> bool:
    """Return whether logits of pixels have a single pixel, such as (K, 1, 1)."""
    return len(shape) >= KHW and set(positions_and_classes(shape)[0]) == {1}


def _reshape_fix(targets: NDArray[Any], shape: tuple[int, ...]) -> str:
    """Return the fix for targets whose shape is not that of the logits."""
    positions, classes = positions_and_classes(shape)
    if _classes_are_last(targets, shape):
        return f"Move the classes to axis 1: {_TO_AXIS_1}."
    one_each = targets.shape[1:] == positions or (not positions and targets.shape[1:] == (1,))
    if one_each and classes > 1:
        if not (targets.dtype.kind == "f" and (targets != np.round(targets)).any()):
            kd = "pixel-kd" if len(shape) >= KHW else "kd"
            return f'For class numbers take label_loss="cross-entropy" and the term "{kd}".'
    elif positions:
        return _positions_fix(targets, shape)
    return f"Give one target for each logit, or a model with outputs of shape {targets.shape[1:]} per sample."


def _positions_fix(targets: NDArray[Any], shape: tuple[int, ...]) -> str:
    """Return the fix for targets whose shape is not that of the pixels or positions of the logits."""
    (positions, classes), dense = positions_and_classes(shape), len(shape) >= KHW
    if _has_single_pixel(shape) and targets.ndim <= len("NK"):
        return "The model returns one prediction per sample, with axes of length 1: let it return outputs.flatten(1)."
    if not dense and classes > 1 and targets.shape[1:] == shape[1:]:
        return "If the classes of the logits lie on axis 1, let the model return outputs.transpose(1, 2)."
    for axis, text in ((1, "targets[:, 0]"), (targets.ndim - 1, "targets[..., 0]")):
        rest = np.delete(targets.shape, axis % targets.ndim)[1:].tolist()
        if rest == list(positions) and targets.shape[axis] == 1:
            return f"Remove the axis of length 1: {text}{', as int64' * (classes > 1)}."
    if targets.ndim == 1:
        fix = (
            ": give the model a head that pools, such as nn.AdaptiveAvgPool2d(1) and nn.Flatten(), or give masks"
            if dense
            else ": give one label for each position, or a model with one prediction per sample"
        )
        item = "pixel" if dense else "position"
        return f"These are labels of whole samples, and the model returns a prediction for each {item}{fix}."
    if targets.ndim == len(positions) + 1:
        sizes = ("×".join(map(str, sizes)) for sizes in (targets.shape[1:], positions))
        return "The labels are {} per sample and the logits {}: resize one to the size of the other.".format(*sizes)
    return f"Give targets of shape (N, {', '.join(map(str, shape))}), or a model with outputs of the targets' shape."


_TO_AXIS_1 = "targets.permute(0, 3, 1, 2) for a tensor, targets.transpose(0, 3, 1, 2) for a numpy array"


def _regression_fix(targets: NDArray[Any], shape: tuple[int, ...]) -> str:
    """Return the fix for real-valued targets."""
    found = targets.shape[1:] or (1,)
    outputs = "" if _fits(targets, shape) else f", with a model whose outputs have shape {found} per sample"
    return (
        'For regression take label_loss="squared-error" and a term on the outputs such as '
        f'Term("fitnet", student_layer="logits"){outputs}.'
    )


def _type_fix(targets: NDArray[Any], shape: tuple[int, ...], *, integral: bool) -> str:
    """Return the fix for targets that have the shape of class numbers, but another type."""
    if targets.dtype == bool:
        return "Give integers: targets.astype(numpy.int64), or targets.long() of a tensor."
    if np.isnan(targets).any():
        return (
            "Leave out samples whose target is NaN, or give integers, with the objective's ignore_index for no label."
        )
    if integral:
        return "The targets are integers stored as floats: give targets.astype(numpy.int64), or targets.long()."
    return _regression_fix(targets, shape)


def _class_axis_fix(targets: NDArray[Any], shape: tuple[int, ...], axis: int, *, binary: bool) -> str:
    """Return the fix for targets that have the shape of the logits, with the classes on the given axis."""
    move = f", and move the classes to axis 1: {_TO_AXIS_1}" if axis < 0 and len(shape) >= KHW else ""
    finite = bool(np.isfinite(targets).all())
    sums_to_1 = bool((abs(targets.sum(axis) - 1) < SUM_TOLERANCE).all())
    probabilities = finite and bool((targets >= 0).all()) and sums_to_1
    if binary and probabilities:
        return f"The targets are one-hot: give targets.argmax({axis})."
    if probabilities:
        return (
            "The targets are soft labels, such as those of mixup. The teacher computes soft targets for mixed inputs, "
            "so these labels are not needed: give label_weight=0 and leave the targets out. Or give hard labels: "
            f"targets.argmax({axis})."
        )
    if binary or (finite and targets.min() >= 0 and targets.max() <= 1):
        return (
            "The targets look like multi-label targets, one binary label for each class: take "
            f'label_loss="binary" and {_binary_term(shape)}{move}.'
        )
    return f"{_regression_fix(targets, targets.shape[1:] if move else shape)[:-1]}{move}."


def _columns_fix(targets: NDArray[Any], shape: tuple[int, ...], *, integral: bool) -> str:
    """Return the fix for targets (N, D), such as (N, 1), where the model returns one prediction per sample."""
    if (columns := targets.shape[1]) > 1:
        return (
            f"These are {columns} binary labels per sample: give the model as many outputs, and take "
            'label_loss="binary" with "binary-kd". If they are a mask of the inputs, give a dict that names the inputs '
            'and the targets: {"input_ids": ..., "attention_mask": ..., "labels": ...}.'
        )
    if integral:
        return "Remove the axis of length 1: targets[:, 0], as int64."
    return _regression_fix(targets, shape)


def _range(targets: NDArray[Any]) -> str:
    """Return the range of the targets as text for an error."""
    if targets.dtype.kind not in "biuf" or not targets.size:
        return ""
    finite = targets[np.isfinite(targets)] if targets.dtype.kind == "f" else targets
    other = "" if finite.size == targets.size else " and NaN or infinity"
    return f", values {finite.min():g} to {finite.max():g}{other}" if finite.size else ", values NaN or infinity"


# ------------------------------------------------------------------------------------------------ other label losses


def _check_binary(targets: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Refuse targets of the binary cross-entropy unless they are from 0 to 1 or -100, one for each logit."""
    fits = _fits(targets, shape)
    if targets.dtype.kind not in "biuf" or not fits:
        raise DataError(
            f"The targets have shape {targets.shape} and type {targets.dtype}{_range(targets)}.",
            f'The label loss "binary" takes a target from 0 to 1 for each logit, here of shape {shape} per sample.',
            f"Give numbers; {IGNORED} stands for no label." if fits else _reshape_fix(targets, shape),
        )
    wrong = ~((targets >= 0) & (targets <= 1)) & (targets != IGNORED)  # NaN is not in any range
    if not wrong.any():
        return
    value = targets[wrong][0]
    values = set(np.unique(targets[~np.isnan(targets)] if targets.dtype.kind == "f" else targets).tolist()) - {IGNORED}
    fix = f"Give values from 0 (no) to 1 (yes); {IGNORED} stands for no label. {_regression_fix(targets, shape)}"
    if np.isnan(value):
        fix = f"Give {IGNORED} where a label is missing."
    elif values <= {-1, 1}:
        fix = "The targets are -1 and 1: give (targets + 1) / 2."
    elif values <= {1, 2}:
        fix = "The targets are 1 and 2: give targets - 1."
    elif values <= {0, MASK_LEVEL}:
        fix = f"The targets are 0 and {MASK_LEVEL}: give targets / {MASK_LEVEL}."
    elif MASK_LEVEL in values and values <= {0, 1, MASK_LEVEL}:
        fix = f"If {MASK_LEVEL} marks pixels without a label, give {IGNORED} there."
    raise DataError(
        f"Sample {_first_sample(wrong)} has the target {value:g}; the targets are {summary(targets)}{_range(targets)}.",
        'The label loss "binary" takes targets from 0 (no) to 1 (yes).',
        fix,
    )


def _check_regression(targets: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Refuse targets of the squared error unless they are finite values, one for each output."""
    fits = _fits(targets, shape)
    if targets.dtype.kind not in "biuf" or not fits:
        raise DataError(
            f"The targets have shape {targets.shape} and type {targets.dtype}{_range(targets)}.",
            f'The label loss "squared-error" takes one number for each output, here of shape {shape} per sample.',
            "Give numbers." if fits else _reshape_fix(targets, shape),
        )
    wrong = ~np.isfinite(targets) if targets.dtype.kind == "f" else np.zeros(targets.shape, np.bool_)
    if wrong.any():
        raise DataError(
            f"The target of sample {_first_sample(wrong)} is NaN or infinity.",
            'The label loss "squared-error" takes finite numbers.',
            "Leave such samples out of the data.",
        )
