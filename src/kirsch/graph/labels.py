"""Labels on the axes of tensors.

Each index of each axis of each parameter gets a unique integer, its *label*. A tensor has one array of labels per axis,
or None for an axis without parameter indices (batch, space, time). An index with label 0 cannot be removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

Labels = NDArray[np.int64]
Axis = Labels | None


@dataclass(frozen=True)
class Tensor:
    """Shape of a tensor and labels of its axes.

    Args:
        shape: sizes of the axes.
        axes: one label array per axis, or None for an axis without labels. An axis of size 1 has no labels.
        points: for a tensor of indices, such as the indices of a top-k, the labels of the axis that they refer to. None
            for other tensors.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    points: Axis = None

    @classmethod
    def of(cls, shape: Sequence[int], axes: Sequence[Axis] | None = None) -> Tensor:
        """Return a tensor with these labels, or without labels if `axes` is None; labels of axes of size 1 are dropped.

        Raises:
            ValueError: the number of labels differs from the size of the axis.
        """
        sizes = tuple(int(size) for size in shape)
        labels = axes if axes is not None else [None] * len(sizes)
        labels = tuple(None if size == 1 else axis for size, axis in zip(sizes, labels, strict=True))
        for size, axis in zip(sizes, labels, strict=True):
            if axis is not None and len(axis) != size:
                raise ValueError(f"{len(axis)} labels on an axis of size {size}")
        return cls(sizes, labels)
