"""The adapter between a network and its pruned version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import ShapeError, UsageError
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kirsch.frameworks.adapters.shapes import Shape


@ADAPTERS.register("kept")
class KeptChannels(Adapter):
    """The adapter "kept": selects the channels of the teacher that the pruned student has kept.

    Args:
        student, teacher: shapes that differ only in one axis.
        options: see `KeptChannelsOptions`.

    Raises:
        UsageError: `indices` repeats a channel, or contains one that the teacher does not have.
        ShapeError: the number of indices is not the number of channels of the student, or the shapes differ in another
            axis.
    """

    def __init__(self, student: Shape, teacher: Shape, *, indices: Sequence[int], axis: int) -> None:
        super().__init__()
        sizes_s, sizes_t = list(student), list(teacher)
        others_s, others_t = (sizes[:axis] + sizes[axis + 1 :] for sizes in (sizes_s, sizes_t))
        if not 1 <= axis < len(sizes_t) or others_s != others_t:
            raise ShapeError(
                f"The student's value has shape {tuple(sizes_s)}, the teacher's {tuple(sizes_t)}.",
                f"The adapter 'kept' needs shapes that differ only in axis {axis}.",
                "Choose the same layer in both, and the axis of its channels.",
            )
        unknown = [index for index in indices if not 0 <= index < sizes_t[axis]]
        if unknown or len(set(indices)) < len(indices):
            problem = f"channel {unknown[0]}" if unknown else "a channel twice"
            raise UsageError(
                f"The `indices` of 'kept' contain {problem}; the teacher has channels 0 to {sizes_t[axis] - 1}."
            )
        if len(indices) != sizes_s[axis]:
            raise ShapeError(
                f"The student has {sizes_s[axis]} channels, and `indices` has {len(indices)}.",
                "The indices belong to another plan.",
                "Create the objective from this student: kirsch.recovery(student, teacher, inputs).",
            )
        self.axis = axis
        self.indices: Tensor
        # Not persistent: the indices follow from the objective, so no checkpoint or moving average may change them.
        self.register_buffer("indices", torch.tensor(list(indices)), persistent=False)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the student's value, and the teacher's value at the kept channels."""
        return student, teacher.index_select(self.axis, self.indices)
