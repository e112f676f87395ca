"""Array operations for numpy; see `kirsch.ops.operations` for what each function returns."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import (  # noqa: F401 - these have the names and arguments of the operations
    abs,
    all,
    amax,
    amin,
    any,
    argmax,
    argsort,
    broadcast_to,
    concatenate,
    count_nonzero,
    diagonal,
    einsum,
    exp,
    isfinite,
    log,
    logaddexp,
    matmul,
    maximum,
    mean,
    minimum,
    moveaxis,
    ones_like,
    reshape,
    sign,
    sort,
    sqrt,
    stack,
    sum,
    swapaxes,
    where,
    zeros_like,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

CHANNEL_AXIS = 1


def clip(x: Any, x_min: float | None = None, x_max: float | None = None) -> Any:
    return np.clip(x, x_min, x_max)


def svd(x: Any) -> tuple[Any, Any, Any]:
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    return u, s, vh


def take_along_axis(x: Any, indices: Any, axis: int = -1) -> Any:
    return np.take_along_axis(x, np.asarray(indices), axis=axis)


def segment_max(x: Any, segment_ids: Any, num_segments: int) -> Any:
    largest = np.full(num_segments, -np.inf, x.dtype)
    np.maximum.at(largest, segment_ids, x)
    return largest


def segment_sum(x: Any, segment_ids: Any, num_segments: int) -> Any:
    total = np.zeros(num_segments, x.dtype)
    np.add.at(total, segment_ids, x)
    return total


def top_k(x: Any, k: int) -> tuple[Any, Any]:
    indices = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(x, indices, axis=-1), indices


def one_hot(indices: Any, num_classes: int, dtype: str) -> Any:
    return (np.asarray(indices)[..., None] == np.arange(num_classes)).astype(dtype)


def multi_hot(indices: Any, num_classes: int, dtype: str) -> Any:
    hot = np.zeros((*indices.shape[:-1], num_classes), dtype=dtype)
    np.put_along_axis(hot, indices, values=1, axis=-1)
    return hot


def convert_to_tensor(values: Any, like: Any) -> Any:
    return np.asarray(values, dtype=like.dtype)


def convert_to_numpy(x: Any) -> Any:
    return x


def dtype(x: Any) -> str:
    return str(x.dtype.name)


def cast(x: Any, dtype: str) -> Any:
    return x if x.dtype.name == dtype else x.astype(dtype)


def widest_float(x: Any) -> str:  # noqa: ARG001 - all devices of numpy have 64 bits
    return "float64"


def stop_gradient(x: Any) -> Any:
    return x


def is_traced(x: Any) -> bool:  # noqa: ARG001 - numpy computes at once
    return False


def without_autocast(x: Any) -> AbstractContextManager[Any]:  # noqa: ARG001 - numpy has no autocast
    return nullcontext()
