"""The base class and the registry of adapters, and functions that several adapters use."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

ADAPTERS: Registry[Callable[..., nn.Module]] = Registry("adapter")
"""Classes or functions by name. They take the shapes of the student's and of the teacher's value, and options.

The options, defaults and descriptions are those of `kirsch.frameworks.adapters.ADAPTER_OPTIONS` under the same name. An
adapter without such an entry exists only for PyTorch, and its keyword arguments have their own defaults.
"""

META = torch.device("meta").type
"""Device without data, which does not support autocast."""


class Adapter(nn.Module):
    """Converts a value of the student and a value of the teacher so that a loss can compare them.

    The parameters of an adapter are trained and saved with the student, but are not part of the student. `forward`
    returns the pair with which the loss is called. No gradient flows to the teacher's value.

    An adapter is registered under a name, and built from two shapes and its options. An adapter with `stages = True`
    takes lists of shapes and values, one for each stage. Any other adapter is built once for each stage.
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
        """Return the adapter's own loss in the last forward pass, a scalar, or None if it has no loss.

        The loss is returned only once, so that its graph is released after the step.
        """
        return None

    def cast(self, values: Tensor) -> Tensor:
        """Convert values to the dtype of the parameters, unless autocast is on and chooses the dtype."""
        if values.device.type != META and torch.is_autocast_enabled(values.device.type):
            return values
        return values.to(next(self.parameters()).dtype)


def without_autocast(values: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of the values."""
    return nullcontext() if values.device.type == META else torch.autocast(values.device.type, enabled=False)


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
