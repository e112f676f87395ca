"""Data and models whose outputs are logits or probabilities."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from distillation.examples import samples
from kirsch.data.batches import ArrayData
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.frameworks.training import Training

N, D, K = 48, 6, 3
SHORT = Training(epochs=2, learning_rate=0.1)
QUIET = {"check_teacher": False, "training": SHORT}


def dataset(targets=None):
    inputs, classes = samples(N)
    return ArrayData(inputs, classes if targets is None else targets, batch_size=N)


def net(*behind, seed=0, classes=K):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, classes), *behind).double()


def assert_close_weights(one, other, tolerance=1e-12):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


PLAIN = net(seed=1)
SOFT = net(nn.Softmax(-1), seed=1)
YES = np.random.default_rng(3).random((N, K)) < 0.4
BINARY = Objective((Term("binary-kd", 0.5),), label_weight=0.5, label_loss="binary")
