"""Functions built on the operations: formulas with finite values and gradients, masks, nested arrays, checks."""

from __future__ import annotations

import math
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import DataError, ShapeError
from kirsch.ops.operations import (
    all,
    amax,
    amin,
    any,
    broadcast_to,
    cast,
    channel_axis,
    clip,
    convert_to_numpy,
    convert_to_tensor,
    count_nonzero,
    dtype,
    einsum,
    exp,
    is_traced,
    log,
    logaddexp,
    mean,
    moveaxis,
    ones_like,
    reshape,
    sqrt,
    stop_gradient,
    sum,
    take_along_axis,
    where,
    zeros_like,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# ------------------------------------------------------------------------------------------------ probabilities


def log_softmax(logits: Any, axis: int = -1) -> Any:
    """Return the logarithm of the softmax along an axis.

    The result is finite for finite logits of any size. It is minus infinity for a logit of minus infinity, if another
    logit along the axis is finite.
    """
    shifted = logits - stop_gradient(amax(logits, axis=axis, keepdims=True))
    return shifted - log(sum(exp(shifted), axis=axis, keepdims=True))


def log_sigmoid(logits: Any) -> Any:
    """Return the logarithm of the logistic function; finite for finite logits of any size."""
    return -logaddexp(zeros_like(logits), -logits)  # a formula with |logits| has the wrong slope at 0


def logsumexp(logits: Any, axis: int = -1, *, mask: Any = None) -> Any:
    """Return the logarithm of the sum of exponentials along an axis, which is kept with length 1.

    Args:
        logits: finite or minus infinity. An entry of minus infinity adds nothing; the result is minus infinity if all
            entries are.
        axis: the axis.
        mask: same shape, true for the entries to sum, at least one along the axis; None sums all.
    """
    if mask is not None:  # an excluded entry must not overflow either: its gradient would be 0 · infinity
        logits = where(mask, logits, stop_gradient(amin(logits, axis=axis, keepdims=True)))
    top = stop_gradient(amax(logits, axis=axis, keepdims=True))
    top = where(top == -math.inf, zeros_like(top), top)
    terms = exp(logits - top)
    if mask is not None:
        terms = where(mask, terms, zeros_like(terms))
    total = sum(terms, axis=axis, keepdims=True)
    is_empty = total == 0  # log(0) would turn a gradient of 0 into NaN
    return top + where(is_empty, -math.inf, log(where(is_empty, ones_like(total), total)))


def safe_multiply(probabilities: Any, values: Any) -> Any:
    """Return probability · value elementwise; 0 with a gradient of 0 where the probability is 0, whatever the value."""
    return probabilities * where(probabilities == 0, zeros_like(values), values)


def kl_terms(log_p: Any, log_q: Any) -> Any:
    """Return the terms p (log p - log q) of KL(p ‖ q), one for each class.

    A term is 0 with a gradient of 0 where p is 0. A class that is masked with a logit of minus infinity therefore adds
    nothing if it is masked in p, and adds infinity if it is masked in q alone.
    """
    p = exp(log_p)
    log_p, log_q = (where(p == 0, zeros_like(p), log_values) for log_values in (log_p, log_q))
    return p * (log_p - log_q)


# ------------------------------------------------------------------------------------------------ norms


def safe_sqrt(squares: Any) -> Any:
    """Return the square root, with a gradient of 0, not infinity, where the argument is 0."""
    is_zero = squares <= 0
    return where(is_zero, 0.0 * squares, sqrt(where(is_zero, 0.0 * squares + 1.0, squares)))


def normalize(x: Any, axis: int = -1, eps: float = 1e-12) -> Any:
    """Divide by the Euclidean norm along an axis, or by `eps` where the norm is smaller, as `F.normalize` does."""
    return x / clip(safe_sqrt(sum(x * x, axis=axis, keepdims=True)), eps)


def standard_deviation(x: Any, axis: int | tuple[int, ...] = -1) -> Any:
    """Return the standard deviation, with denominator n - 1, along one or more axes, which are kept with length 1.

    The gradient is finite where the standard deviation is 0.
    """
    axes = (axis,) if isinstance(axis, int) else axis
    count = 1
    for number in axes:  # math.prod of a generator cannot be traced by torch.compile
        count *= x.shape[number]
    centered = x - mean(x, axis=axes, keepdims=True)
    return safe_sqrt(sum(centered * centered, axis=axes, keepdims=True) / max(count - 1, 1))


# ------------------------------------------------------------------------------------------------ classes


def take_column(rows: Any, columns: Any) -> Any:
    """Return one value of each row, at the row's column: rows (..., K) and integers (...) give (...)."""
    return take_along_axis(rows, columns[..., None], axis=-1)[..., 0]


def classes_last(logits: Any, axis: int | None = None) -> Any:
    """Move the class axis of pixel logits, such as (N, K, H, W), to the end; return logits of other shapes unchanged.

    Args:
        logits: shape (N, K), (N, L, K), or the shape of pixel logits, with four axes or more.
        axis: class axis of pixel logits; None: the convention of the library.
    """
    if len(logits.shape) < len("NKHW"):
        return logits
    return moveaxis(logits, channel_axis(logits) if axis is None else axis, -1)


# ------------------------------------------------------------------------------------------------ maps


def flatten(features: Any) -> Any:
    """Reshape (N, ...) to (N, D)."""
    return reshape(features, (features.shape[0], -1))


def adaptive_average_pool(maps: Any, size: tuple[int, int]) -> Any:
    """Average feature maps (N, C, H, W) to a height and width, as `F.adaptive_avg_pool2d` does."""
    height, width = maps.shape[2:]
    if (height, width) == tuple(size):
        return maps
    rows, columns = (
        convert_to_tensor(_pooling_matrix(*sizes), like=maps) for sizes in ((height, size[0]), (width, size[1]))
    )
    return einsum("ph,nchw,qw->ncpq", rows, maps, columns)


def _pooling_matrix(in_size: int, out_size: int) -> Any:
    """Return a matrix (out, in) whose row i averages the entries [floor(i · in / out), ceil((i + 1) · in / out))."""
    matrix = np.zeros((out_size, in_size))
    for row in range(out_size):
        start, end = row * in_size // out_size, -(-(row + 1) * in_size // out_size)
        matrix[row, start:end] = 1 / (end - start)
    return matrix


def pool_to_common_size(student: Any, teacher: Any) -> tuple[Any, Any]:
    """Return both feature maps at the smaller of their two sizes (by height); the larger map is averaged."""
    size = min(tuple(student.shape[2:]), tuple(teacher.shape[2:]))
    return adaptive_average_pool(student, size), adaptive_average_pool(teacher, size)


# ------------------------------------------------------------------------------------------------ types


def cast_like(x: Any, like: Any) -> Any:
    """Convert an array to the type of another."""
    return cast(x, dtype(like))


def broadcast_like(x: Any, like: Any) -> Any:
    """Return an array repeated to the shape of another."""
    return broadcast_to(x, tuple(like.shape))


def epsilon(x: Any) -> float:
    """Return the difference between 1 and the next number of the array's floating type."""
    return float(np.finfo(dtype(x)).eps)


# ------------------------------------------------------------------------------------------------ masks


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
    """Return the array with 0 where the mask is false, so that no masked entry, even NaN, reaches a value or gradient.

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


# ------------------------------------------------------------------------------------------------ nested arrays


def map_arrays(function: Callable[[Any], Any], arrays: Any) -> Any:
    """Apply a function to an array, or to each array in a list, a tuple or a dict."""
    if isinstance(arrays, dict):
        return {name: map_arrays(function, array) for name, array in arrays.items()}
    if isinstance(arrays, (list, tuple)):
        return [map_arrays(function, array) for array in arrays]
    return function(arrays)


def first_array(arrays: Any) -> Any:
    """Return the array, or the first one in a list, a tuple or a dict of arrays."""
    while isinstance(arrays, (dict, list, tuple)):
        arrays = next(iter(arrays.values() if isinstance(arrays, dict) else arrays))
    return arrays


def detach(arrays: Any) -> Any:
    """Return the array, or each array in a list or dict, without gradient."""
    return map_arrays(stop_gradient, arrays)


def upcast(arrays: Any) -> Any:
    """Convert floating arrays of 16 bits to 32 bits: sums of many 16-bit numbers lose too much precision."""
    return map_arrays(lambda x: cast(x, "float32") if dtype(x) in ("float16", "bfloat16") else x, arrays)


# ------------------------------------------------------------------------------------------------ checks of values

_enabled: ContextVar[bool] = ContextVar("value_checks", default=True)


def raise_if(condition: Any, error: Callable[[], Exception]) -> None:
    """Raise an error if a condition is true for any element.

    The check reads one value from the device. It is skipped while a compiler traces the function (`torch.compile`,
    `jax.jit`, `tf.function`), because there are no values then, and within `without_value_checks()`.

    Args:
        condition: booleans of any shape.
        error: function that returns the error; it may read the values of arrays.
    """
    if not is_traced(condition) and _enabled.get() and convert_to_numpy(any(condition)):
        raise error()


def is_known_to_hold(condition: Any) -> bool:
    """Return whether a condition is known to be true for all elements, so that the caller can skip the general case.

    The answer is False while a compiler traces the function, and within `without_value_checks()`. The result of the
    caller must therefore not depend on the answer.
    """
    return not is_traced(condition) and _enabled.get() and bool(convert_to_numpy(all(condition)))


@contextmanager
def without_value_checks() -> Iterator[None]:
    """Return a context in which values are not checked, so that a step need not wait for the device.

    Use it for batches whose masks and labels are known to be valid.
    """
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)
