"""Whether the targets of the data are what the loss on labels takes; if not, what they look like and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.data.arrays import host
from kirsch.data.structure import summary
from kirsch.distillation.losses.labels import IGNORED
from kirsch.distillation.losses.loss import OUTPUT_KINDS, get_loss, step_arguments
from kirsch.distillation.schedule import ends
from kirsch.errors import DataError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.distillation.objective import Objective

CLOSE = 1e-4
"""By how much a row of shares may miss 1."""

KHW = 3
"""Axes of the logits of one sample where there are some for each pixel."""

MASK_LEVEL = 255
"""What marks the foreground in masks that are stored as images, and pixels without a label in others."""


def uses_labels(objective: Objective) -> bool:
    """Whether the objective learns from the values of the targets."""
    named = any(any(ends(term.weight)) and "labels" in step_arguments(get_loss(term.loss)) for term in objective.terms)
    return named or any(ends(objective.label_weight))


def _reads(objective: Objective, targets: NDArray[Any]) -> bool:
    """Whether the objective looks at targets: at their values, or at which positions of the logits have a label."""
    marks = objective.label_loss == "cross-entropy" and targets.ndim > 1 and targets.dtype.kind in "iu"
    return uses_labels(objective) or (
        marks and any(get_loss(term.loss).takes in OUTPUT_KINDS for term in objective.terms)
    )


def check_labels(given: Any, shape: tuple[int, ...], objective: Objective) -> None:
    """Refuse targets that the loss on labels does not take.

    Args:
        given: the targets; None where there are none.
        shape: of the logits of one sample.
        objective: what the targets are for.

    Raises:
        DataError: they are of another kind or out of range, or there is nothing else to learn from.
        UsageError: positions shall predict the next, and there are none.
    """
    if objective.causal and len(shape) == 1:
        raise UsageError(
            f"The objective is causal, and the student puts out {shape[0]} scores a sample.",
            "Where each position predicts the next one, there are logits for each position.",
            "Leave causal out, or give a model of sequences.",
        )
    if given is None:
        if not objective.terms:
            raise DataError("The data has no targets, and there is no teacher.", fix="Give (inputs, targets).")
        return
    targets = host(given)
    if not targets.ndim:
        raise DataError(f"The targets are {given!r}, a single value.", fix="Give one target for each sample.")
    if not _reads(objective, targets):
        return
    _check_values(targets, shape, objective)
    if objective.label_loss != "cross-entropy":
        return
    without = [term for term in objective.terms if "labels" not in step_arguments(get_loss(term.loss))]
    if not without and not _counting(targets, objective.ignore_index).any():
        raise DataError(
            f"All targets are masked: the label of all {len(targets)} samples is {objective.ignore_index}.",
            "No term does without them, so there is nothing to learn from.",
            "Look at the mask and the labels of the data.",
        )


def check_batch(given: Any, shape: tuple[int, ...], objective: Objective, *, wherever: bool = False) -> None:
    """Refuse the targets of one batch of a run by their values, whose numbers of positions may differ.

    Those that the objective does not look at may be anything.

    Those of another device than the host are not looked at, which would wait for it, unless `wherever` says so.

    Raises:
        DataError: see `check_labels`.
    """
    on_device = getattr(getattr(given, "device", None), "type", "cpu") != "cpu"
    if given is None or (on_device and not wherever):
        return
    if _reads(objective, targets := host(given)):
        check_evaluable(targets, shape, objective)


def check_evaluable(targets: NDArray[Any], shape: tuple[int, ...], objective: Objective) -> None:
    """Refuse targets that answers of a model cannot be compared with by the label loss.

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
        _check_answers(targets, shape)
    elif objective.label_loss == "squared-error":
        _check_numbers(targets, shape)


# ------------------------------------------------------------------------------------------------ cross-entropy


def _check_classes(targets: NDArray[Any], shape: tuple[int, ...], objective: Objective) -> None:
    places, classes = places_of(shape)
    if classes == 1 and targets.dtype.kind in "biuf":
        raise _only_one_class(targets, shape)
    if targets.shape[1:] != places or not np.issubdtype(targets.dtype, np.integer):
        raise not_class_numbers(targets, shape)
    largest = np.iinfo(targets.dtype).max
    if classes > largest + 1:
        raise DataError(
            f"The targets are {targets.dtype}, which goes to {largest}; the model puts out {classes} classes.",
            "Numbers of larger classes have become other numbers in that type.",
            "Make the targets int64 where they are read.",
        )
    wrong = ((targets < 0) | (targets >= classes)) & _counting(targets, objective.ignore_index)
    if wrong.any():
        raise out_of_range(targets, wrong, classes, objective.ignore_index)


def _only_one_class(targets: NDArray[Any], shape: tuple[int, ...]) -> DataError:
    """The error for a model with one logit, of whose softmax nothing can be learned."""
    values = set(np.unique(targets).tolist()) if targets.dtype.kind != "f" or np.isfinite(targets).all() else {None}
    binary = f'take label_loss="binary", and {_term_of(shape)} if there is a teacher'
    fix = _numbers(targets, shape)
    if not _fits(targets, shape):
        fix = _reshaped(targets, shape)
    elif values <= {0, 1}:
        fix = f"For a yes or no {binary}."
    elif values <= {-1, 1}:
        fix = f"For a yes or no give (targets + 1) / 2, and {binary}."
    elif values <= {0, MASK_LEVEL}:
        fix = f"For a yes or no give targets / {MASK_LEVEL}, and {binary}."
    return DataError(
        f"The model puts out one logit for each {'sample' if len(shape) < 2 else 'position'}, shape {shape} a sample; "  # noqa: PLR2004 - (1,) or none
        f"the targets have shape {targets.shape} and type {targets.dtype}{_values(targets)}.",
        'The label loss "cross-entropy" takes a softmax over classes, which is 1 for a single one whatever the logit.',
        fix,
    )


def _term_of(shape: tuple[int, ...]) -> str:
    """The term on answers of yes or no that a teacher of such logits can give."""
    return 'Term("fitnet", student_layer="logits")' if len(shape) >= KHW else 'the term "binary-kd"'


def _fits(targets: NDArray[Any], shape: tuple[int, ...]) -> bool:
    """Whether there is one target for each logit; the axis of a single class may be missing."""
    places, classes = places_of(shape)
    return targets.shape[1:] == shape or (classes == 1 and targets.shape[1:] == places)


def places_of(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The places of one sample that have a label each, and the number of classes, of the shape of its logits."""
    return (shape[1:], shape[0]) if len(shape) >= KHW else (shape[:-1], shape[-1] if shape else 1)


def _counting(targets: NDArray[Any], ignore_index: int) -> NDArray[np.bool_]:
    """True where a target is not the label that stands for none, in a type that can hold both."""
    found: NDArray[np.bool_] = targets.astype(np.int64) != ignore_index
    return found


def out_of_range(targets: NDArray[Any], wrong: NDArray[np.bool_], classes: int, ignore_index: int) -> DataError:
    """The error for class numbers of which some, where `wrong` is true, are not classes of the model."""
    place, value = int(wrong.reshape(len(targets), -1).any(axis=1).argmax()), int(targets[wrong][0])
    values = set(np.unique(targets).tolist())
    fix = f"Repair the labels, or give the model a larger head; {ignore_index} stands for no label."
    if values <= {0, MASK_LEVEL} and classes == len((0, MASK_LEVEL)):
        fix = f"These look like masks of 0 and {MASK_LEVEL}: give (targets == {MASK_LEVEL}) as whole numbers."
    elif values == {-1, 1} and classes == len((-1, 1)):
        fix = "They are -1 and 1: give (targets + 1) // 2."
    elif set(np.unique(targets[wrong]).tolist()) == {MASK_LEVEL} and ignore_index != MASK_LEVEL:
        fix = f"Where {MASK_LEVEL} marks what has no label, give the objective ignore_index={MASK_LEVEL}."
    elif set(np.unique(targets[wrong]).tolist()) == {classes} and targets.min() == 1:
        fix = f"The labels go from 1 to {classes}: give targets - 1."
    elif targets.dtype == np.int8 and targets.min() < 0:
        fix = "int8 goes to 127: if there were larger labels, make them int64 where they are read."
    return DataError(
        f"Sample {place} has the label {value}.",
        f"The model puts out {classes} classes, so labels go from 0 to {classes - 1}.",
        fix,
    )


def not_class_numbers(targets: NDArray[Any], shape: tuple[int, ...]) -> DataError:
    """The error for targets that are not class numbers where the loss is the cross-entropy of classes."""
    places, _ = places_of(shape)
    where = "position" if places else "sample"
    wanted = f"(N, {', '.join(map(str, places))})" if places else "(N,)"
    return DataError(
        f"The targets have shape {targets.shape} and type {targets.dtype}{_values(targets)}.",
        f'They must be class numbers for the label loss "cross-entropy": one whole number a {where}, shape {wanted}, '
        f"since the model puts out logits of shape {shape} a sample.",
        _remedy(targets, shape),
    )


def _remedy(targets: NDArray[Any], shape: tuple[int, ...]) -> str:
    """What to do with targets that are not class numbers, by what they look like."""
    places, _ = places_of(shape)
    if targets.dtype.kind not in "biuf":
        return "Give numbers: turn class names into class numbers."
    known = targets[np.isfinite(targets)] if targets.dtype.kind == "f" else targets
    whole = bool(known.size == targets.size and (known == np.round(known)).all())
    yes_or_no = bool(whole and np.isin(known, (0, 1)).all())
    if targets.shape[1:] == places:
        return _remedy_of_numbers(targets, shape, whole=whole)
    if targets.shape[1:] == shape or _classes_last(targets, shape):
        axis = 1 if targets.shape[1:] == shape and len(shape) >= KHW else -1
        return _remedy_of_rows(targets, shape, axis, yes_or_no=yes_or_no)
    if (whole and places) or _answers_once(shape):
        return _remedy_of_places(targets, shape)
    if targets.ndim == len("ND") and not places and (targets.shape[1] == 1 or yes_or_no):
        return _remedy_of_columns(targets, shape, whole=whole)
    return _COUNTS if whole else _numbers(targets, shape)


def _classes_last(targets: NDArray[Any], shape: tuple[int, ...]) -> bool:
    """Whether targets of pixels have their classes on the last axis, as images of TensorFlow have."""
    places, classes = places_of(shape)
    return len(shape) >= KHW and targets.shape[1:] == (*places, classes)


def _answers_once(shape: tuple[int, ...]) -> bool:
    """Whether logits of pixels are of one place, such as (K, 1, 1)."""
    return len(shape) >= KHW and set(places_of(shape)[0]) == {1}


def _reshaped(targets: NDArray[Any], shape: tuple[int, ...]) -> str:
    """What to do with targets of which there is not one for each logit."""
    places, classes = places_of(shape)
    if _classes_last(targets, shape):
        return f"Bring the classes to axis 1: {_TO_AXIS_1}."
    one_each = targets.shape[1:] == places or (not places and targets.shape[1:] == (1,))
    if one_each and classes > 1:
        if not (targets.dtype.kind == "f" and (targets != np.round(targets)).any()):
            kd = "pixel-kd" if len(shape) >= KHW else "kd"
            return f'Of class numbers, of which one holds, take label_loss="cross-entropy" and the term "{kd}".'
    elif places:
        return _remedy_of_places(targets, shape)
    return f"Give one target for each logit, or a model with outputs of shape {targets.shape[1:]} a sample."


def _remedy_of_places(targets: NDArray[Any], shape: tuple[int, ...]) -> str:
    """Of numbers where the model answers for each pixel or position."""
    (places, classes), dense = places_of(shape), len(shape) >= KHW
    if _answers_once(shape) and targets.ndim <= len("NK"):
        return "The model answers once for each sample, with axes of length 1: let it return outputs.flatten(1)."
    if not dense and classes > 1 and targets.shape[1:] == shape[1:]:
        return "If the classes of the logits lie on axis 1, let the model return outputs.transpose(1, 2)."
    for axis, text in ((1, "targets[:, 0]"), (targets.ndim - 1, "targets[..., 0]")):
        if np.delete(targets.shape, axis % targets.ndim)[1:].tolist() == list(places) and targets.shape[axis] == 1:
            return f"Take out the axis of length 1: {text}{', as int64' * (classes > 1)}."
    if targets.ndim == 1:
        head = (
            ": give it a head that answers once for each sample, such as nn.AdaptiveAvgPool2d(1) and nn.Flatten(), or "
            "give masks"
            if dense
            else ": give one label for each position, or a model that answers once"
        )
        place = "pixel" if dense else "position"
        return f"These are labels of whole samples, and the model answers for each {place}{head}."
    if targets.ndim == len(places) + 1:
        sizes = ("×".join(map(str, sizes)) for sizes in (targets.shape[1:], places))
        return "The labels are {} a sample and the logits {}: bring one to the size of the other.".format(*sizes)
    return f"Give targets of shape (N, {', '.join(map(str, shape))}), or a model with outputs of their shape."


_COUNTS = "Give one class number for each place that the model answers for, or a model with logits of that shape."

_TO_AXIS_1 = "targets.permute(0, 3, 1, 2) of a tensor, targets.transpose(0, 3, 1, 2) of an array"


def _numbers(targets: NDArray[Any], shape: tuple[int, ...]) -> str:
    """What to do with numbers that are no classes."""
    outputs = "" if _fits(targets, shape) else f", with a model whose outputs have shape {targets.shape[1:]} a sample"
    return (
        'For numbers to come near to (regression) take label_loss="squared-error" and a term on the outputs such as '
        f'Term("fitnet", student_layer="logits"){outputs}.'
    )


def _remedy_of_numbers(targets: NDArray[Any], shape: tuple[int, ...], *, whole: bool) -> str:
    """Of targets that have the shape of class numbers, and another type."""
    if targets.dtype == bool:
        return "Give whole numbers: targets.astype(numpy.int64), or targets.long() of a tensor."
    if np.isnan(targets).any():
        return "Leave out samples whose target is NaN, or give -100 where a label is missing, as whole numbers."
    if whole:
        return "They are whole numbers stored as floats: give targets.astype(numpy.int64), or targets.long()."
    return _numbers(targets, shape)


def _remedy_of_rows(targets: NDArray[Any], shape: tuple[int, ...], axis: int, *, yes_or_no: bool) -> str:
    """Of targets that have the shape of the logits, with the classes on this axis."""
    moved = f", and bring the classes to axis 1: {_TO_AXIS_1}" if axis < 0 and len(shape) >= KHW else ""
    finite = bool(np.isfinite(targets).all())
    shares = finite and bool((targets >= 0).all()) and bool((abs(targets.sum(axis) - 1) < CLOSE).all())
    if yes_or_no and shares:
        return f"They are one-hot: give targets.argmax({axis})."
    if shares:
        return (
            "They are soft labels, as mixed samples have. A teacher gives soft targets for mixed inputs itself: give "
            f"label_weight=0 and leave the targets out, or harden them: targets.argmax({axis})."
        )
    if yes_or_no or (finite and targets.min() >= 0 and targets.max() <= 1):
        return (
            'They answer yes or no for each class (several may hold): take label_loss="binary" and '
            f"{_term_of(shape)}{moved}."
        )
    return f"{_numbers(targets, targets.shape[1:] if moved else shape)[:-1]}{moved}."


def _remedy_of_columns(targets: NDArray[Any], shape: tuple[int, ...], *, whole: bool) -> str:
    """Of targets (N, D), such as (N, 1), where the model answers once a sample."""
    if (columns := targets.shape[1]) > 1:
        return (
            f"These are {columns} answers of yes or no a sample: give the model as many outputs, and take "
            'label_loss="binary" with "binary-kd". If they are a mask of the inputs, give a dict that names the inputs '
            'and the targets: {"input_ids": ..., "attention_mask": ..., "labels": ...}.'
        )
    if whole:
        return "Take out the axis of length 1: targets[:, 0], as int64."
    return _numbers(targets, shape)


def _values(targets: NDArray[Any]) -> str:
    """The range of some targets in words."""
    if targets.dtype.kind not in "biuf" or not targets.size:
        return ""
    known = targets[np.isfinite(targets)] if targets.dtype.kind == "f" else targets
    broken = "" if known.size == targets.size else " and NaN or infinity"
    return f", values {known.min():g} to {known.max():g}{broken}" if known.size else ", values NaN or infinity"


# ------------------------------------------------------------------------------------------------ other label losses


def _check_answers(targets: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Refuse targets of the binary cross-entropy that are not from 0 to 1."""
    fits = _fits(targets, shape)
    if targets.dtype.kind not in "biuf" or not fits:
        raise DataError(
            f"The targets have shape {targets.shape} and type {targets.dtype}{_values(targets)}.",
            f'The label loss "binary" takes a yes or no, 0 to 1, for each of the logits of shape {shape} a sample.',
            "Give one target for each logit; -100 stands for none." if fits else _reshaped(targets, shape),
        )
    wrong = ~((targets >= 0) & (targets <= 1)) & (targets != IGNORED)  # NaN is not in any range
    if not wrong.any():
        return
    place, value = int(wrong.reshape(len(targets), -1).any(axis=1).argmax()), targets[wrong][0]
    values = set(np.unique(targets[~np.isnan(targets)] if targets.dtype.kind == "f" else targets).tolist()) - {IGNORED}
    fix = f"Give 0 for no and 1 for yes, or shares between; {IGNORED} stands for no label. {_numbers(targets, shape)}"
    if np.isnan(value):
        fix = f"Give {IGNORED} where a label is missing."
    elif values <= {-1, 1}:
        fix = "They are -1 and 1: give (targets + 1) / 2."
    elif values <= {1, 2}:
        fix = "They are 1 and 2: give targets - 1."
    elif values <= {0, MASK_LEVEL}:
        fix = f"They are 0 and {MASK_LEVEL}: give targets / {MASK_LEVEL}."
    elif MASK_LEVEL in values and values <= {0, 1, MASK_LEVEL}:
        fix = f"Where {MASK_LEVEL} marks what has no label, give {IGNORED} there."
    raise DataError(
        f"Sample {place} has the target {value:g}; the targets are {summary(targets)}{_values(targets)}.",
        'The label loss "binary" takes targets from 0 (no) to 1 (yes).',
        fix,
    )


def _check_numbers(targets: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Refuse targets of the squared error that are not finite numbers, one for each output."""
    fits = _fits(targets, shape)
    if targets.dtype.kind not in "biuf" or not fits:
        raise DataError(
            f"The targets have shape {targets.shape} and type {targets.dtype}{_values(targets)}.",
            f'The label loss "squared-error" takes one number for each output, and these have shape {shape} a sample.',
            "Give numbers of the shape of the model's outputs." if fits else _reshaped(targets, shape),
        )
    wrong = ~np.isfinite(targets) if targets.dtype.kind == "f" else np.zeros(targets.shape, np.bool_)
    if wrong.any():
        place = int(wrong.reshape(len(targets), -1).any(axis=1).argmax())
        raise DataError(
            f"The target of sample {place} is NaN or infinity.",
            'The label loss "squared-error" takes finite numbers.',
            "Leave such samples out of the data.",
        )
