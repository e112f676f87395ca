"""Small data, networks and losses for tests of the training loop."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from kirsch.data.batches import ArrayData
from kirsch.frameworks.pytorch.features.student import student_of
from kirsch.frameworks.pytorch.training.train import train
from kirsch.frameworks.training import LossOutput, Training, TrainingHooks

N, D, K = 14, 5, 3  # samples, features, classes


def samples():
    random = np.random.default_rng(0)
    return random.standard_normal((N, D)).astype(np.float32), np.arange(N) % K


def batches(batch_size=4):
    return ArrayData(*samples(), batch_size=batch_size)


def pairs():
    return [(batch.inputs, batch.targets) for batch in batches().epoch(0, 0)]


def network(dtype=torch.float32):
    """Return a network with running statistics as state, and with dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, K)
        return nn.Sequential(*layers).to(dtype)


def plain_linear():
    model = nn.Linear(D, K, bias=False)
    model.weight.data.copy_(torch.linspace(-1, 1, D * K).reshape(K, D))
    return model


def cross_entropy(model, inputs, targets):
    loss = F.cross_entropy(model(inputs), targets)
    return loss, {"label": loss}


class Loss:
    """A `LossFunction` that calls a function (student, inputs, targets) → (total, parts)."""

    def __init__(self, function):
        self.function, self.norms = function, []

    def __call__(self, model, batch, epoch, step_counts, *, batch_counts=None):
        total, parts = self.function(student_of(model), batch.inputs, batch.targets)
        fraction = len(batch) / step_counts["labels"]
        return LossOutput(fraction * total, {name: fraction * part for name, part in parts.items()})

    def counts(self, batches):
        return {"labels": sum(len(batch) for batch in batches)}

    def check(self, batch, *, on_any_device=False):
        return []

    def balance(self, norms):
        self.norms.append(norms)
        return norms

    def state(self):
        return {}

    def restore(self, state):
        assert state == {}


def trained(data=None, *, training=None, model=None, loss=cross_entropy, **hooks):
    training, data = training or Training(epochs=3, learning_rate=0.1), batches() if data is None else data
    return train(model or network(), data, Loss(loss), training, TrainingHooks(**hooks))


def assert_same_bits(first, second):
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def equal_weights(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Unsized(IterableDataset):
    """Samples in random order, without a length."""

    def __iter__(self):
        inputs, targets = map(torch.from_numpy, samples())
        return iter([(inputs[index], targets[index]) for index in torch.randperm(N)])


class ShuffledBatches:
    """An iterable of batches in random order that is not a DataLoader."""

    def __len__(self):
        return 4

    def __iter__(self):
        inputs, targets = samples()
        order = np.array_split(torch.randperm(N).numpy(), 4)
        return iter([(inputs[chosen], targets[chosen]) for chosen in order])
