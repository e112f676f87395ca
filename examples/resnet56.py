"""ResNet-56 for CIFAR-10 (He et al. 2015, arXiv:1512.03385, section 4.2), with public weights.

The weights are those of github.com/akamaster/pytorch_resnet_cifar10 (BSD-2), read from
`$KIRSCH_DATA/resnet56-cifar10/`. Shortcuts where shapes change are the paper's option A: every second pixel, and zeros
for the new channels.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import nn


class PadShortcut(nn.Module):
    """Shortcut that keeps every second pixel, and adds channels of zeros before and after the others.

    The two numbers of channels are attributes, so that pruning can update them.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut without parameters."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        new = width_out - width_in
        self.shortcut = PadShortcut(new // 2, new - new // 2) if new else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet56(nn.Module):
    """ResNet-56: three stages of nine blocks, by default with 16, 32 and 64 channels."""

    def __init__(self, classes: int = 10, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = self._stage(first, first, 1)
        self.layer2 = self._stage(first, second, 2)
        self.layer3 = self._stage(second, third, 2)
        self.linear = nn.Linear(third, classes)

    @staticmethod
    def _stage(width_in: int, width_out: int, stride: int) -> nn.Sequential:
        first = BasicBlock(width_in, width_out, stride)
        return nn.Sequential(first, *(BasicBlock(width_out, width_out, 1) for _ in range(8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))  # (N, 16, 32, 32)
        out = self.layer3(self.layer2(self.layer1(out)))  # (N, 64, 8, 8)
        return self.linear(out.mean((2, 3)))


def resnet56() -> nn.Module:
    """Return the network with its public weights, in inference mode."""
    folder = Path(os.environ.get("KIRSCH_DATA", "../shared/data")) / "resnet56-cifar10"
    files = sorted(folder.glob("*.th"))
    if not files:
        raise FileNotFoundError(f"no weights in {folder}: set KIRSCH_DATA to a folder that holds resnet56-cifar10/*.th")
    # The file is a pickle of tensors: weights_only rejects executable content.
    stored = torch.load(files[0], map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet56()
    wanted = set(model.state_dict())
    weights = {name.removeprefix("module."): value for name, value in stored.items()}
    missing = wanted - set(weights) - {name for name in wanted if name.endswith("num_batches_tracked")}
    unknown = set(weights) - wanted
    if missing or unknown:
        raise ValueError(f"the weights do not fit: missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}")
    model.load_state_dict(weights, strict=False)
    return model.eval()
