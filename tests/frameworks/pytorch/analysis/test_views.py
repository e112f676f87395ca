"""Operators that change the axes of a tensor, and code in `forward` that uses sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frameworks.pytorch.analysis.networks import IMAGE, assert_cut_between_convolutions, conv
from trace_and_cut import assert_pruned_correctly

CASES = {
    "permute to channels last and back": (
        lambda s, x: s.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        conv(6, 4),
        {"mix": nn.Linear(8, 6)},
        [8, 6],
    ),
    "transpose": (
        lambda s, x: s.mix(x.flatten(2).transpose(1, 2)).transpose(-1, -2).unflatten(2, (8, 8)),
        conv(6, 4),
        {"mix": nn.Linear(8, 6)},
        [8, 6],
    ),
    "view by a number freezes": (lambda _, x: x.view(2, 8, 64).relu().view(2, 8, 8, 8), conv(8, 4), {}, []),
    "view with -1": (lambda _, x: x.view(2, -1, 64).relu().reshape(2, -1, 8, 8), conv(8, 4), {}, [8]),
    "view by an attribute": (
        lambda s, x: x.view(2, s.width, 64).relu().view(2, s.width, 8, 8),
        conv(8, 4),
        {"width": 8},
        [8],
    ),
    "view by sizes of the tensor": (
        lambda _, x: x.view(x.size(0), x.shape[1], -1).relu().view(x.shape),
        conv(8, 4),
        {},
        [8],
    ),
    "view_as": (lambda _, x: x.flatten(2).relu().view_as(x), conv(8, 4), {}, [8]),
    "view_as another tensor ties both": (
        lambda s, x: x.flatten(2).view_as(s.other(x)),
        conv(8, 4),
        {"other": conv(8, 8)},
        [8],
    ),
    "view by the shape of a weight": (
        lambda s, x: x.view(2, s.after.weight.shape[1], 64).view(2, s.after.weight.size(1), 8, 8),
        conv(8, 4),
        {},
        [8],
    ),
    "view by a tuple attribute with -1": (
        lambda s, x: x * s.scale.view(s.shape),
        conv(8, 4),
        {"scale": nn.Parameter(torch.randn(8)), "shape": (1, -1, 1, 1)},
        [8],
    ),
    "view by the width of a layer": (
        lambda s, x: x.view(2, s.after.in_channels, 64).view(2, -1, 8, 8),
        conv(8, 4),
        {},
        [8],
    ),
    "reshape that splits a frozen axis and keeps a pruned axis": (
        lambda s, x: x + (x.flatten(2) @ s.mix).reshape(x.shape[0], x.shape[1], 8, 8),
        conv(8, 4),
        {"mix": nn.Parameter(torch.randn(64, 64))},
        [8],
    ),
    "reshape to the width of a linear layer": (
        lambda s, x: x.reshape(-1, s.head.in_features),
        nn.Identity(),
        {"head": nn.Linear(512, 3)},
        None,
    ),
    "channel shuffle": (
        lambda s, x: x.view(2, 2, x.shape[1] // 2, 8, 8).transpose(1, 2).reshape(x.shape),
        conv(8, 4),
        {},
        [4],
    ),
    "squeeze and excite": (
        lambda s, x: x * s.up(s.down(x.mean((2, 3))).relu()).sigmoid().view(x.shape[0], x.shape[1], 1, 1),
        conv(8, 4),
        {"down": nn.Linear(8, 6), "up": nn.Linear(6, 8)},
        [8, 6],
    ),
    "squeeze and excite, expanded": (
        lambda s, x: x * s.gate(x.mean((2, 3), keepdim=True)).sigmoid().expand_as(x),
        conv(8, 4),
        {"gate": nn.Conv2d(8, 8, 1)},
        [8],
    ),
    "one channel expanded to the size of x and concatenated with x freezes nothing": (
        lambda s, x: torch.cat([x, s.gate(x).expand_as(x)], 1),
        conv(16, 4),
        {"gate": conv(8, 1)},
        [8],
    ),
    "expand of one channel is updated": (
        lambda s, x: x * s.gate(x).expand_as(x),
        conv(8, 4),
        {"gate": conv(8, 1)},
        [8],
    ),
    "a width as a number freezes": (lambda _, x: x * x.shape[1], conv(8, 4), {}, []),
    "a width under a square root freezes": (lambda _, x: x * x.shape[1] ** -0.5, conv(8, 4), {}, []),
    "a width as a float freezes": (lambda _, x: x / math.sqrt(x.size(1)), conv(8, 4), {}, []),
    "numel freezes": (lambda _, x: x / x.numel(), conv(8, 4), {}, []),
    "len freezes": (lambda _, x: x / len(x[0]), conv(8, 4), {}, []),
    "a width that is also a kernel size freezes": (
        lambda s, x: F.avg_pool2d(x.view(2, s.width, 8, 8), s.width // 4, 1),
        conv(8, 4),
        {"width": 8},
        [],
    ),
    "a product of attributes freezes": (
        lambda s, x: x.view(2, s.heads * s.each, 64).view(2, -1, 8, 8),
        conv(8, 4),
        {"heads": 2, "each": 4},
        [],
    ),
    "one attribute on two axes ties them": (
        lambda s, x: s.inner(x.view(2, s.width, 8, 8)).view(2, s.width, 8, 8),
        conv(8, 4),
        {"inner": conv(8, 8), "width": 8},
        [8],
    ),
    "a size from a long loop freezes": (
        lambda _, x: x.view(2, sum(x.shape[1] for _ in range(200)) // 200, 64).view(2, -1, 8, 8),
        conv(8, 4),
        {},
        [],
    ),
    "space to depth by a view": (
        lambda _, x: x.view(x.shape[0], x.shape[1], 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4).reshape(2, -1, 4, 4),
        conv(32, 4),
        {},
        [8],
    ),
    "zeros like": (lambda _, x: torch.cat([x, torch.zeros_like(x)], 1), conv(16, 4), {}, [8]),
    "zeros of the size of an attribute": (
        lambda s, x: torch.cat([x, torch.zeros(2, s.width, 8, 8)], 1),
        conv(14, 4),
        {"width": 6},
        [8, 6],
    ),
    "zeros of a constant size stay": (lambda _, x: torch.cat([x, x.new_zeros(2, 6, 8, 8)], 1), conv(14, 4), {}, [8]),
}
"""Name → (function between two convolutions, called with the module and the output of the first convolution; the second
convolution; further attributes of the module; expected sizes of the groups)."""


@pytest.mark.parametrize("name", CASES)
def test_a_network_with_the_operator_is_pruned_correctly(name):
    assert_cut_between_convolutions(*CASES[name])


class ConstantSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = conv(3, 8), conv(8, 4)

    def forward(self, x):
        return self.after(self.before(x).view(2, 8, 64).relu().view(2, 8, 8, 8))


def test_a_size_that_is_a_number_in_the_code_is_reported_with_its_line():
    graph, _ = assert_pruned_correctly(ConstantSize(), IMAGE)
    assert "number in the code" in graph.blockers[0].reason
    assert graph.blockers[0].source.startswith("test_views.py:")
