"""The adapter of ReviewKD: each stage of the student is told what the deeper ones know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter, Shape, map_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MOST_HIDDEN = 512
"""Channels of what is handed from stage to stage, at most."""


@ADAPTERS.register("review")
class Review(Adapter):
    """Fuses the stages of the student from the deepest to the first, and gives of each a map like the teacher's.

    Both lists it gives are of maps; a loss of maps ("hcl" in the paper) is taken for each stage, and summed.

    Args:
        student, teacher: shapes (N, C, H, W), one for each stage, the first stage first.
        hidden: channels of what is handed on; those of the student's last stage, at most 512, if left out.

    Raises:
        ShapeError: a stage has no map.

    Source: Chen et al. 2021, arXiv:2104.09044, and the authors' code.
    """

    stages: ClassVar[bool] = True

    def __init__(self, student: Sequence[Shape], teacher: Sequence[Shape], *, hidden: int | None = None) -> None:
        super().__init__()
        own = [map_of(shape, "student", "review")[0] for shape in student]
        its = [map_of(shape, "teacher", "review")[0] for shape in teacher]
        hidden = hidden or min(MOST_HIDDEN, own[-1])
        self.fusions = nn.ModuleList(
            Fusion(channels, hidden, wanted, deepest=number == len(own) - 1)
            for number, (channels, wanted) in enumerate(zip(own, its, strict=True))
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, ids: Any = None) -> tuple[Any, Any]:
        """Fused maps and the teacher's, one of each a stage, the first stage first."""
        fused: list[Tensor] = []
        deeper: Tensor | None = None
        for fusion, own, its in zip(reversed(self.fusions), reversed(student), reversed(teacher), strict=True):
            made, deeper = fusion(self.taken(own), deeper, its.shape[2:])
            fused.insert(0, made)
        return fused, list(teacher)


class Fusion(nn.Module):
    """Attention-based fusion of one stage with what came from the deeper ones.

    Args:
        channels: of the student's map.
        hidden: of what is handed on.
        wanted: of the teacher's map.
        deepest: nothing comes from below.
    """

    def __init__(self, channels: int, hidden: int, wanted: int, *, deepest: bool) -> None:
        super().__init__()
        enter = nn.Conv2d(channels, hidden, 1, bias=False)
        leave = nn.Conv2d(hidden, wanted, 3, padding=1, bias=False)
        for layer in (enter, leave):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        self.enter = nn.Sequential(enter, nn.BatchNorm2d(hidden))
        self.leave = nn.Sequential(leave, nn.BatchNorm2d(wanted))
        self.attend = None if deepest else nn.Conv2d(2 * hidden, 2, 1)

    def forward(self, own: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A map (N, wanted, *size), and what is handed on."""
        mixed = self.enter(own)
        if self.attend is not None and deeper is not None:
            deeper = functional.interpolate(deeper, mixed.shape[2:], mode="nearest")
            shares = torch.sigmoid(self.attend(torch.cat([mixed, deeper], 1)))  # (N, 2, H, W): each for itself
            mixed = mixed * shares[:, :1] + deeper * shares[:, 1:]
        if mixed.shape[2:] != tuple(size):
            mixed = functional.interpolate(mixed, tuple(size), mode="nearest")
        return self.leave(mixed), mixed
