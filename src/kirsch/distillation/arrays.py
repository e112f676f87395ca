"""Array operations for losses, with the same result in numpy and PyTorch.

PyTorch accepts numpy's keywords `axis` and `keepdims`, so one formula serves both.
"""

from __future__ import annotations

import contextlib
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import DataError, ShapeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


BYTES_OF_16_BITS = 2


# ------------------------------------------------------------------------------------------------ frameworks


def namespace(array: Any) -> Any:
    """Return the module whose functions take this array: numpy or torch.

    Raises:
        UsageError: the object is neither a numpy array nor a tensor.
    """
    if isinstance(array, (np.ndarray, np.generic)):  # numpy returns a np.generic for a sum over all axes
        return np
    package = type(array).__module__.partition(".")[0]
    if package == "torch":
        return sys.modules["torch"]
    raise UsageError(
        f"A loss got an object of type {type(array).__qualname__}.", fix="Pass numpy arrays or PyTorch tensors."
    )


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
    return map_arrays(lambda array: array.detach() if hasattr(array, "detach") else array, arrays)


def upcast(arrays: Any) -> Any:
    """Convert floating arrays of 16 bits to 32 bits: sums of many 16-bit numbers lose too much precision."""

    def upcast_one(array: Any) -> Any:
        if namespace(array) is np:
            return array.astype(np.float32) if array.dtype == np.float16 else array
        is_half = array.is_floating_point() and array.dtype.itemsize == BYTES_OF_16_BITS
        return array.float() if is_half else array

    return map_arrays(upcast_one, arrays)


def to_float64(array: Any) -> Any:
    """Convert to 64-bit floating point, except on MPS, which lacks that type."""
    if namespace(array) is np:
        return array.astype(np.float64)
    return array if array.device.type == "mps" else array.double()


def to_int64(array: Any) -> Any:
    """Convert integers of any width to 64 bits."""
    return array.astype(np.int64) if namespace(array) is np else array.long()


def to_numpy(array: Any) -> Any:
    """Return the values as a numpy array, for decisions that need no gradient."""
    return array if namespace(array) is np else array.detach().cpu().numpy()


def array_like(values: Any, array: Any) -> Any:
    """Return a number, a list or an array with the framework, the type and the device of another array."""
    xp = namespace(array)
    if xp is np:
        return np.asarray(values, dtype=array.dtype)
    return xp.as_tensor(values, dtype=array.dtype, device=array.device)


def cast_like(array: Any, like: Any) -> Any:
    """Convert the array to the type of numbers of another."""
    return array.astype(like.dtype) if namespace(array) is np else array.to(like.dtype)


def without_autocast(arrays: Any) -> AbstractContextManager[Any]:
    """Return a context that switches automatic casting to 16 bits off for the framework and device of the arrays."""
    array = first_array(arrays)
    if namespace(array) is np:
        return contextlib.nullcontext()
    context: AbstractContextManager[Any] = sys.modules["torch"].autocast(array.device.type, enabled=False)
    return context


# ------------------------------------------------------------------------------------------------ formulas


def log_softmax(logits: Any, axis: int = -1) -> Any:
    """Return the logarithm of the softmax along an axis.

    Finite for finite logits of any size; minus infinity for logits of minus infinity beside finite ones.
    """
    xp = namespace(logits)
    shifted = logits - detach(xp.amax(logits, axis=axis, keepdims=True))
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=axis, keepdims=True))


def log_sigmoid(logits: Any) -> Any:
    """Return the logarithm of the logistic function; finite for finite logits of any size."""
    xp = namespace(logits)
    return -xp.logaddexp(xp.zeros_like(logits), -logits)  # a formula with |logits| has the wrong slope at 0


def log_sum_exp(logits: Any, where: Any = None, axis: int = -1) -> Any:
    """Return the logarithm of the sum of exponentials along an axis, which is kept with length 1.

    Args:
        logits: finite or minus infinity. An entry of minus infinity adds nothing; the result is minus infinity if all
            entries are.
        where: same shape, true for the entries to sum, at least one along the axis; None sums all.
        axis: the axis.
    """
    xp = namespace(logits)
    if where is not None:  # an excluded entry must not overflow either: its gradient would be 0 · infinity
        logits = xp.where(where, logits, detach(xp.amin(logits, axis=axis, keepdims=True)))
    top = detach(xp.amax(logits, axis=axis, keepdims=True))
    top = xp.where(top == -math.inf, xp.zeros_like(top), top)
    terms = xp.exp(logits - top)
    if where is not None:
        terms = xp.where(where, terms, xp.zeros_like(terms))
    total = xp.sum(terms, axis=axis, keepdims=True)
    is_empty = total == 0  # log(0) would turn a gradient of 0 into NaN
    return top + xp.where(is_empty, -math.inf, xp.log(xp.where(is_empty, xp.ones_like(total), total)))


def safe_multiply(probabilities: Any, values: Any) -> Any:
    """Return probability · value elementwise; 0 with a gradient of 0 where the probability is 0, whatever the value."""
    xp = namespace(probabilities)
    return probabilities * xp.where(probabilities == 0, xp.zeros_like(values), values)


def kl_terms(log_p: Any, log_q: Any) -> Any:
    """Return the terms p (log p - log q) of KL(p ‖ q), one for each class.

    A term is 0 with a gradient of 0 where p is 0. A class that is masked with a logit of minus infinity therefore adds
    nothing if it is masked in p, and adds infinity if it is masked in q alone.
    """
    xp = namespace(log_p)
    p = xp.exp(log_p)
    log_p, log_q = (xp.where(p == 0, xp.zeros_like(p), log) for log in (log_p, log_q))
    return p * (log_p - log_q)


def safe_sqrt(squares: Any) -> Any:
    """Return the square root, with a gradient of 0, not infinity, where the argument is 0."""
    xp = namespace(squares)
    is_zero = squares <= 0
    return xp.where(is_zero, 0.0 * squares, xp.sqrt(xp.where(is_zero, 0.0 * squares + 1.0, squares)))


def normalize(array: Any, axis: int = -1, eps: float = 1e-12) -> Any:
    """Divide by the Euclidean norm along an axis, or by `eps` where the norm is smaller, as `F.normalize` does."""
    xp = namespace(array)
    return array / safe_sqrt(xp.sum(array * array, axis=axis, keepdims=True)).clip(min=eps)


def standard_deviation(array: Any, axis: int | tuple[int, ...] = -1) -> Any:
    """Return the standard deviation (n - 1) along one or more axes, kept with length 1; its gradient at 0 is finite."""
    xp = namespace(array)
    axes = (axis,) if isinstance(axis, int) else axis
    count = math.prod(array.shape[number] for number in axes)
    centered = array - xp.mean(array, axis=axes, keepdims=True)
    return safe_sqrt(xp.sum(centered * centered, axis=axes, keepdims=True) / max(count - 1, 1))


# ------------------------------------------------------------------------------------------------ selection


def take_column(rows: Any, columns: Any) -> Any:
    """Return `rows[..., columns[...]]` along the last axis: shape (..., K) and integers (...) give (...)."""
    if namespace(rows) is np:
        return np.take_along_axis(rows, np.asarray(columns)[..., None], axis=-1)[..., 0]
    return rows.gather(-1, columns.long()[..., None])[..., 0]


def take_along_axis(rows: Any, columns: Any) -> Any:
    """Return `rows[..., columns]` along the last axis: shape (..., K) and integers (..., k) give (..., k)."""
    if namespace(rows) is np:
        return np.take_along_axis(rows, np.asarray(columns), axis=-1)
    return rows.gather(-1, columns.long())


def one_hot(columns: Any, like: Any) -> Any:
    """Return ones at the columns, zeros elsewhere, with the shape and type of `like`: (..., K) for integers (...)."""
    xp = namespace(like)
    count = like.shape[-1]
    numbers = np.arange(count) if xp is np else xp.arange(count, device=like.device)
    is_column = xp.asarray(columns)[..., None] == numbers
    return is_column.astype(like.dtype) if xp is np else is_column.to(like.dtype)


def one_hot_mask(columns: Any, like: Any) -> Any:
    """Return True at the columns (..., k), False elsewhere, with the shape of `like`: (..., K)."""
    xp = namespace(like)
    if xp is np:
        mask = np.zeros(like.shape, dtype=bool)
        np.put_along_axis(mask, np.asarray(columns), values=True, axis=-1)
        return mask
    return xp.zeros_like(like, dtype=xp.bool).scatter(-1, columns.long(), value=True)


def top_k_indices(rows: Any, count: int) -> Any:
    """Return the columns of the largest values of each row, the largest first: shape (..., K) gives (..., count)."""
    if namespace(rows) is np:
        return np.argsort(-rows, axis=-1, kind="stable")[..., :count]
    return rows.topk(count, dim=-1).indices


def unmasked_rows(logits: Any, mask: Any = None) -> Any:
    """Return the rows (n, K) of logits (N, K) or (N, L, K) where the mask (N,) or (N, L) is true; None keeps all.

    Raises:
        ShapeError: the mask has another shape.
        DataError: the mask is false everywhere.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    if mask is None:
        return rows
    if tuple(mask.shape) != tuple(logits.shape[:-1]):
        raise ShapeError(f"The mask has shape {tuple(mask.shape)}; {tuple(logits.shape[:-1])} is needed.")
    rows = rows[mask.reshape(-1) != 0]
    if len(rows) == 0:
        raise _all_masked()
    return rows


# ------------------------------------------------------------------------------------------------ shapes


def classes_last(logits: Any) -> Any:
    """Move the class axis of pixel logits (N, K, H, W) to the end; return logits of other shapes unchanged."""
    return namespace(logits).moveaxis(logits, 1, -1) if logits.ndim >= len("NKHW") else logits


def flatten(features: Any) -> Any:
    """Reshape (N, ...) to (N, D)."""
    return features.reshape(len(features), -1)


def adaptive_average_pool(maps: Any, size: tuple[int, int]) -> Any:
    """Average feature maps (N, C, H, W) to a height and width, as `F.adaptive_avg_pool2d` does."""
    height, width = maps.shape[2:]
    if (height, width) == tuple(size):
        return maps
    xp = namespace(maps)
    rows, columns = _pooling_matrix(height, size[0]), _pooling_matrix(width, size[1])
    if xp is not np:
        rows, columns = (xp.as_tensor(matrix, dtype=maps.dtype, device=maps.device) for matrix in (rows, columns))
    return xp.einsum("ph,nchw,qw->ncpq", rows, maps, columns)


def _pooling_matrix(in_size: int, out_size: int) -> Any:
    """Return a matrix (out, in) whose row i averages from floor(i · in / out) to ceil((i + 1) · in / out)."""
    matrix = np.zeros((out_size, in_size))
    for row in range(out_size):
        start, end = row * in_size // out_size, -(-(row + 1) * in_size // out_size)
        matrix[row, start:end] = 1 / (end - start)
    return matrix


def pool_to_common_size(student: Any, teacher: Any) -> tuple[Any, Any]:
    """Return both feature maps at the smaller of their two sizes (by height); the larger map is averaged."""
    size = min(student.shape[2:], teacher.shape[2:])
    return adaptive_average_pool(student, size), adaptive_average_pool(teacher, size)


# ------------------------------------------------------------------------------------------------ masks and means


def masked_mean(values: Any, mask: Any = None) -> Any:
    """Return the mean of the values where the mask is true. Masked values do not contribute, even if they are NaN.

    Args:
        values: shape (N,), (N, L), ...
        mask: same shape, true where a value counts; None counts all.

    Raises:
        ShapeError: the mask has another shape.
        DataError: the mask is false everywhere.
    """
    if mask is None:
        return values.mean()
    xp = namespace(values)
    if tuple(mask.shape) != tuple(values.shape):
        raise ShapeError(f"The mask has shape {tuple(mask.shape)}; {tuple(values.shape)} is needed.")
    counted = mask != 0
    number = int(counted.sum())
    if number == 0:
        raise _all_masked()
    return xp.where(counted, values, 0.0 * xp.zeros_like(values)).sum() / number


def _all_masked() -> DataError:
    return DataError("All targets are masked.", fix="Check the mask and the labels.")


def weighted_mean(values: Any, weights: Any, mask: Any = None) -> Any:
    """Return Σ weight · value / Σ weight over the entries where the mask is true; 0 if all weights are 0.

    Args:
        values, weights: same shape; weights >= 0.
        mask: same shape, true where a value counts; None counts all.

    Raises:
        ShapeError: the mask has another shape.
        DataError: the mask is false everywhere.
    """
    return masked_mean(weights * values, mask) / masked_mean(weights, mask).clip(min=1e-12)


def zero_masked(array: Any, mask: Any) -> Any:
    """Set the array to zero where the mask is false, so that no masked entry, even NaN, reaches a value or gradient.

    Args:
        array: shape (N, ...) or (N, L, ...).
        mask: has the array's leading axes as its shape; None returns the array unchanged.

    Raises:
        ShapeError: the mask has another shape.
    """
    if mask is None:
        return array
    xp = namespace(array)
    return xp.where(expand_mask(mask, array), array, xp.zeros_like(array))


def expand_mask(mask: Any, array: Any) -> Any:
    """Return the mask as booleans, with axes of length 1 appended up to the number of axes of the array.

    Raises:
        ShapeError: the shape of the mask is not that of the leading axes of the array.
    """
    if tuple(mask.shape) != tuple(array.shape[: mask.ndim]):
        raise ShapeError(f"The mask has shape {tuple(mask.shape)}; {tuple(array.shape[: mask.ndim])} is needed.")
    return (mask != 0).reshape(*mask.shape, *(1,) * (array.ndim - mask.ndim))


# ------------------------------------------------------------------------------------------------ checks


def check_same_shape(student: Any, teacher: Any, noun: str = "logits") -> None:
    """Raise a ShapeError that names both shapes if they differ.

    Args:
        student, teacher: arrays.
        noun: plural name of the arrays, for the message.
    """
    if tuple(student.shape) != tuple(teacher.shape):
        classes = " for the same classes." if noun == "logits" else ", of the same size."
        raise ShapeError(
            f"The student's {noun} have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}.",
            f"They must be {noun} of the same samples{classes}",
        )


def check_same_samples(student: Any, teacher: Any, noun: str = "features") -> None:
    """Raise a ShapeError that names both numbers of samples if they differ."""
    if len(student) != len(teacher):
        raise ShapeError(
            f"The student's {noun} have {len(student)} samples, the teacher's {len(teacher)}.",
            "They must be of the same samples.",
        )


def check_maps(student: Any, teacher: Any) -> None:
    """Raise a ShapeError unless both are feature maps (N, C, H, W) of the same samples."""
    for role, maps in (("student", student), ("teacher", teacher)):
        if len(maps.shape) != len("NCHW"):
            raise ShapeError(
                f"The {role}'s maps have shape {tuple(maps.shape)}; (N, C, H, W) is needed.",
                fix="Choose the output of a convolution, or a loss that takes features or tokens.",
            )
    check_same_samples(student, teacher, "maps")
