"""Accuracy after pruning to half of the MACs, without training and with each method of compensation.

Three small networks are trained on 8,000 images of CIFAR-10, pruned by the default importance and compensated from 256
training images; the accuracy is that on 3,000 test images. Writes one JSON line for each network and seed.

    python benchmarks/compensation.py cnn_bn cnn_bias encoder --seeds 0 1 2

Needs CIFAR-10 in `$KIRSCH_DATA` (default ../shared/data). One to four minutes of one core for each network and seed.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

import kirsch
from kirsch.data.sources.cifar10 import cifar10
from kirsch.measurement.machine import cpu

if TYPE_CHECKING:
    from collections.abc import Callable

METHODS: tuple[tuple[str, ...], ...] = (
    (),
    ("bias",),
    ("least_squares",),
    ("batch_norm",),
    ("least_squares", "batch_norm"),
)
BATCH, CALIBRATION = 64, 256


class Cnn(nn.Module):
    """Five convolutions, with batch normalization or with biases."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()

        def block(channels: int, outputs: int, stride: int) -> nn.Module:
            normalization = nn.BatchNorm2d(outputs) if norm else nn.Identity()
            return nn.Sequential(nn.Conv2d(channels, outputs, 3, stride, 1, bias=not norm), normalization, nn.ReLU())

        self.body = nn.Sequential(
            block(3, 16, 1), block(16, 32, 2), block(32, 32, 1), block(32, 64, 2), block(64, 64, 1)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 32, 32) → (N, 10)."""
        logits: torch.Tensor = self.head(self.body(x).mean((2, 3)))
        return logits


class Layer(nn.Module):
    """Attention with 4 heads and a feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, width) → (N, L, width)."""
        y = self.n1(x)
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.n2(x))))
        return out


class Encoder(nn.Module):
    """A transformer encoder of three layers on patches of 4 × 4 pixels."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patch, self.position = nn.Linear(48, width), nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.layers = nn.ModuleList(Layer(width, 128) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 32, 32) → (N, 10)."""
        x = x.unflatten(2, (8, 4)).unflatten(4, (8, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = self.patch(x) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.norm(x).mean(1))
        return logits


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "cnn_bn": (lambda: Cnn(norm=True), 6),
    "cnn_bias": (lambda: Cnn(norm=False), 8),
    "encoder": (Encoder, 8),
}
"""Name → function that builds the network, and epochs."""


def trained(name: str, seed: int, images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """Return a network trained on the images, which are mirrored in half of the batches."""
    build, epochs = NETWORKS[name]
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    steps = len(images) // BATCH * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            batch = images[chosen]
            batch = batch.flip(-1) if torch.rand(()) < 0.5 else batch  # noqa: PLR2004 - half of the batches
            loss = F.cross_entropy(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the fraction of the images with the right class."""
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in images.split(500)])
    return float((logits.argmax(1) == labels).float().mean())


def measure(name: str, seed: int) -> dict[str, object]:
    """Return the accuracies of one network and seed, and the errors of the outputs on the calibration images."""
    data = cifar10(seed=0, train=8000, validation=100, test=3000, augment=False)
    images, labels = torch.from_numpy(data.train.inputs), torch.from_numpy(data.train.labels)
    test = torch.from_numpy(data.test.inputs), torch.from_numpy(data.test.labels)
    model = trained(name, seed, images, labels)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    calibration = [images[part] for part in chosen.split(BATCH)]
    plan = kirsch.plan(kirsch.trace(model, images[:2]), kirsch.Goal(macs=0.5))
    row: dict[str, object] = {"network": name, "seed": seed, "original": accuracy(model, *test), "macs": 0.5}
    for methods in METHODS:
        if "batch_norm" in methods and name != "cnn_bn":
            continue
        begun = time.perf_counter()
        found = kirsch.prune_with_verification(
            model, plan, compensate=methods or None, data=calibration if methods else None
        )
        seconds = time.perf_counter() - begun
        errors = found.compensation.output_errors if found.compensation is not None else {}
        row["+".join(methods) or "none"] = {
            "accuracy": accuracy(found.model, *test),
            "output_error": next(reversed(errors.values()), None),
            "seconds": round(seconds, 1),
        }
    return row | {"machine": cpu()[0], "torch": torch.__version__, "kirsch": kirsch.__version__}


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # some methods increase the error; the rows show it
    for name in options.networks:
        for seed in options.seeds:
            print(json.dumps(measure(name, seed)), flush=True)


if __name__ == "__main__":
    main()
