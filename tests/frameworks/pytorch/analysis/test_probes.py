"""Small networks with operations that break other pruning tools: each is cut correctly, or frozen with a reason."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from frameworks.pytorch.analysis.networks import conv
from trace_and_cut import assert_pruned_correctly

IMAGE, TOKENS, WORDS = torch.randn(3, 3, 8, 8), torch.randn(3, 5, 3), torch.randint(0, 11, (3, 5))


class Probe(NamedTuple):
    """A network, its inputs, the expected sizes of its groups, and the reason if its middle layer is frozen."""

    network: nn.Module
    inputs: torch.Tensor
    sizes: tuple[int, ...]
    frozen: str = ""


class Net(nn.Module):
    """Two layers, followed by `run`, which takes the module and the output of the second layer."""

    def __init__(self, stem, middle, run, **parts):
        super().__init__()
        self.stem, self.middle, self.run = stem, middle, run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, self.middle(self.stem(x).relu()))


def image(width, run, *sizes, frozen="", **parts):
    return Probe(Net(conv(3, 6), conv(6, width), run, **parts), IMAGE, (6, *sizes), frozen)


def tokens(width, run, *sizes, frozen="", **parts):
    return Probe(Net(nn.Linear(3, 6), nn.Linear(6, width), run, **parts), TOKENS, (6, *sizes), frozen)


def view_shuffle(s, x):
    return s.head(x.view(x.shape[0], 3, x.shape[1] // 3, *x.shape[2:]).transpose(1, 2).reshape(x.shape))


def channel_mean(s, x):
    return s.head(x * x.sigmoid().mean(1, keepdim=True))


def gated(s, x):
    return s.head(x * s.up(s.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


def split_and_add(s, x):
    left, right = x.split(s.half, 1)
    return s.head(left + right.tanh())


def attention_by_products(s, x):
    q, k, v = (t.reshape(*t.shape[:2], s.heads, -1).permute(0, 2, 1, 3) for t in x.chunk(3, -1))
    mixed = (q @ k.transpose(-2, -1)).div(5).softmax(-1) @ v
    return s.head(mixed.transpose(1, 2).flatten(2))


def attention(s, x):
    q, k, v = (layer(x.relu()).unflatten(-1, (s.heads, -1)).transpose(1, 2) for layer in (s.q, s.k, s.v))
    return s.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def normalized(s, x):
    return s.head(F.batch_norm(x, s.mean, s.variance, s.scale, s.shift).relu())


class LanguageModel(nn.Module):
    """A language model with a tied embedding."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.middle = nn.Embedding(11, 8), nn.Linear(8, 10), nn.Linear(10, 8)
        self.output = nn.Linear(8, 11, bias=False)
        self.output.weight = self.table.weight

    def forward(self, x):
        x = self.table(x)
        return self.output(x + self.middle(self.up(x).relu()))


PROBES = {
    "chunk of the last of three axes": tokens(
        12, lambda s, x: s.head(torch.mul(*x.chunk(2, dim=2))), 6, head=nn.Linear(6, 3)
    ),
    "pixel shuffle": image(16, lambda s, x: s.head(F.pixel_shuffle(x, 2)), 4, head=conv(4, 3)),
    "pixel unshuffle": image(4, lambda s, x: s.head(F.pixel_unshuffle(x, 2)), 4, head=conv(16, 3)),
    "two slices bounded by a number": image(
        12, lambda s, x: s.left(x[:, :8]) + s.right(x[:, 8:]), 4, left=conv(8, 3), right=conv(4, 3)
    ),
    "every second channel": image(8, lambda s, x: s.head(x[:, ::2]), frozen="sliced with a stride", head=conv(4, 3)),
    "channels by a list of indices": image(
        8, lambda s, x: s.head(x[:, [6, 0, 3, 5]]), frozen="the axis is indexed by a tensor", head=conv(4, 3)
    ),
    "repeat": image(4, lambda s, x: s.head(x.repeat(1, 3, 1, 1)), 4, head=conv(12, 3)),
    "repeat_interleave": image(4, lambda s, x: s.head(x.repeat_interleave(3, dim=1)), 4, head=conv(12, 3)),
    "cat on the last of three axes": tokens(
        4,
        lambda s, x: s.head(torch.cat([x, s.other(x.relu())], dim=2)),
        *(4, 6),
        other=nn.Linear(4, 6),
        head=nn.Linear(10, 3),
    ),
    "depthwise convolution with a multiplier": image(
        4, lambda s, x: s.head(s.depthwise(x)), *(4, 3), depthwise=conv(4, 12, groups=4), head=conv(12, 3)
    ),
    "transposed convolution in groups": image(
        8,
        lambda s, x: s.head(s.up(x)),
        *(2, 4, 6),
        up=nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2),
        head=conv(12, 3),
    ),
    "LSTM": tokens(
        8, lambda s, x: s.head(s.cell(x)[0]), *(8, 10), cell=nn.LSTM(8, 10, batch_first=True), head=nn.Linear(10, 3)
    ),
    "GRU": tokens(
        8,
        lambda s, x: s.head(s.cell(x)[0]),
        *(8, 10),
        cell=nn.GRU(8, 10, batch_first=True, bidirectional=True),
        head=nn.Linear(20, 3),
    ),
    "einsum": tokens(
        8,
        lambda s, x: s.head(torch.einsum("btc,oc->bto", x, s.mix).relu()),
        *(8, 10),
        mix=nn.Parameter(torch.randn(10, 8)),
        head=nn.Linear(10, 3),
    ),
    "linear with the weight of another module": tokens(
        8,
        lambda s, x: s.head(F.linear(s.other(x).relu(), s.other.weight)),
        8,
        other=nn.Linear(8, 8),
        head=nn.Linear(8, 3),
    ),
    "shuffle by views": image(12, view_shuffle, 4, head=conv(12, 3)),
    "channel shuffle": image(12, lambda s, x: s.head(F.channel_shuffle(x, 3)), 4, head=conv(12, 3)),
    "flatten with the channels last": image(
        8, lambda s, x: s.head(x.permute(0, 2, 3, 1).flatten(1)), 8, head=nn.Linear(512, 3)
    ),
    "flip": image(8, lambda s, x: s.head(x + x.flip(1)), 4, head=conv(8, 3)),
    "roll": image(8, lambda s, x: s.head(x + x.roll(1, 1)), frozen="rolled by a fixed offset", head=conv(8, 3)),
    "stack and flatten": image(
        8, lambda s, x: s.head(torch.stack([x, x.tanh()], 2).flatten(1, 2)), 8, head=conv(16, 3)
    ),
    "mean over channels": image(8, channel_mean, 8, head=conv(8, 3)),
    "softmax over channels": image(
        8, lambda s, x: s.head(x.softmax(1)), frozen="a softmax is computed over the axis", head=conv(8, 3)
    ),
    "squeeze and excite": image(8, gated, *(8, 4), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), head=conv(8, 3)),
    "cat of a sum": image(
        8, lambda s, x: s.head(torch.cat([x + s.other(x.relu()), x], 1)), 8, other=conv(8, 8), head=conv(16, 3)
    ),
    "split and sum": image(12, split_and_add, 6, half=6, head=conv(6, 3)),
    "heads by reshape": tokens(36, attention_by_products, *(3, 4), heads=3, head=nn.Linear(12, 3)),
    "scaled dot product attention": tokens(
        8,
        attention,
        *(8, 3, 4, 4),
        heads=3,
        q=nn.Linear(8, 12),
        k=nn.Linear(8, 12, bias=False),  # a softmax is invariant to this bias, so the bias would have no gradient
        v=nn.Linear(8, 12),
        head=nn.Linear(12, 3),
    ),
    "group norm": image(12, lambda s, x: s.head(s.norm(x)), *(3, 4), norm=nn.GroupNorm(3, 12), head=conv(12, 3)),
    "layer norm over channels": tokens(
        8, lambda s, x: s.head(s.norm(x)), 8, norm=nn.LayerNorm(8), head=nn.Linear(8, 3)
    ),
    "batch norm after cat": image(
        8,
        lambda s, x: s.head(s.norm(torch.cat([x, s.other(x.relu())], 1)).relu()),
        *(8, 4),
        other=conv(8, 4),
        norm=nn.BatchNorm2d(12),
        head=conv(12, 3),
    ),
    "a module used twice": image(8, lambda s, x: s.head(s.both(s.both(x).relu())), 8, both=conv(8, 8), head=conv(8, 3)),
    "padding of channels": image(8, lambda s, x: s.head(F.pad(x, (0, 0, 0, 0, 1, 3))), 8, head=conv(12, 3)),
    "windows as channels": image(4, lambda s, x: s.head(F.unfold(x, 3, padding=1).relu()), 4, head=nn.Conv1d(36, 3, 1)),
    "convolution in groups": image(
        8, lambda s, x: s.head(s.grouped(x.relu())), *(2, 4, 6), grouped=conv(8, 12, groups=2), head=conv(12, 3)
    ),
    "product with a transposed weight": tokens(
        8,
        lambda s, x: s.head(x @ s.mix.T),
        *(8, 10),
        mix=nn.Parameter(torch.randn(10, 8)),
        head=nn.Linear(10, 3),
    ),
    "an embedding tied with the output": Probe(LanguageModel(), WORDS, (8, 10)),
    "batch norm as a function": image(
        8,
        normalized,
        8,
        **{name: nn.Buffer(torch.ones(8)) for name in ("mean", "variance")},
        **{name: nn.Parameter(torch.ones(8)) for name in ("scale", "shift")},
        head=conv(8, 3),
    ),
    "outputs in a dictionary": image(
        8,
        lambda s, x: {"mask": s.head(x), "classes": [s.classes(x.mean((2, 3)))]},
        8,
        head=conv(8, 3),
        classes=nn.Linear(8, 4),
    ),
}


def assert_trains(model, inputs):
    """Assert that one training step changes every parameter and that all stay finite."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.train()
    sum(output.pow(2).mean() for output in tree_leaves(model(inputs))).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(old, parameter)


@pytest.mark.parametrize("name", PROBES)
def test_each_small_network_is_pruned_correctly_or_frozen_with_a_reason(name):
    network, inputs, sizes, frozen = PROBES[name]
    graph, pruned = assert_pruned_correctly(network, inputs, sizes=sizes)
    assert_trains(pruned, inputs)
    middle = [group for group in graph.groups if ("middle.weight", 0) in group.footprint]
    if frozen:
        assert not middle
        assert any(re.search(frozen, b.reason) for b in graph.blockers), [b.reason for b in graph.blockers]
    else:
        assert middle
