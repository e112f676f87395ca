"""The adapter of ReviewKD, which fuses each stage of the student with the deeper stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from kirsch.frameworks.adapters.shapes import Shape, map_size
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MAX_HIDDEN = 512
"""Upper limit of the number of channels passed from stage to stage."""


@ADAPTERS.register("review")
class Review(Adapter):
    """The adapter "review": fuses the stages of the student from the deepest to the first.

    Args:
        student, teacher: shapes (N, C, H, W), one for each stage, the first stage first.
        options: see `ReviewOptions`.

    Raises:
        ShapeError: a stage is not (N, C, H, W).
    """

    def __init__(self, student: Sequence[Shape], teacher: Sequence[Shape], *, hidden: int | None) -> None:
        super().__init__()
        channels_s = [map_size(shape, "student", "review")[0] for shape in student]
        channels_t = [map_size(shape, "teacher", "review")[0] for shape in teacher]
        hidden = hidden or min(MAX_HIDDEN, channels_s[-1])
        self.fusions = nn.ModuleList(
            Fusion(width_s, hidden, width_t, deepest=number == len(channels_s) - 1)
            for number, (width_s, width_t) in enumerate(zip(channels_s, channels_t, strict=True))
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, ids: Any = None) -> tuple[Any, Any]:
        """Return the fused maps and the teacher's maps of each stage, the first stage first."""
        fused: list[Tensor] = []
        deeper: Tensor | None = None
        for fusion, maps_s, maps_t in zip(reversed(self.fusions), reversed(student), reversed(teacher), strict=True):
            output, deeper = fusion(self.cast(maps_s), deeper, maps_t.shape[2:])
            fused.insert(0, output)
        return fused, list(teacher)


class Fusion(nn.Module):
    """Attention-based fusion of one stage with the maps passed on by the deeper stage.

    Args:
        channels: channels of the student's maps.
        hidden: channels of the maps passed from stage to stage.
        out_channels: channels of the teacher's maps.
        deepest: whether this is the deepest stage.
    """

    def __init__(self, channels: int, hidden: int, out_channels: int, *, deepest: bool) -> None:
        super().__init__()
        enter = nn.Conv2d(channels, hidden, 1, bias=False)
        leave = nn.Conv2d(hidden, out_channels, 3, padding=1, bias=False)
        for layer in (enter, leave):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        self.enter = nn.Sequential(enter, nn.BatchNorm2d(hidden))
        self.leave = nn.Sequential(leave, nn.BatchNorm2d(out_channels))
        self.attend = None if deepest else nn.Conv2d(2 * hidden, 2, 1)

    def forward(self, maps: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return maps (N, out_channels, *size), and the maps to pass on, (N, hidden, *size)."""
        mixed = self.enter(maps)
        if self.attend is not None and deeper is not None:
            deeper = functional.interpolate(deeper, mixed.shape[2:], mode="nearest")
            weights = torch.sigmoid(
                self.attend(torch.cat([mixed, deeper], 1))
            )  # (N, 2, H, W); the two weights do not add up to 1
            mixed = mixed * weights[:, :1] + deeper * weights[:, 1:]
        if mixed.shape[2:] != tuple(size):
            mixed = functional.interpolate(mixed, tuple(size), mode="nearest")
        return self.leave(mixed), mixed
