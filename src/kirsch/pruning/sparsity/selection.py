"""Selection of the smallest scores, in one array or over the arrays of all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

DIGIT = 16
"""Bits of a digit: the threshold over all layers is found from two histograms of 2^16 counts."""

PART = 2**22
"""Number of scores that are sorted or counted together, which limits the memory for temporary arrays."""


def smallest(scores: NDArray[np.floating], count: int) -> NDArray[np.bool_]:
    """Return a mask of the `count` smallest scores, of the shape of the scores."""
    mask = np.zeros(scores.size, bool)
    if count > 0:
        mask[np.argpartition(scores, min(count, scores.size) - 1, axis=None)[:count]] = True
    return mask.reshape(scores.shape)


def smallest_in_rows(scores: NDArray[np.floating], counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return a mask of the `counts[i]` smallest scores of each row i, shape (rows, columns)."""
    mask = np.zeros(scores.shape, bool)
    rows = max(1, PART // max(scores.shape[1], 1))  # the order of a part needs twice the memory of its scores
    for start in range(0, len(scores), rows):
        part = slice(start, start + rows)
        order = np.argsort(scores[part], axis=1, kind="stable")
        np.put_along_axis(mask[part], order, np.arange(scores.shape[1]) < counts[part, None], axis=1)
    return mask


def smallest_of_all(
    sources: Sequence[Callable[[], NDArray[np.float32]]], count: int
) -> Iterable[tuple[int, NDArray[np.bool_]]]:
    """Yield index and mask of each array; together, the masks select the `count` smallest values of all arrays.

    The arrays are computed three times, one after the other, and are never in memory together.

    Args:
        sources: functions that return scores of at least 0, without NaN.
        count: number of values to select. Of equal values, those of the first arrays are selected.
    """
    limit, equal = _threshold(sources, count)
    for index, source in enumerate(sources):
        keys = _keys(source())
        mask = keys < limit
        ties = np.flatnonzero(keys.ravel() == limit)[:equal]
        mask.ravel()[ties] = True
        equal -= len(ties)
        yield index, mask


def _threshold(sources: Sequence[Callable[[], NDArray[np.float32]]], count: int) -> tuple[int, int]:
    """Return the key of the `count`-th smallest value, and how many values with this key are selected."""
    if count <= 0:
        return 0, 0
    limit = 0
    for shift in (DIGIT, 0):  # the first digit of the key, then the second among the keys with this first digit
        histogram = np.zeros(2**DIGIT, np.int64)
        for source in sources:
            whole = _keys(source()).ravel()
            for start in range(0, len(whole), PART):
                keys = whole[start : start + PART]
                if not shift:
                    keys = keys[keys >> DIGIT == limit >> DIGIT]
                histogram += np.bincount(keys >> shift & (2**DIGIT - 1), minlength=2**DIGIT)
        below = np.cumsum(histogram)
        digit = int(np.searchsorted(below, count))
        limit |= digit << shift
        count -= int(below[digit] - histogram[digit])
    return limit, count


def _keys(scores: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return integers with the order of the scores: the bits of a float of at least 0 are in the order of its value."""
    return np.ascontiguousarray(scores + np.float32(0), np.float32).view(np.int32)  # -0 + 0 = 0
