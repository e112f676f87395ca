"""Samples, trainings, losses and a recording teacher that several tests of distillation use."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

from kirsch import ArrayData, Training, distill
from kirsch.distillation.losses import LOSSES


def samples(count, seed=0):
    """Return float64 samples of three classes around three corners, shape (count, 6), and their classes."""
    random = np.random.default_rng(seed)
    targets = np.arange(count) % 3
    return np.eye(6)[targets] * 2 + 0.3 * random.standard_normal((count, 6)), targets


def image_data(count=24, *, size=6, batch_size=12, **options):
    """Return float32 images of three classes; the class is added to noise."""
    labels = np.arange(count) % 3
    images = np.random.default_rng(0).standard_normal((count, 1, size, size)) + labels[:, None, None, None]
    return ArrayData(images.astype(np.float32), labels, batch_size=batch_size, **options)


def trained(student, teacher, data, objective, **options):
    """Distill for two epochs, without the check of the teacher."""
    options = {"training": Training(epochs=2, learning_rate=0.01), "check_teacher": False, **options}
    return distill(student, teacher, data, objective=objective, **options)


def with_options(loss, **options):
    """Return a loss, given by its name or as a function, with other default options and the attributes of the loss."""
    loss = LOSSES[loss] if isinstance(loss, str) else loss
    return functools.update_wrapper(functools.partial(loss, **options), loss)


def softmax(logits):
    """Return the probabilities along the last axis."""
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


class Watched(nn.Module):
    """A module that runs another one, and records its modes and its state in each forward pass.

    Copies of the module append to the same list. Replace the list by an empty one at the start of a test.
    """

    calls: list = []  # noqa: RUF012 - shared by all copies on purpose

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        self.calls.append(
            {
                "training": {module.training for module in self.modules()},
                "gradient": torch.is_grad_enabled(),
                "state": {name: value.clone() for name, value in self.inner.state_dict().items()},
            }
        )
        return self.inner(x)
