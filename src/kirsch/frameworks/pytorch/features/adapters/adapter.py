"""The base class and the registry of adapters, and functions that several adapters use."""

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
"""Shape of one value, with the batch first, such as a torch.Size."""

ADAPTERS: Registry[Callable[..., nn.Module]] = Registry("adapter")
"""Classes or functions by name; they take the shape of the student's value, that of the teacher's, and options."""

META = torch.device("meta").type
"""Device without data, which does not support autocast."""


class Adapter(nn.Module):
    """Converts a value of the student and a value of the teacher so that a loss can compare them.

    The parameters of an adapter are trained and saved with the student, but are not part of it. `forward` returns the
    pair with which the loss is called. No gradient flows to the teacher's value.

    An adapter is registered under a name, and built from two shapes and its options. An adapter with `stages = True`
    takes lists of shapes and values, one for each stage. Of any other adapter, one is built for each stage.
    """

    stages: ClassVar[bool] = False

    def forward(self, student: Any, teacher: Any, *, ids: Any = None) -> tuple[Any, Any]:
        """Return both values for the loss.

        Args:
            student, teacher: captured values of one batch.
            ids: ids of the samples, shape (N,), integers; most adapters do not use them.
        """
        raise NotImplementedError

    def extra_loss(self) -> Tensor | None:
        """Return the adapter's own loss for the last forward, a scalar, or None if it has none.

        The loss is returned only once, so that its graph is released after the step.
        """
        return None

    def cast(self, values: Tensor) -> Tensor:
        """Convert values to the type of the parameters, unless autocast is on, which chooses the type itself."""
        if values.device.type != META and torch.is_autocast_enabled(values.device.type):
            return values
        return values.to(next(self.parameters()).dtype)


def without_autocast(values: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of the values."""
    return nullcontext() if values.device.type == META else torch.autocast(values.device.type, enabled=False)


def map_size(shape: Shape, role: str, adapter: str) -> tuple[int, int, int]:
    """Return channels, height and width of feature maps (N, C, H, W).

    Raises:
        ShapeError: the shape has another number of axes.
    """
    _check_rank(shape, "NCHW", role, adapter)
    return shape[1], shape[2], shape[3]


def token_size(shape: Shape, role: str, adapter: str) -> tuple[int, int]:
    """Return length and width of tokens (N, L, D).

    Raises:
        ShapeError: the shape has another number of axes.
    """
    _check_rank(shape, "NLD", role, adapter)
    return shape[1], shape[2]


def _check_rank(shape: Shape, axes: str, role: str, adapter: str) -> None:
    if len(shape) != len(axes):
        raise ShapeError(
            f"The {role}'s value has shape {tuple(shape)}; ({', '.join(axes)}) is needed.",
            f"The adapter {adapter!r} takes only values of this kind.",
            "Choose another adapter, or another layer.",
        )


SPATIAL = ("pool", "interpolate")


def check_spatial(spatial: str) -> None:
    """Raise a UsageError if the option `spatial` is unknown."""
    if spatial not in SPATIAL:
        raise UsageError(f"The option 'spatial' is {spatial!r}.", fix="Use 'pool' or 'interpolate'.")


def match_sizes(student: Tensor, teacher: Tensor, spatial: str = "pool") -> tuple[Tensor, Tensor]:
    """Return both maps at the same height and width.

    Args:
        student, teacher: shape (N, C, H, W).
        spatial: "pool" averages the larger map, separately for height and width; "interpolate" resizes the student's
            map to the size of the teacher's by bilinear interpolation.
    """
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if spatial == "interpolate":
        return functional.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False), teacher
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return functional.adaptive_avg_pool2d(student, size), functional.adaptive_avg_pool2d(teacher, size)
