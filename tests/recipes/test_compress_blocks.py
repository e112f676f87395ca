"""Residual blocks are ranked on training samples, which may come from a loader that shuffles."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kirsch
from kirsch.steps import Prune

LABELS = np.arange(64) % 2
IMAGES = (np.random.default_rng(0).standard_normal((64, 1, 6, 6)) + 2 * LABELS[:, None, None, None]).astype(np.float32)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Conv2d(1, 4, 3),
            nn.Sequential(*[Block() for _ in range(3)]),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).relu().mean((2, 3)))


def test_blocks_are_ranked_on_the_same_samples_of_a_loader_in_each_run(tmp_path, monkeypatch):
    ranked_on = []

    def choose(*args, data, **options):
        ranked_on.append([batch.inputs for batch in data])
        return kirsch.plan(*args, data=data, **options)

    monkeypatch.setattr("kirsch.pruning.step.choose", choose)
    monkeypatch.setattr("kirsch.pruning.step.CALIBRATION", 16)  # of 64 samples: another order would give other samples
    loader = DataLoader(TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(LABELS)), 16, shuffle=True)
    model = kirsch.distill(
        Net(),
        Net(),
        loader,
        objective=kirsch.Objective.labels(),
        training=kirsch.Training(epochs=6, learning_rate=0.02),
        check_teacher=False,
    ).model
    part = kirsch.Split(IMAGES, LABELS)
    data = kirsch.DataSet("shuffled", loader, part, part)

    def plans(folder):
        steps = [Prune(kinds="block", goal=kirsch.Goal(macs=0.75))]
        return kirsch.compress(model, data, steps=steps, folder=tmp_path / folder).metrics["provenance"]["plans"]

    (first,) = plans("first")
    torch.manual_seed(3)
    assert plans("second") == [first]
    assert len(first["blocks"]) == 1
    assert len(ranked_on) == 4  # each run makes its plan in the checks before the first step, and in the step
    assert all(torch.equal(torch.cat(batches), torch.cat(ranked_on[0])) for batches in ranked_on)
