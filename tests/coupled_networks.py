"""Small networks with coupled layers, and the parameters of a unit found without the code under test."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Convolutions with batch normalization and a residual sum."""

    inputs = torch.randn(6, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.inner, self.outer, self.head = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Self-attention with two heads and a gated feed-forward layer."""

    inputs = torch.randn(6, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.gate, self.up, self.down, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return self.head((x + self.down(F.silu(self.gate(x)) * self.up(x))).mean(1))


NETWORKS = {"residual": Residual, "attention": Attention}


def build(name, seed=0):
    """Return a network of float64 in inference mode with random weights, biases, scales and statistics."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.bias.data, module.running_mean):
                value.normal_()
    return model


def slices_of(graph, group, unit):
    """Yield name, axis and indices of each slice of a parameter that the removal of one unit deletes."""
    keep = graph.keep({group.name: (unit,)})
    for name in graph.parameters:
        for axis, labels in enumerate(graph.tensors[name].axes):
            kept = graph.kept(labels, keep)
            if kept is not None:
                yield name, axis, (~kept).nonzero()[0]


def all_slices(graph):
    """Return the slices of each unit, one list for each unit of each group."""
    return [[list(slices_of(graph, group, unit)) for unit in range(group.size)] for group in graph.groups]
