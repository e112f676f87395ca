"""The few array operations that losses need, the same for numpy, PyTorch and what follows.

PyTorch takes numpy's keywords `axis` and `keepdims`, so that one line of a formula serves both.
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


HALF = 2
"""Bytes of a number of 16 bits."""


def namespace(array: Any) -> Any:
    """The module whose functions take this array.

    Raises:
        UsageError: the array is of no known kind.
    """
    if isinstance(array, (np.ndarray, np.generic)):  # a sum over all axes is no array in numpy
        return np
    root = type(array).__module__.partition(".")[0]
    if root == "torch":
        return sys.modules["torch"]
    raise UsageError(f"A {type(array).__qualname__} is no array that losses know.", fix="Give numpy arrays or tensors.")


def each(function: Callable[[Any], Any], arrays: Any) -> Any:
    """The function of an array, or of each array in a list, a tuple or a dict."""
    if isinstance(arrays, dict):
        return {name: each(function, array) for name, array in arrays.items()}
    if isinstance(arrays, (list, tuple)):
        return [each(function, array) for array in arrays]
    return function(arrays)


def first_of(arrays: Any) -> Any:
    """The array, or the first of a list, a tuple or a dict of arrays."""
    while isinstance(arrays, (dict, list, tuple)):
        arrays = next(iter(arrays.values() if isinstance(arrays, dict) else arrays))
    return arrays


def constant(arrays: Any) -> Any:
    """The array, or each in a list or dict, without a way for gradients back."""
    return each(lambda array: array.detach() if hasattr(array, "detach") else array, arrays)


def wide(arrays: Any) -> Any:
    """The array, or each in a list or dict, with at least 32 bits: sums of many numbers of 16 bits lose too much."""

    def widened(array: Any) -> Any:
        if namespace(array) is np:
            return array.astype(np.float32) if array.dtype == np.float16 else array
        half = array.is_floating_point() and array.dtype.itemsize == HALF
        return array.float() if half else array

    return each(widened, arrays)


def doubled(array: Any) -> Any:
    """The array with 64 bits, where its device has them."""
    if namespace(array) is np:
        return array.astype(np.float64)
    return array if array.device.type == "mps" else array.double()


def whole_numbers(array: Any) -> Any:
    """Whole numbers of any width with 64 bits."""
    return array.astype(np.int64) if namespace(array) is np else array.long()


def full_precision(arrays: Any) -> AbstractContextManager[Any]:
    """A context without automatic casting to 16 bits, for the framework and device of these arrays."""
    array = first_of(arrays)
    if namespace(array) is np:
        return contextlib.nullcontext()
    context: AbstractContextManager[Any] = sys.modules["torch"].autocast(array.device.type, enabled=False)
    return context


def log_softmax(scores: Any, axis: int = -1) -> Any:
    """Logarithm of the softmax over an axis; finite for scores of any finite size, -inf for -inf beside others."""
    xp = namespace(scores)
    shifted = scores - constant(xp.amax(scores, axis=axis, keepdims=True))
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=axis, keepdims=True))


def log_sigmoid(scores: Any) -> Any:
    """Logarithm of the logistic function; finite for scores of any finite size."""
    xp = namespace(scores)
    return -xp.logaddexp(xp.zeros_like(scores), -scores)  # of |scores|, the slope at 0 would be wrong


def expected(shares: Any, values: Any) -> Any:
    """Share · value of each class; 0, of a gradient of 0, where the share is 0, whatever the value."""
    xp = namespace(shares)
    return shares * xp.where(shares == 0, xp.zeros_like(values), values)


def relative(log_p: Any, log_q: Any) -> Any:
    """What each class adds to the divergence of q from p: p (log p - log q), and 0 where p is 0, of a gradient of 0.

    So a class that a score of minus infinity suppresses in p adds nothing; one that it suppresses in q alone adds
    infinity.
    """
    xp = namespace(log_p)
    shares = xp.exp(log_p)
    log_p, log_q = (xp.where(shares == 0, xp.zeros_like(shares), side) for side in (log_p, log_q))
    return shares * (log_p - log_q)


def pick(rows: Any, columns: Any) -> Any:
    """`rows[..., columns[...]]` along the last axis: shape (..., K) and whole numbers (...) give (...)."""
    if namespace(rows) is np:
        return np.take_along_axis(rows, np.asarray(columns)[..., None], axis=-1)[..., 0]
    return rows.gather(-1, columns.long()[..., None])[..., 0]


def one_hot(columns: Any, like: Any) -> Any:
    """Ones at the columns, zeros elsewhere, of the shape and type of `like`: (..., K) for whole numbers (...)."""
    xp = namespace(like)
    count = like.shape[-1]
    numbers = np.arange(count) if xp is np else xp.arange(count, device=like.device)
    hot = xp.asarray(columns)[..., None] == numbers
    return hot.astype(like.dtype) if xp is np else hot.to(like.dtype)


def root(squares: Any) -> Any:
    """Square root, whose gradient is 0 and not infinite where the argument is 0."""
    xp = namespace(squares)
    zero = squares <= 0
    return xp.where(zero, 0.0 * squares, xp.sqrt(xp.where(zero, 0.0 * squares + 1.0, squares)))


def normalized(array: Any, axis: int = -1, eps: float = 1e-12) -> Any:
    """The array divided by its length along an axis, or by `eps` where that is smaller, as `F.normalize` does."""
    xp = namespace(array)
    return array / root(xp.sum(array * array, axis=axis, keepdims=True)).clip(min=eps)


def deviation(array: Any, axis: int | tuple[int, ...] = -1) -> Any:
    """Standard deviation along one or more axes, kept with length 1: divided by n - 1, with a finite gradient at 0."""
    xp = namespace(array)
    axes = (axis,) if isinstance(axis, int) else axis
    count = 1
    for place in axes:
        count *= array.shape[place]
    centered = array - xp.mean(array, axis=axes, keepdims=True)
    return root(xp.sum(centered * centered, axis=axes, keepdims=True) / max(count - 1, 1))


def flat(features: Any) -> Any:
    """(N, ...) as (N, D)."""
    return features.reshape(len(features), -1)


def pooled(maps: Any, size: tuple[int, int]) -> Any:
    """Maps (N, C, H, W) averaged to a size as adaptive pooling does: each place averages what it overlaps."""
    height, width = maps.shape[2:]
    if (height, width) == tuple(size):
        return maps
    xp = namespace(maps)
    rows, columns = _averages(height, size[0]), _averages(width, size[1])
    if xp is not np:
        rows, columns = (xp.as_tensor(part, dtype=maps.dtype, device=maps.device) for part in (rows, columns))
    return xp.einsum("ph,nchw,qw->ncpq", rows, maps, columns)


def _averages(count: int, wanted: int) -> Any:
    """A matrix (wanted, count): row i averages from floor(i count / wanted) to ceil((i + 1) count / wanted)."""
    rows = np.zeros((wanted, count))
    for place in range(wanted):
        start, end = place * count // wanted, -(-(place + 1) * count // wanted)
        rows[place, start:end] = 1 / (end - start)
    return rows


def same_size(student: Any, teacher: Any) -> tuple[Any, Any]:
    """Both maps at the smaller of their two sizes (by height); the larger is averaged."""
    small = min(student.shape[2:], teacher.shape[2:])
    return pooled(student, small), pooled(teacher, small)


def mean_over(values: Any, mask: Any = None) -> Any:
    """Mean of the values, or of those where the mask is true; what is masked adds nothing, not even NaN.

    Args:
        values: shape (N,), (N, L), ...
        mask: of the same shape, true where a value counts; None counts all.

    Raises:
        ShapeError: the mask has another shape.
        DataError: the mask is false everywhere.
    """
    if mask is None:
        return values.mean()
    xp = namespace(values)
    if tuple(mask.shape) != tuple(values.shape):
        raise ShapeError(f"The mask has shape {tuple(mask.shape)}; {tuple(values.shape)} is needed.")
    counts = mask != 0
    number = int(counts.sum())
    if number == 0:
        raise DataError("All targets are masked: there is nothing to learn from.", fix="Look at the mask and labels.")
    return xp.where(counts, values, 0.0 * xp.zeros_like(values)).sum() / number


def blank(array: Any, mask: Any) -> Any:
    """The array with zeros where the mask is false, so that what is masked, even NaN, reaches no value or gradient.

    Args:
        array: shape (N, ...) or (N, L, ...).
        mask: its leading axes; None leaves the array as it is.

    Raises:
        ShapeError: the mask has another shape.
    """
    if mask is None:
        return array
    xp = namespace(array)
    return xp.where(spread(mask, array), array, xp.zeros_like(array))


def same_shape(student: Any, teacher: Any, what: str = "scores") -> None:
    """Raise a ShapeError that names both shapes if they differ."""
    if tuple(student.shape) != tuple(teacher.shape):
        raise ShapeError(
            f"The student's {what} have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}.",
            f"They must be {what} of the same samples"
            + (" for the same classes." if what == "scores" else ", of the same size."),
        )


def weighted_mean(values: Any, weights: Any, mask: Any = None) -> Any:
    """Σ weight · value / Σ weight over what the mask shows; 0 where all weights are 0.

    Args:
        values, weights: of one shape; weights >= 0.
        mask: of the same shape, true where a value counts; None counts all.

    Raises:
        ShapeError: the mask has another shape.
        DataError: the mask is false everywhere.
    """
    return mean_over(weights * values, mask) / mean_over(weights, mask).clip(min=1e-12)


def as_numpy(array: Any) -> Any:
    """The values as an array of numpy, for a decision that takes no gradient."""
    return array if namespace(array) is np else array.detach().cpu().numpy()


def same_samples(student: Any, teacher: Any, what: str = "features") -> None:
    """Raise a ShapeError that names both numbers of samples if they differ."""
    if len(student) != len(teacher):
        raise ShapeError(
            f"The student's {what} are of {len(student)} samples, the teacher's of {len(teacher)}.",
            "They must be of the same samples.",
        )


def check_maps(student: Any, teacher: Any) -> None:
    """Raise a ShapeError unless both are maps (N, C, H, W) of the same samples."""
    for whose, maps in (("student", student), ("teacher", teacher)):
        if len(maps.shape) != len("NCHW"):
            raise ShapeError(
                f"The {whose}'s maps have shape {tuple(maps.shape)}; (N, C, H, W) is needed.",
                fix="Take the output of a convolution, or a loss of features or tokens.",
            )
    same_samples(student, teacher, "maps")


def like(values: Any, array: Any) -> Any:
    """A number, a list or an array as an array of the kind, type and device of another."""
    xp = namespace(array)
    if xp is np:
        return np.asarray(values, dtype=array.dtype)
    return xp.as_tensor(values, dtype=array.dtype, device=array.device)


def log_sum_exp(scores: Any, where: Any = None, axis: int = -1) -> Any:
    """Logarithm of the sum of exponentials along an axis, kept with length 1.

    Args:
        scores: of any size but infinity; minus infinity adds nothing, and alone gives minus infinity.
        where: of the same shape, true for what is summed, at least one along the axis; None sums all.
        axis: the axis.
    """
    xp = namespace(scores)
    if where is not None:  # what is left out must not overflow either: its gradient would be 0 times infinity
        scores = xp.where(where, scores, constant(xp.amin(scores, axis=axis, keepdims=True)))
    top = constant(xp.amax(scores, axis=axis, keepdims=True))
    top = xp.where(top == -math.inf, xp.zeros_like(top), top)
    terms = xp.exp(scores - top)
    if where is not None:
        terms = xp.where(where, terms, xp.zeros_like(terms))
    total = xp.sum(terms, axis=axis, keepdims=True)
    none = total == 0  # the logarithm of 0 would make its gradient of 0 no number
    return top + xp.where(none, -math.inf, xp.log(xp.where(none, xp.ones_like(total), total)))


def taken(rows: Any, columns: Any) -> Any:
    """`rows[..., columns]` along the last axis: shape (..., K) and whole numbers (..., k) give (..., k)."""
    if namespace(rows) is np:
        return np.take_along_axis(rows, np.asarray(columns), axis=-1)
    return rows.gather(-1, columns.long())


def largest(rows: Any, count: int) -> Any:
    """The columns of the largest values of each row, the largest first: shape (..., K) gives (..., count)."""
    if namespace(rows) is np:
        return np.argsort(-rows, axis=-1, kind="stable")[..., :count]
    return rows.topk(count, dim=-1).indices


def marked(columns: Any, like: Any) -> Any:
    """True at the columns (..., k), false elsewhere, of the shape of `like`: (..., K)."""
    if namespace(like) is np:
        marks = np.zeros(like.shape, dtype=bool)
        np.put_along_axis(marks, np.asarray(columns), values=True, axis=-1)
        return marks
    xp = namespace(like)
    return xp.zeros_like(like, dtype=xp.bool).scatter(-1, columns.long(), value=True)


def rows_that_count(scores: Any, mask: Any = None) -> Any:
    """The rows (n, K) of scores (N, K) or (N, L, K) for which the mask (N,) or (N, L) is true; None counts all.

    Raises:
        ShapeError: the mask has another shape.
        DataError: the mask is false everywhere.
    """
    rows = scores.reshape(-1, scores.shape[-1])
    if mask is None:
        return rows
    if tuple(mask.shape) != tuple(scores.shape[:-1]):
        raise ShapeError(f"The mask has shape {tuple(mask.shape)}; {tuple(scores.shape[:-1])} is needed.")
    rows = rows[mask.reshape(-1) != 0]
    if len(rows) == 0:
        raise DataError("All targets are masked: there is nothing to learn from.", fix="Look at the mask and labels.")
    return rows


def classes_last(scores: Any) -> Any:
    """Scores with the classes on the last axis: those of pixels (N, K, H, W) as (N, H, W, K), others as they are."""
    return namespace(scores).moveaxis(scores, 1, -1) if scores.ndim >= len("NKHW") else scores


def typed(array: Any, like: Any) -> Any:
    """The array with the type of numbers of another."""
    return array.astype(like.dtype) if namespace(array) is np else array.to(like.dtype)


def spread(mask: Any, array: Any) -> Any:
    """The mask, true or false, with axes of length 1 for those of the array that it lacks.

    Raises:
        ShapeError: its axes are not the first of the array.
    """
    if tuple(mask.shape) != tuple(array.shape[: mask.ndim]):
        raise ShapeError(f"The mask has shape {tuple(mask.shape)}; {tuple(array.shape[: mask.ndim])} is needed.")
    return (mask != 0).reshape(*mask.shape, *(1,) * (array.ndim - mask.ndim))
