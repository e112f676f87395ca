"""Formulas that several losses use, with finite values and gradients for inputs of any size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kirsch.ops.operations import (
    amax,
    amin,
    broadcast_to,
    cast,
    channel_axis,
    clip,
    convert_to_tensor,
    dtype,
    einsum,
    exp,
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

# ------------------------------------------------------------------------------------------------ probabilities


def log_softmax(logits: Any, axis: int = -1) -> Any:
    """Return the logarithm of the softmax along an axis.

    Finite for finite logits of any size; minus infinity for logits of minus infinity beside finite ones.
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
    """Return the standard deviation (n - 1) along one or more axes, kept with length 1; its gradient at 0 is finite."""
    axes = (axis,) if isinstance(axis, int) else axis
    count = 1
    for number in axes:  # math.prod of a generator cannot be traced by torch.compile
        count *= x.shape[number]
    centered = x - mean(x, axis=axes, keepdims=True)
    return safe_sqrt(sum(centered * centered, axis=axes, keepdims=True) / max(count - 1, 1))


# ------------------------------------------------------------------------------------------------ classes


def take_column(rows: Any, columns: Any) -> Any:
    """Return `rows[..., columns[...]]` along the last axis: shape (..., K) and integers (...) give (...)."""
    return take_along_axis(rows, columns[..., None], axis=-1)[..., 0]


def classes_last(logits: Any, axis: int | None = None) -> Any:
    """Move the class axis of pixel logits, such as (N, K, H, W), to the end; return logits of other shapes unchanged.

    Args:
        logits: shape (N, K), (N, L, K) or, with four axes or more, that of pixels.
        axis: of the classes of pixels; None: by the convention of the library.
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
    """Return a matrix (out, in) whose row i averages from floor(i · in / out) to ceil((i + 1) · in / out)."""
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
