"""The adapter between a network and what pruning left of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import ShapeError, UsageError
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter, Shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@ADAPTERS.register("kept")
class KeptChannels(Adapter):
    """Takes those channels of the teacher that the student has kept; it has nothing to learn.

    Args:
        student, teacher: shapes that differ in one axis alone.
        indices: of the teacher's channels, in the order in which the student has them.
        axis: of the channels, with the batch first.

    Raises:
        UsageError: no channels are named, or one twice, or one that the teacher has not.
        ShapeError: the student has another number of channels, or the shapes differ otherwise.
    """

    def __init__(self, student: Shape, teacher: Shape, *, indices: Sequence[int] | None = None, axis: int = 1) -> None:
        super().__init__()
        if not indices:
            raise UsageError(
                "The adapter 'kept' is not told which channels are kept.",
                fix='Take the terms of kirsch.recovery, or say adapter_options={"indices": [0, 2, 5]}.',
            )
        own, its = list(student), list(teacher)
        if not 1 <= axis < len(its) or own[:axis] + own[axis + 1 :] != its[:axis] + its[axis + 1 :]:
            raise ShapeError(
                f"The student's value has shape {tuple(own)}, the teacher's {tuple(its)}.",
                f"The adapter 'kept' takes shapes that differ in axis {axis} alone.",
                "Name the same place of both, and the axis of its channels.",
            )
        wrong = [index for index in indices if not 0 <= index < its[axis]]
        if wrong or len(set(indices)) < len(indices):
            what = f"channel {wrong[0]}" if wrong else "a channel twice"
            raise UsageError(
                f"The adapter 'kept' is told {what}; the teacher has channels 0 to {its[axis] - 1}, each once."
            )
        if len(indices) != own[axis]:
            raise ShapeError(
                f"The student has {own[axis]} channels, and {len(indices)} are named as kept.",
                "The indices are of another plan.",
                "Make the objective from this student: kirsch.recovery(student, teacher, inputs).",
            )
        self.axis = axis
        self.indices: Tensor
        # Not of its state: it follows from the objective, and no moving average or checkpoint is to change it.
        self.register_buffer("indices", torch.tensor(list(indices)), persistent=False)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """The student's value, and the teacher's at the kept channels."""
        return student, teacher.index_select(self.axis, self.indices)
