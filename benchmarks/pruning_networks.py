"""Networks, images and training that benchmarks/pruning.py compares methods on."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from kirsch.data.sources.cifar10 import cifar10
from kirsch.distillation.losses.logits import soft_target
from kirsch.frameworks.find import framework_of

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]

from resnet56 import PadShortcut, ResNet56, resnet56  # noqa: E402 - the example's own network
from resnet_to_mobilenet import mobilenet  # noqa: E402 - the example's own network

if TYPE_CHECKING:
    from collections.abc import Callable

CALIBRATION, BATCH, TEST, FEW = 256, 64, 10_000, 2_000
IMAGE = torch.zeros(1, 3, 32, 32)
TEMPERATURE, WEIGHT = 4.0, 0.9
"""Temperature and weight of the distillation loss."""


class ViT(nn.Module):
    """A vision transformer of four layers with a class token, on patches of 8 × 8 pixels."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        layers = [
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True) for _ in "1234"
        ]
        self.layers, self.norm, self.head = nn.ModuleList(layers), nn.LayerNorm(width), nn.Linear(width, 10)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (N, 10)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))


@cache
def images() -> tuple[torch.Tensor, ...]:
    """Return inputs and labels of the training and of the test images."""
    data = cifar10(seed=0, train=49_000, validation=1_000, test=TEST, augment=False)
    return tuple(map(torch.as_tensor, (data.train.inputs, data.train.labels, data.test.inputs, data.test.labels)))


def calibration(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return training images and labels for importances and compensation."""
    x, y, *_ = images()
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 + seed))[:CALIBRATION]
    return x[rows], y[rows]


def augmented(x: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return images that are mirrored and shifted by up to 4 pixels at random."""
    flip = torch.rand(len(x), generator=random) < 0.5  # noqa: PLR2004 - a probability
    x = F.pad(torch.where(flip[:, None, None, None], x.flip(3), x), (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, len(x)), generator=random)
    place = torch.arange(32)
    rows, columns = top[:, None] + place, left[:, None] + place
    return x[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(
    model: nn.Module,
    steps: int,
    rate: float,
    seed: int,
    *,
    teacher: nn.Module | None = None,
    penalty: Callable[[nn.Module], torch.Tensor] | None = None,
    change_gradients: Callable[[nn.Module], None] | None = None,
    adam: bool = False,
    bfloat16: bool = False,
) -> nn.Module:
    """Train a model in place with a one-cycle schedule, and return it in inference mode."""
    x, y, *_ = images()
    random = torch.Generator().manual_seed(seed)
    model.train().to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer: torch.optim.Optimizer
    if adam:
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.2, cycle_momentum=False)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=random)
        batch = augmented(x[rows], random).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(batch)
        loss = F.cross_entropy(logits.float(), y[rows])
        if teacher is not None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                targets = teacher(batch).float()
            soft = soft_target(logits.float(), targets, temperature=TEMPERATURE)
            loss = (1 - WEIGHT) * loss + WEIGHT * soft
        if penalty is not None:
            loss = loss + penalty(model)
        optimizer.zero_grad()
        loss.backward()
        if change_gradients is not None:
            change_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, count: int = TEST, *, bfloat16: bool = False) -> float:
    """Return the accuracy on the first test images, in percent."""
    _, _, x, y = images()
    model = model.eval().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        parts = [model(part.contiguous(memory_format=torch.channels_last)) for part in x[:count].split(500)]
    return 100 * float((torch.cat(parts).argmax(1) == y[:count]).float().mean())


def conv_shortcuts(model: nn.Module) -> nn.Module:
    """Replace the shortcuts that pad with zeros by 1 × 1 convolutions that compute the same.

    Torch-Pruning ignores the offset of the padding, so that it would remove other channels than those that belong
    together. With convolutions, both tools prune the same network.
    """
    for block in [module for module in model.modules() if isinstance(getattr(module, "shortcut", None), PadShortcut)]:
        outputs, inputs = block.conv1.weight.shape[:2]
        layer = nn.Conv2d(inputs, outputs, 1, 2, bias=False)
        nn.init.zeros_(layer.weight)
        with torch.no_grad():
            layer.weight[range(block.shortcut.before, block.shortcut.before + inputs), range(inputs)] = 1.0
        block.shortcut = layer
    return model


@dataclass(frozen=True)
class Network:
    """A network of the benchmark.

    Args:
        title: heading of its tables.
        make: returns the network, with public weights or with random ones.
        fractions: fractions of the MACs to which it is pruned.
        base_steps, base_rate: steps and learning rate of the training before pruning.
        steps, rate: the same for the training after pruning.
        adam: whether the optimizer is AdamW; otherwise it is SGD with momentum.
        narrower: returns a network with random weights and about the given fraction of the MACs.
    """

    title: str
    make: Callable[[], nn.Module]
    fractions: tuple[float, ...]
    base_steps: int
    base_rate: float
    steps: int
    rate: float
    narrower: Callable[[float], nn.Module]
    adam: bool = False
    bfloat16: bool = False


def narrower_resnet(fraction: float) -> nn.Module:
    """Return a ResNet-56 with random weights and fewer channels."""
    widths = [round(width * math.sqrt(fraction)) for width in (16, 32, 64)]
    return conv_shortcuts(ResNet56(widths=widths))


NETWORKS = {
    "resnet56": Network(
        "ResNet-56 with public weights",
        lambda: conv_shortcuts(resnet56()),
        (1 / 2.1, 1 / 2.57),
        base_steps=780,
        base_rate=0.02,
        steps=200,
        rate=0.02,
        narrower=narrower_resnet,
        bfloat16=True,
    ),
    "mobilenet": Network(
        "A small MobileNetV2",
        mobilenet,
        (0.5,),
        base_steps=1600,
        base_rate=0.1,
        steps=200,
        rate=0.05,
        narrower=lambda fraction: mobilenet(math.sqrt(fraction)),
    ),
    "vit": Network(
        "A small vision transformer",
        ViT,
        (0.5,),
        base_steps=3000,
        base_rate=1e-3,
        steps=300,
        rate=1e-3,
        narrower=lambda fraction: ViT(4 * round(16 * math.sqrt(fraction))),
        adam=True,
    ),
}


def base(name: str, seed: int) -> nn.Module:
    """Return the trained network before pruning, which is stored for later runs.

    The ResNet-56 has the same weights for all seeds: the public ones, fine-tuned on the compressed images.
    """
    network, seed = NETWORKS[name], 0 if name == "resnet56" else seed
    file = ROOT / "build" / "pruning" / f"{name}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = network.make()
    inference = framework_of(model).inference
    if file.is_file():
        inference.load_weights(model, file)
        return model.eval()
    train(model, network.base_steps, network.base_rate, seed, adam=network.adam, bfloat16=network.bfloat16)
    file.parent.mkdir(parents=True, exist_ok=True)
    inference.save_weights(model, file)
    return model


@dataclass(frozen=True)
class Case:
    """A network, a goal and a seed.

    Args:
        network: name of the network.
        fraction: fraction of the MACs.
        seed: seed of the calibration data and of the training after pruning.
        original: the trained network.
    """

    network: str
    fraction: float
    seed: int
    original: nn.Module

    def accuracy(self, model: nn.Module, count: int = TEST) -> float:
        """Return the accuracy on the first test images, in percent."""
        return accuracy(model, count, bfloat16=NETWORKS[self.network].bfloat16)

    def train(self, model: nn.Module, steps: int, **options: Any) -> nn.Module:
        """Train a model, as after pruning."""
        settings = NETWORKS[self.network]
        kind = {"adam": settings.adam, "bfloat16": settings.bfloat16}
        return train(model, steps, settings.rate, 100 + self.seed, **kind, **options)


def macs(model: nn.Module) -> int:
    """Return the multiply-accumulates for one image."""
    return int(framework_of(model).analysis.count(model.eval(), IMAGE)[1])
