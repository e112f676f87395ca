"""The few array operations that losses need, the same for numpy, PyTorch and what follows.

PyTorch takes numpy's keywords `axis` and `keepdims`, so that one line of a formula serves both.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from kirsch.errors import ShapeError, UsageError


def namespace(array: Any) -> Any:
    """The module whose functions take this array.

    Raises:
        UsageError: the array is of no known kind.
    """
    if isinstance(array, np.ndarray):
        return np
    root = type(array).__module__.partition(".")[0]
    if root == "torch":
        return sys.modules["torch"]
    raise UsageError(
        f"A {type(array).__qualname__} is no array that losses know.", mend="Give numpy arrays or tensors."
    )


def constant(array: Any) -> Any:
    """The array without a way for gradients back."""
    return array.detach() if hasattr(array, "detach") else array


def log_softmax(scores: Any) -> Any:
    """Logarithm of the softmax over the last axis; finite for scores of any finite size."""
    xp = namespace(scores)
    shifted = scores - constant(xp.amax(scores, axis=-1, keepdims=True))
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def pick(rows: Any, columns: Any) -> Any:
    """`rows[i, columns[i]]` for each i: shape (N, K) and whole numbers (N,) give (N,)."""
    xp = namespace(rows)
    if xp is np:
        return rows[np.arange(len(rows)), columns]
    return rows.gather(1, columns.long()[:, None])[:, 0]


def same_shape(student: Any, teacher: Any) -> None:
    """Raise a ShapeError that names both shapes if they differ."""
    if tuple(student.shape) != tuple(teacher.shape):
        raise ShapeError(
            f"The student's scores have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}.",
            "They must be scores of the same samples for the same classes.",
        )
