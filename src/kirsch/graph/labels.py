"""Labels on the axes of tensors.

Every index of every axis of every parameter gets an integer of its own, its *label*. A tensor is seen as one array of
labels per axis, or None for an axis that no parameter index sits on (batch, space, time). Label 0 means: cannot go.
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
    """A tensor as the analysis sees it.

    Args:
        shape: sizes of the axes.
        axes: one label array per axis, or None where no parameter index sits. An axis of size 1 carries none.
        points: where its numbers are positions on an axis with labels, these labels: what a choice of the k largest
            along the axis puts out.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    points: Axis = None

    @classmethod
    def of(cls, shape: Sequence[int], axes: Sequence[Axis] | None = None) -> Tensor:
        """A tensor with these labels (without any, if none are given); axes of size 1 lose theirs."""
        sizes = tuple(int(size) for size in shape)
        given = axes if axes is not None else [None] * len(sizes)
        kept = tuple(None if size == 1 else axis for size, axis in zip(sizes, given, strict=True))
        for size, axis in zip(sizes, kept, strict=True):
            if axis is not None and len(axis) != size:
                raise ValueError(f"{len(axis)} labels on an axis of size {size}")
        return cls(sizes, kept)
