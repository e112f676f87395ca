"""Random networks of layers, norms, attention, sums, concatenations, splits and shuffles pass the verification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as fn

from trace_and_cut import assert_pruned_correctly


class Tokens(nn.Module):
    """Apply a layer to the pixels of an image as tokens."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        out = self.layer(x.flatten(2).transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2).unflatten(2, x.shape[2:])


class Attention(nn.Module):
    """Scaled dot-product attention with two heads."""

    def __init__(self, inputs, width):
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v = (nn.Linear(inputs, width) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return fn.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Halves(nn.Module):
    """The sum of two halves of the channels; an attribute holds the width of a half."""

    def __init__(self, inputs):
        super().__init__()
        self.half = inputs // 2

    def forward(self, x):
        left, right = x.split([self.half, self.half], 1)
        return left + right


def shuffled(x):
    return x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


# Name of a step → three functions: for the layer (from the input widths a and b and a random width w), for the output
# (from the layer and the inputs), and for the output width.
STEPS = {
    "conv": (lambda a, b, w: nn.Conv2d(a, w, 3, padding=1), lambda f, x, y: f(x), lambda a, b, w: w),
    "linear": (lambda a, b, w: Tokens(nn.Linear(a, w)), lambda f, x, y: f(x), lambda a, b, w: w),
    "attention": (lambda a, b, w: Tokens(Attention(a, w)), lambda f, x, y: f(x), lambda a, b, w: w),
    "recurrence": (lambda a, b, w: Tokens(nn.GRU(a, w, batch_first=True)), lambda f, x, y: f(x), lambda a, b, w: w),
    "depthwise": (lambda a, b, w: nn.Conv2d(a, a, 3, padding=1, groups=a), lambda f, x, y: f(x), lambda a, b, w: a),
    "norm": (lambda a, b, w: nn.BatchNorm2d(a), lambda f, x, y: f(x), lambda a, b, w: a),
    "norm of groups": (lambda a, b, w: nn.GroupNorm(2 - a % 2, a), lambda f, x, y: f(x), lambda a, b, w: a),
    "relu": (lambda a, b, w: nn.ReLU(), lambda f, x, y: f(x), lambda a, b, w: a),
    "pool": (lambda a, b, w: nn.AvgPool2d(3, 1, 1), lambda f, x, y: f(x), lambda a, b, w: a),
    "flip": (lambda a, b, w: nn.Tanh(), lambda f, x, y: x + f(x.flip(1)), lambda a, b, w: a),
    "repeat": (lambda a, b, w: nn.Tanh(), lambda f, x, y: f(x.repeat_interleave(2, 1)), lambda a, b, w: 2 * a),
    "cat": (lambda a, b, w: nn.Identity(), lambda f, x, y: torch.cat([x, y], 1), lambda a, b, w: a + b),
    "gate": (
        lambda a, b, w: nn.Conv2d(b, a, 1),
        lambda f, x, y: x * f(y.mean((2, 3), keepdim=True)).sigmoid(),
        lambda a, b, w: a,
    ),
    "add": (
        lambda a, b, w: nn.Identity() if a == b else nn.Conv2d(b, a, 1),
        lambda f, x, y: x + f(y),
        lambda a, b, w: a,
    ),
}
EVEN = {
    "grouped": (lambda a, b, w: nn.Conv2d(a, w, 3, padding=1, groups=2), lambda f, x, y: f(x), lambda a, b, w: w),
    "shuffle": (lambda a, b, w: nn.Identity(), lambda f, x, y: shuffled(x), lambda a, b, w: a),
    "chunk": (
        lambda a, b, w: nn.Sigmoid(),
        lambda f, x, y: torch.mul(x.chunk(2, 1)[0], f(x.chunk(2, 1)[1])),
        lambda a, b, w: a // 2,
    ),
    "split": (lambda a, b, w: Halves(a), lambda f, x, y: f(x), lambda a, b, w: a // 2),
}
ALL = {**STEPS, **EVEN}
"""Steps of `EVEN` need an even number of channels, and are skipped for an odd number."""


class RandomNet(nn.Module):
    """Steps over a list of activations; each step takes one or two of them and appends its output."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.parts, widths = [], nn.ModuleList(), [3]
        for name, first, second, width in steps:
            a, b = first % len(widths), second % len(widths)
            if name in STEPS or widths[a] % 2 == 0:
                make, _, out = ALL[name]
                self.parts.append(make(widths[a], widths[b], width))
                self.steps.append((name, a, b))
                widths.append(out(widths[a], widths[b], width))
        self.head = nn.Linear(widths[-1], 3)

    def forward(self, x):
        values = [x]
        for (name, a, b), part in zip(self.steps, self.parts, strict=True):
            values.append(ALL[name][1](part, values[a], values[b]))
        return self.head(values[-1].mean((2, 3)))


step = st.tuples(st.sampled_from(list(ALL)), st.integers(0, 99), st.integers(0, 99), st.sampled_from([2, 4, 6, 8]))
NETWORKS = given(st.lists(step, min_size=2, max_size=9), st.sampled_from([0.3, 0.5, 0.8]))


def assert_random_network_is_verified(steps, share):
    torch.manual_seed(0)
    assert_pruned_correctly(RandomNet(steps), torch.randn(2, 3, 5, 5), share=share, power=-1.0)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@NETWORKS
def test_random_networks_pass_the_verification(steps, share):
    assert_random_network_is_verified(steps, share)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@settings(max_examples=500, derandomize=False, suppress_health_check=list(HealthCheck))
@NETWORKS
def test_many_random_networks_pass_the_verification(steps, share):
    assert_random_network_is_verified(steps, share)
