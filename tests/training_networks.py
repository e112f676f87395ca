"""Small networks of float32 for tests of training and distillation, with 3 outputs."""

from __future__ import annotations

import torch
from torch import nn


def tanh_network(width, seed, inputs=5):
    """Return a network with one hidden layer. The seed also sets the global generator."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 3))


def normalized_network(width, seed=None, inputs=5, activation=nn.Tanh):
    """Return a network with batch statistics and dropout. The seed, if given, also sets the global generator."""
    if seed is not None:
        torch.manual_seed(seed)
    layers = nn.Linear(inputs, width), nn.BatchNorm1d(width), activation(), nn.Dropout(0.2), nn.Linear(width, 3)
    return nn.Sequential(*layers)
