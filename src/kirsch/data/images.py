"""Fixes for images whose axes or values a model does not accept."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NCHW = 4
COLORS = (1, 3, 4)
"""Numbers of channels of images."""

AXES = (0, 3, 1, 2)
"""Axes of images with channels last, (N, H, W, C), in the order (N, C, H, W)."""

SCALE = (
    "Give floating-point inputs, scaled as in the training of the model, for example "
    "inputs.astype(numpy.float32) / 255 for arrays, inputs.float() / 255 for tensors."
)
"""Fix for images of type uint8."""


def has_channels_last(shape: Sequence[int]) -> bool:
    """Return whether a shape is that of images with channels last and not first."""
    return len(shape) == NCHW and shape[-1] in COLORS and shape[1] not in COLORS


def order_fix(*, uint8: bool) -> str:
    """Return the fix for images with channels last; `uint8` adds the conversion to floating-point numbers."""
    if not uint8:
        return f"Give inputs.transpose{AXES} for arrays, inputs.permute{AXES} for tensors."
    return (
        f"Give inputs.transpose{AXES}.astype(numpy.float32) / 255 for arrays, inputs.permute{AXES}.float() / 255 for "
        "tensors, or scaled as in the training of the model."
    )
