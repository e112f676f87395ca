"""Check that labels are one class number per sample, and fixes for other labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check_class_numbers(labels: NDArray[Any], classes: int, name: str) -> None:
    """Check that labels are one class number per sample.

    Args:
        labels: any array of numbers.
        classes: number of classes, K; 0 if it is not known.
        name: phrase after "labels" in messages, such as "of the test part of digits".

    Raises:
        DataError: the labels have another shape or type, or a label is not from 0 to K - 1.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        largest = f", from 0 to {classes - 1}" if classes else ""
        values = "" if labels.dtype.kind == "b" else f", values {labels.min():g} to {labels.max():g}"
        raise DataError(
            f"The labels {name} have shape {labels.shape} and type {labels.dtype}{values}.",
            f"The task classification takes class numbers: one integer per sample, shape (N,){largest}.",
            fix_of_labels(
                labels, "For labels of pixels or positions, or multi-label targets, use kirsch.distill with ArrayData."
            ),
        )
    wrong = (labels < 0) | (labels >= (classes or np.inf))
    if wrong.any():
        sample = int(wrong.argmax())
        raise DataError(
            f"Sample {sample} {name} has the label {labels[sample]}.",
            f"There are {classes} classes, so labels go from 0 to {classes - 1}.",
            "Give labels - 1."
            if labels.min() == 1
            else "Leave such samples out, or give the data set the names of all classes.",
        )


def fix_of_labels(labels: NDArray[Any], several: str) -> str:
    """Return the fix for labels that are not class numbers.

    Args:
        labels: the labels.
        several: the fix for labels that have several numbers per sample and are not one-hot.
    """
    is_integer = labels.dtype.kind != "f" or bool((labels == np.round(labels)).all())  # NaN is not equal to itself
    single = labels.ndim == 1 or labels.shape[1:] == (1,)
    if labels.ndim == 1 and is_integer:
        return "Give whole numbers: labels.astype(numpy.int64)."
    if single and not is_integer:
        return 'For numbers to predict (regression), use kirsch.distill with ArrayData and label_loss="squared-error".'
    if single:
        return "Remove the axis of length 1: give labels[:, 0] as integers."
    if labels.ndim == 2 and is_integer and set(np.unique(labels)) <= {0, 1} and (labels.sum(1) == 1).all():  # noqa: PLR2004 - (N, K)
        return "They are one-hot: give labels.argmax(-1)."
    return several
