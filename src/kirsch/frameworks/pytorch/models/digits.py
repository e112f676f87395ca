"""The two small networks of the built-in digits recipe: 8 x 8 images, ten classes."""

from __future__ import annotations

import torch
from torch import nn

from kirsch.frameworks.pytorch.models.registry import MODELS


class ConvBlock(nn.Module):
    """Two convolutions and a shortcut.

    Args:
        width_in, width_out: channels.
        stride: stride of the first convolution; the shortcut is a 1 x 1 convolution if the shape changes.
    """

    def __init__(self, width_in: int, width_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network for digits.

    Args:
        widths: channels of the stages; each stage after the first halves the image.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        stages = zip((widths[0], *widths), widths, range(len(widths)), strict=False)
        self.stages = nn.Sequential(*(ConvBlock(before, after, 2 if number else 1) for before, after, number in stages))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, 8, 8) → (N, 10)."""
        x = self.stages(self.stem(x))  # (N, C, 2, 2)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


@MODELS.register("digits:teacher")
def teacher() -> nn.Module:
    """Return the teacher: 10.7 M MACs and 885 k parameters."""
    return DigitsNet((64, 128, 192))


@MODELS.register("digits:student")
def student() -> nn.Module:
    """Return the student, a quarter of the teacher: 2.69 M MACs and 223 k parameters."""
    return DigitsNet((32, 64, 96))
