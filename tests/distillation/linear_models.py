"""Linear models, for which a training step of distillation has a closed form, with their data and training."""

from __future__ import annotations

import torch
from torch import nn

from distillation.examples import samples
from kirsch.data.batches import ArrayData
from kirsch.frameworks.training import Training

N, D, K = 36, 6, 3
ONE_STEP = Training(epochs=1, learning_rate=0.1, schedule="constant", weight_decay=0.0)
NESTEROV = 1.9
"""The first step of SGD with Nesterov momentum 0.9 is 1.9 times the gradient."""


def linear(classes=K, seed=0):
    """Return a linear model without a bias, in float64."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(D, classes, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(torch.randn(classes, D, generator=generator))
    return nn.Sequential(layer)


def one_batch():
    """Return all samples as a single batch."""
    return ArrayData(*samples(N), batch_size=N)


def weight(model):
    """Return the weight of a linear model, shape (K, D)."""
    return model[0].weight.detach().numpy()
