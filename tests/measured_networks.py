"""Small networks whose quality without some units is known, for tests of measured quality."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def set_weights(layer, weight, bias=None):
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight, dtype=torch.float32))
        layer.bias.zero_()
        if bias is not None:
            layer.bias.copy_(torch.as_tensor(bias, dtype=torch.float32))


def one_unit_per_class(strengths=(8.0, 4.0, 2.0, 1.0), spare=4):
    """Return a classifier of one-hot inputs: unit k recognizes class k, and further units have no effect.

    By magnitude, the spare units are the least important, and then the units of the classes from the last to the first.
    Without its unit, class k gets the same logits for all classes, so that class 0 is predicted.
    """
    classes = len(strengths)
    model = nn.Sequential(nn.Linear(classes, classes + spare), nn.ReLU(), nn.Linear(classes + spare, classes))
    first = np.zeros((classes + spare, classes))
    first[:classes] = np.diag(strengths)
    second = np.zeros((classes, classes + spare))
    second[:, :classes] = np.eye(classes)
    set_weights(model[0], first)
    set_weights(model[2], second)
    return model.eval()


def one_hot(counts=(4, 3, 2, 1)):
    """Return one-hot inputs and their labels, with a number of samples for each class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.eye(len(counts), dtype=np.float32)[labels], labels.astype(np.int64)


def trained(seed=0, widths=(12, 10), samples=400):
    """Return a trained classifier of two-dimensional points, with its inputs and labels."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(samples, 2)).astype(np.float32)
    y = ((x[:, 0] > 0) + 2 * (x[:, 1] > 0.3)).astype(np.int64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(2, widths[0]), nn.ReLU(), nn.Linear(*widths), nn.ReLU(), nn.Linear(widths[1], 4)
        )
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(120):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.tensor(x)), torch.tensor(y)).backward()
            optimizer.step()
    return model.eval(), x, y


def accuracy(model, x, y):
    with torch.no_grad():
        return float((model(torch.tensor(x)).argmax(1).numpy() == y).mean())
