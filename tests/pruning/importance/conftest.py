"""Networks with explicit gates, and statistics of calibration data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kirsch.data.batches import Batch
from kirsch.frameworks.trace import trace
from kirsch.pruning.importance.statistics import Statistics

SAMPLES = 12


class Residual(nn.Module):
    """Convolutions with batch normalization and a residual sum; `gates` multiplies the channels of the sum."""

    inputs = torch.randn(SAMPLES, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.inner, self.outer, self.head = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1), nn.Linear(6, 3)
        self.gates = {}

    def gated(self, name, x, axis):
        return x if name not in self.gates else x * self.gates[name].reshape(-1, *[1] * (x.dim() - 1 - axis))

    def forward(self, x):
        x = self.gated("stem", self.norm(self.stem(x)).relu(), 1)
        inner = self.gated("inner", self.inner(x).relu(), 1)
        x = x + self.gated("stem", self.outer(inner), 1)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Self-attention with two heads and a gated feed-forward layer, without normalization."""

    inputs = torch.randn(SAMPLES, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.gate, self.up, self.down, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 3)
        self.gates = {}

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        q, v = q * self.gates.get("query", 1), v * self.gates.get("value", 1)
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        hidden = F.silu(self.gate(x)) * self.up(x) * self.gates.get("hidden", 1)
        return self.head((x + self.down(hidden)).mean(1))


@pytest.fixture
def residual_of():
    """Return a function that builds the network with the weights of a seed."""

    def build(seed):
        torch.manual_seed(seed)
        return Residual().double().eval()

    return build


@pytest.fixture
def residual(residual_of):
    return residual_of(0)


@pytest.fixture
def attention():
    return Attention().double().eval()


@pytest.fixture
def labels():
    return torch.arange(SAMPLES) % 3


@pytest.fixture
def graph_of():
    """Return a function that traces a model on one of its samples."""
    return lambda model: trace(model, model.inputs[:1])


@pytest.fixture
def statistics_of(labels):
    """Return a function of a graph that returns the statistics of all samples, in batches of some size."""

    def build(graph, batch_size=SAMPLES, loss=F.cross_entropy):
        inputs = graph.model.inputs
        return Statistics(
            graph, [Batch(*pair) for pair in zip(inputs.split(batch_size), labels.split(batch_size), strict=True)], loss
        )

    return build
