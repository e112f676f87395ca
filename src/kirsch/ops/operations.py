"""Array operations with the names of `keras.ops`. Each calls the function of the same name for the array's library.

Unless stated otherwise, an operation is defined as in numpy, and works elementwise. An `axis` is an integer; the
reductions `sum`, `mean`, `amax` and `amin` also take a tuple of integers, or None for all axes. The operators (`+`,
`@`, `<`, `&`, indexing, ...) and `x.shape` work on all arrays, and need no function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch.ops.implementation import implementation_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    AxisNumbers = int | tuple[int, ...] | None


# ------------------------------------------------------------------------------------------------ elements


def abs(x: Any) -> Any:
    """Return the absolute values."""
    return implementation_of(x).abs(x)


def clip(x: Any, x_min: float | None = None, x_max: float | None = None) -> Any:
    """Return the values limited to `x_min` from below and to `x_max` from above; None sets no limit."""
    return implementation_of(x).clip(x, x_min, x_max)


def exp(x: Any) -> Any:
    """Return the exponential function."""
    return implementation_of(x).exp(x)


def isfinite(x: Any) -> Any:
    """Return True where a value is neither NaN nor infinite."""
    return implementation_of(x).isfinite(x)


def log(x: Any) -> Any:
    """Return the natural logarithm."""
    return implementation_of(x).log(x)


def logaddexp(x1: Any, x2: Any) -> Any:
    """Return log(exp(x1) + exp(x2)), without overflow."""
    return implementation_of(x1).logaddexp(x1, x2)


def maximum(x1: Any, x2: Any) -> Any:
    """Return the larger of two arrays at each element."""
    return implementation_of(x1).maximum(x1, x2)


def minimum(x1: Any, x2: Any) -> Any:
    """Return the smaller of two arrays at each element."""
    return implementation_of(x1).minimum(x1, x2)


def sign(x: Any) -> Any:
    """Return -1 for negative values, 0 for 0, and 1 for positive values."""
    return implementation_of(x).sign(x)


def sqrt(x: Any) -> Any:
    """Return the square root. Its gradient at 0 is infinite; that of `safe_sqrt` is 0."""
    return implementation_of(x).sqrt(x)


def where(condition: Any, x1: Any, x2: Any) -> Any:
    """Return `x1` where the condition is true, else `x2`; both may be numbers. Both are computed everywhere."""
    return implementation_of(condition).where(condition, x1, x2)


# ------------------------------------------------------------------------------------------------ reductions


def sum(x: Any, axis: AxisNumbers = None, *, keepdims: bool = False) -> Any:
    """Return the sum along one or more axes."""
    return implementation_of(x).sum(x, axis, keepdims=keepdims)


def mean(x: Any, axis: AxisNumbers = None, *, keepdims: bool = False) -> Any:
    """Return the mean along one or more axes."""
    return implementation_of(x).mean(x, axis, keepdims=keepdims)


def amax(x: Any, axis: AxisNumbers = None, *, keepdims: bool = False) -> Any:
    """Return the largest value along one or more axes."""
    return implementation_of(x).amax(x, axis, keepdims=keepdims)


def amin(x: Any, axis: AxisNumbers = None, *, keepdims: bool = False) -> Any:
    """Return the smallest value along one or more axes."""
    return implementation_of(x).amin(x, axis, keepdims=keepdims)


def any(x: Any, axis: int | None = None) -> Any:
    """Return whether any value is true, along an axis or in the array."""
    return implementation_of(x).any(x, axis)


def all(x: Any, axis: int | None = None) -> Any:
    """Return whether all values are true, along an axis or in the array."""
    return implementation_of(x).all(x, axis)


def count_nonzero(x: Any, axis: int | None = None) -> Any:
    """Return the number of values that are not 0, as integers."""
    return implementation_of(x).count_nonzero(x, axis)


def argmax(x: Any, axis: int = -1) -> Any:
    """Return the index of the largest value along an axis."""
    return implementation_of(x).argmax(x, axis)


def segment_max(x: Any, segment_ids: Any, num_segments: int) -> Any:
    """Return the largest value of each segment of an array (N,); `segment_ids` are integers (N,) in any order."""
    return implementation_of(x).segment_max(x, segment_ids, num_segments)


def segment_sum(x: Any, segment_ids: Any, num_segments: int) -> Any:
    """Return the sum of each segment of an array (N,), 0 for an empty one; `segment_ids` are integers (N,)."""
    return implementation_of(x).segment_sum(x, segment_ids, num_segments)


# ------------------------------------------------------------------------------------------------ shapes


def broadcast_to(x: Any, shape: tuple[int, ...]) -> Any:
    """Return the array repeated along new axes and axes of length 1."""
    return implementation_of(x).broadcast_to(x, shape)


def concatenate(arrays: Sequence[Any], axis: int = 0) -> Any:
    """Join arrays along an existing axis."""
    return implementation_of(arrays[0]).concatenate(arrays, axis)


def moveaxis(x: Any, source: int, destination: int) -> Any:
    """Move an axis to another position; the order of the other axes stays."""
    return implementation_of(x).moveaxis(x, source, destination)


def reshape(x: Any, shape: tuple[int, ...]) -> Any:
    """Return the values, in row-major order, with another shape; one length may be -1."""
    return implementation_of(x).reshape(x, shape)


def stack(arrays: Sequence[Any], axis: int = 0) -> Any:
    """Join arrays along a new axis."""
    return implementation_of(arrays[0]).stack(arrays, axis)


def swapaxes(x: Any, axis1: int, axis2: int) -> Any:
    """Exchange two axes."""
    return implementation_of(x).swapaxes(x, axis1, axis2)


# ------------------------------------------------------------------------------------------------ selection, order


def argsort(x: Any, axis: int = -1) -> Any:
    """Return the indices that sort the values along an axis in ascending order."""
    return implementation_of(x).argsort(x, axis)


def sort(x: Any, axis: int = -1) -> Any:
    """Return the values in ascending order along an axis."""
    return implementation_of(x).sort(x, axis)


def take_along_axis(x: Any, indices: Any, axis: int = -1) -> Any:
    """Return the values at integer indices along an axis; all other axes broadcast."""
    return implementation_of(x).take_along_axis(x, indices, axis)


def top_k(x: Any, k: int) -> tuple[Any, Any]:
    """Return the k largest values along the last axis, the largest first, and their indices."""
    values, indices = implementation_of(x).top_k(x, k)
    return values, indices


# ------------------------------------------------------------------------------------------------ linear algebra


def diagonal(x: Any) -> Any:
    """Return the diagonal of a matrix (N, N), shape (N,)."""
    return implementation_of(x).diagonal(x)


def einsum(subscripts: str, *operands: Any) -> Any:
    """Return the sum of products that the subscripts describe."""
    return implementation_of(operands[0]).einsum(subscripts, *operands)


def matmul(x1: Any, x2: Any) -> Any:
    """Return the matrix product of the last two axes, as the operator `@` does."""
    return implementation_of(x1).matmul(x1, x2)


def svd(x: Any) -> tuple[Any, Any, Any]:
    """Return the reduced singular value decomposition U, S, Vᴴ of matrices (..., M, N)."""
    u, s, vh = implementation_of(x).svd(x)
    return u, s, vh


# ------------------------------------------------------------------------------------------------ creation


def convert_to_tensor(values: Any, *, like: Any) -> Any:
    """Convert a number, a list or a numpy array to an array of the library, type and device of `like`."""
    return implementation_of(like).convert_to_tensor(values, like)


def convert_to_numpy(x: Any) -> Any:
    """Return the values as a numpy array, without gradient; a numpy array is returned unchanged, not copied."""
    return implementation_of(x).convert_to_numpy(x)


def multi_hot(indices: Any, num_classes: int, dtype: str) -> Any:
    """Return an array with 1 at each of several indices and 0 elsewhere: integers (..., k) give (..., num_classes)."""
    return implementation_of(indices).multi_hot(indices, num_classes, dtype=dtype)


def one_hot(indices: Any, num_classes: int, dtype: str) -> Any:
    """Return an array with 1 at the indices and 0 elsewhere: integers (...) give (..., num_classes)."""
    return implementation_of(indices).one_hot(indices, num_classes, dtype=dtype)


def ones_like(x: Any) -> Any:
    """Return ones with the shape and type of an array."""
    return implementation_of(x).ones_like(x)


def zeros_like(x: Any) -> Any:
    """Return zeros with the shape and type of an array."""
    return implementation_of(x).zeros_like(x)


# ------------------------------------------------------------------------------------------------ types, gradients


def cast(x: Any, dtype: str) -> Any:
    """Convert to another type, such as "float32" or "int64"."""
    return implementation_of(x).cast(x, dtype)


def dtype(x: Any) -> str:
    """Return the name of the type, such as "float32", "bfloat16", "int64" or "bool"."""
    return str(implementation_of(x).dtype(x))


def widest_float(x: Any) -> str:
    """Return "float64", or the name of the array's own type on a device without 64-bit floating point."""
    return str(implementation_of(x).widest_float(x))


def channel_axis(x: Any) -> int:
    """Return the axis of the channels of maps and pixels by the convention of the library: 1, or -1 for the last."""
    return int(implementation_of(x).CHANNEL_AXIS)


def is_traced(x: Any) -> bool:
    """Return whether the array has no values yet, because a compiler traces the function that uses it."""
    return bool(implementation_of(x).is_traced(x))


def stop_gradient(x: Any) -> Any:
    """Return an array without gradient."""
    return implementation_of(x).stop_gradient(x)


def without_autocast(x: Any) -> AbstractContextManager[Any]:
    """Return a context that switches automatic casting to 16 bits off for the library and device of an array."""
    context: AbstractContextManager[Any] = implementation_of(x).without_autocast(x)
    return context
