"""Recipe, models and data of a run that takes a few seconds, for tests of recipes and of resuming."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

STEPS = ["train", "distill", "prune", "recover", "export", "measure"]
"""Keys of the steps of the recipe."""

NO_EXPORT = ("export=null", "measure=null")
"""Changes that remove the last two steps, which need ONNX Runtime."""

NETS = '''
import os

import numpy as np
import torch
from torch import nn

from kirsch.data.dataset import DataSet, Split


class Net(nn.Module):
    """A network with batch statistics and dropout. A resumed run must restore the statistics and the random state."""

    def __init__(self, width, classes=3):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width)
        self.second, self.drop = nn.Conv2d(width, width, 3), nn.Dropout(0.1)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3))
        return self.head(self.drop(x))


def teacher():
    return Net(12)


def student():
    return Net(8)


def five_classes():
    return Net(8, classes=5)


class Constant(nn.Module):
    """A model that predicts the same class for all inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.first(x).mean((2, 3))) + torch.tensor([1e4, 0.0, 0.0])


def louder(batch, random):
    return batch * random.uniform(0.8, 1.25, (len(batch), 1, 1, 1)).astype(np.float32)


def stripes(*, seed, classes=("dark", "gray", "light"), name="stripes"):
    """Three classes of stripes. The environment variable NOISE changes the data without a change of this code."""
    random, noise = np.random.default_rng(seed), float(os.environ.get("NOISE", "0.8"))

    def part(n):
        labels = np.arange(n) % 3
        wave = np.cos(np.arange(6) * (labels[:, None] + 0.5))[:, None, :, None]
        return Split((wave + noise * random.standard_normal((n, 1, 6, 6))).astype(np.float32), labels)

    return DataSet(name, part(48), part(30), part(60), classes=tuple(classes), augment=louder)
'''

RECIPE = """
name: stripes
data: {source: "nets.py:stripes", batch_size: 16}
teacher: {model: "nets.py:teacher"}
student: {model: "nets.py:student"}
steps:
- train: {epochs: 6, learning_rate: 0.02, optimizer: adamw}
- distill: {epochs: 4, learning_rate: 0.05}
- prune: {goal: {macs: 0.6}, round_to: 1}
- recover: {epochs: 3, learning_rate: 0.02, warmup_epochs: 1}
- export
- measure: {rounds: 10}
goal: {max_drop: 0.5}
"""


def write_job(folder: Path) -> Path:
    """Write nets.py and recipe.yaml to a folder, and return the path of the recipe."""
    (folder / "nets.py").write_text(NETS)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


def same_weights(first, second) -> bool:
    """Return whether two models or state dicts are equal bit for bit."""
    a, b = (model if isinstance(model, dict) else model.state_dict() for model in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_weights_close(first, second, **tolerance) -> None:
    """Check that two modules have the same names of weights, and close values."""
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], msg=name, **tolerance)


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
