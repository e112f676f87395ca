"""What an adapter is, how it gets its name, and what most of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from kirsch.errors import ShapeError, UsageError
from kirsch.registry import Registry

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

Shape: TypeAlias = Sequence[int]
"""Of one value, with the batch first: a torch.Size."""

ADAPTERS: Registry[Callable[..., nn.Module]] = Registry("adapter")
"""Name → class, or function, of (shape of the student's value, shape of the teacher's, options as keywords)."""

META = torch.device("meta").type
"""A device of shapes alone, which knows no autocast."""


class Adapter(nn.Module):
    """Brings a student's value and a teacher's to where a loss can compare them.

    Its parameters are trained and saved with the student, and are no part of it. `forward` gives the pair that the loss
    is called with; nothing in it reaches back into the teacher's value.

    An adapter is registered under a name, and built from two shapes and its options. One that says `stages = True`
    takes lists, of one shape and one value for each stage; of the others, one is built for each stage.
    """

    stages: ClassVar[bool] = False

    def forward(self, student: Any, teacher: Any, *, ids: Any = None) -> tuple[Any, Any]:
        """Both values as the loss takes them.

        Args:
            student, teacher: what was captured of both for one batch.
            ids: which samples the batch is of, shape (N,), whole numbers; most adapters need none.
        """
        raise NotImplementedError

    def extra_loss(self) -> Tensor | None:
        """What the adapter itself is to be charged for after the last forward, a scalar; None if it is not.

        It is given once, so that no graph outlives its step.
        """
        return None

    def taken(self, values: Tensor) -> Tensor:
        """Values in the type of the parameters, unless autocast is on, which chooses the type itself."""
        if values.device.type != META and torch.is_autocast_enabled(values.device.type):
            return values
        return values.to(next(self.parameters()).dtype)


def in_full(values: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on the device of these values."""
    return nullcontext() if values.device.type == META else torch.autocast(values.device.type, enabled=False)


def map_of(shape: Shape, whose: str, adapter: str) -> tuple[int, int, int]:
    """Channels, height and width of a map (N, C, H, W).

    Raises:
        ShapeError: it is the shape of something else.
    """
    _check_rank(shape, "NCHW", whose, adapter)
    return shape[1], shape[2], shape[3]


def tokens_of(shape: Shape, whose: str, adapter: str) -> tuple[int, int]:
    """Length and width of tokens (N, L, D).

    Raises:
        ShapeError: it is the shape of something else.
    """
    _check_rank(shape, "NLD", whose, adapter)
    return shape[1], shape[2]


def _check_rank(shape: Shape, axes: str, whose: str, adapter: str) -> None:
    if len(shape) != len(axes):
        raise ShapeError(
            f"The {whose}'s value has shape {tuple(shape)}; ({', '.join(axes)}) is needed.",
            f"The adapter {adapter!r} takes nothing else.",
            "Choose another adapter, or another layer.",
        )


SPATIAL = ("pool", "interpolate")


def check_spatial(spatial: str) -> None:
    """Raise a UsageError unless this is a way to bring maps to one size."""
    if spatial not in SPATIAL:
        raise UsageError(
            f"The option 'spatial' is {spatial!r}.", "Maps of two sizes are joined by 'pool' or 'interpolate'."
        )


def leveled(student: Tensor, teacher: Tensor, spatial: str = "pool") -> tuple[Tensor, Tensor]:
    """Both maps at one height and width.

    Args:
        student, teacher: shape (N, C, H, W).
        spatial: "pool" averages whichever is larger, for height and width apart; "interpolate" brings the student's
            map to the size of the teacher's, bilinearly.
    """
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if spatial == "interpolate":
        return functional.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False), teacher
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return functional.adaptive_avg_pool2d(student, size), functional.adaptive_avg_pool2d(teacher, size)
