"""Networks with a function between two layers, shared by the tests of operators."""

from __future__ import annotations

import torch
from torch import nn

from trace_and_cut import assert_pruned_correctly

IMAGE = torch.randn(2, 3, 8, 8)


class Between(nn.Module):
    """Two layers with a function between them.

    Args:
        before, after: the layers.
        between: called with the module and the output of `before`; returns the input of `after`.
        attributes: further modules, parameters and integers that `between` uses.
    """

    def __init__(self, before, between, after, **attributes):
        super().__init__()
        self.before, self.after, self.between = before, after, between
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.after(self.between(self, self.before(x)))


def conv(i, o, **options):
    """Return a 3 x 3 convolution that keeps the size of an image."""
    return nn.Conv2d(i, o, 3, padding=1, **options)


def assert_cut_between_convolutions(between, after, attributes, sizes):
    """Assert that a network with a function after eight channels is pruned correctly; see `trace_and_cut`."""
    model = Between(nn.Sequential(conv(3, 8), nn.ReLU()), between, after, **attributes)
    return assert_pruned_correctly(model, IMAGE, sizes=sizes)
