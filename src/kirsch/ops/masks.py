"""Means over the unmasked elements of an array."""

from __future__ import annotations

from typing import Any

from kirsch.errors import DataError, ShapeError
from kirsch.ops.operations import any, cast, clip, count_nonzero, dtype, mean, reshape, sum, where, zeros_like
from kirsch.ops.value_checks import raise_if


def masked_mean(values: Any, mask: Any = None) -> Any:
    """Return the mean of the values where the mask is true. Masked values do not contribute, even if they are NaN.

    Args:
        values: shape (N,), (N, L), ...
        mask: same shape, true where a value counts; None counts all.

    Returns:
        Scalar; NaN if the mask is false everywhere and values are not checked (see `raise_if`).

    Raises:
        ShapeError: the mask has another shape.
        DataError: the mask is false everywhere.
    """
    if mask is None:
        return mean(values)
    check_mask_shape(mask, values.shape)
    check_mask_is_true_somewhere(mask)
    counted = mask != 0
    count = cast(count_nonzero(counted), dtype(values))
    return sum(where(counted, values, zeros_like(values))) / count


def weighted_mean(values: Any, weights: Any, mask: Any = None) -> Any:
    """Return Σ weight · value / Σ weight over the entries where the mask is true; 0 if all weights are 0.

    Args:
        values, weights: same shape; weights >= 0.
        mask: same shape, true where a value counts; None counts all.

    Raises:
        ShapeError: the mask has another shape.
        DataError: the mask is false everywhere.
    """
    return masked_mean(weights * values, mask) / clip(masked_mean(weights, mask), 1e-12)


def zero_masked(x: Any, mask: Any) -> Any:
    """Set the array to zero where the mask is false, so that no masked entry, even NaN, reaches a value or gradient.

    Args:
        x: shape (N, ...) or (N, L, ...).
        mask: has the array's leading axes as its shape; None returns the array unchanged.

    Raises:
        ShapeError: the mask has another shape.
    """
    return x if mask is None else where(expand_mask(mask, x), x, zeros_like(x))


def expand_mask(mask: Any, x: Any) -> Any:
    """Return the mask as booleans, with axes of length 1 appended up to the number of axes of the array.

    Raises:
        ShapeError: the shape of the mask is not that of the leading axes of the array.
    """
    rank = len(mask.shape)
    check_mask_shape(mask, x.shape[:rank])
    return reshape(mask != 0, (*mask.shape, *(1,) * (len(x.shape) - rank)))


def check_mask_shape(mask: Any, shape: Any) -> None:
    """Raise a ShapeError if a mask has another shape."""
    if tuple(mask.shape) != tuple(shape):
        raise ShapeError(f"The mask has shape {tuple(mask.shape)}; {tuple(shape)} is needed.")


def check_mask_is_true_somewhere(mask: Any) -> None:
    """Raise a DataError if a mask is false everywhere; see `raise_if` for when values are checked."""
    raise_if(~any(mask != 0), lambda: DataError("All targets are masked.", fix="Check the mask and the labels."))
