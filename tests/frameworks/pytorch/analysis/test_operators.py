"""Each operator, and each place of its arguments: half of everything goes, and the rest equals the masked original."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from kirsch.frameworks.pytorch.analysis import operators
from kirsch.graph.labels import Tensor
from proving import assert_cut_is_right


class Net(nn.Module):
    """Two layers with something between them, given as a function of the module and the activations."""

    def __init__(self, before, between, after, **numbers):
        super().__init__()
        self.before, self.after, self.between = before, after, between
        for name, value in numbers.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.after(self.between(self, self.before(x)))


def conv(i, o, **options):
    return nn.Conv2d(i, o, 3, padding=1, **options)


IMAGE = torch.randn(2, 3, 8, 8)


class Unpooled(nn.Module):
    """Pooling that remembers where its values came from, and the way back."""

    def __init__(self):
        super().__init__()
        self.before, self.after = conv(3, 8), conv(8, 4)

    def forward(self, x):
        pooled, places = F.max_pool2d(self.before(x), 2, return_indices=True)
        return self.after(F.max_unpool2d(pooled, places, 2))


ACTIVATIONS = [
    F.relu,
    F.relu6,
    F.gelu,
    F.silu,
    F.mish,
    F.elu,
    F.selu,
    F.celu,
    F.softplus,
    F.softsign,
    F.leaky_relu,
    F.hardtanh,
    F.hardswish,
    F.hardsigmoid,
    F.rrelu,
    F.logsigmoid,
    torch.sigmoid,
    torch.tanh,
    torch.exp,
    torch.abs,
    lambda x: x.clamp(-1, 1),
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x**2 + 2 * x - x / 3,
    lambda x: F.dropout(x, 0.5, training=False),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_carry_channels(activation):
    assert_cut_is_right(Net(conv(3, 8), lambda _, x: activation(x), conv(8, 4)), IMAGE, sizes=[8])


LAYERS = {
    "linear": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 6), [8]),
    "linear over tokens": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5, 6), [8]),
    "conv1d": (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), torch.randn(2, 3, 12), [8]),
    "conv2d": (nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "conv3d": (nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 1)), torch.randn(2, 3, 4, 4, 4), [8]),
    "without batch axis": (nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), torch.randn(3, 8, 8), [8]),
    "strided, dilated, reflected": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=2, dilation=2, padding_mode="reflect"), nn.ReLU(), conv(8, 4)
        ),
        IMAGE,
        [8],
    ),
    "padding by name": (nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "conv_transpose1d": (
        nn.Sequential(nn.Conv1d(3, 8, 3), nn.ConvTranspose1d(8, 6, 3, stride=2), nn.ReLU(), nn.Conv1d(6, 2, 1)),
        torch.randn(2, 3, 12),
        [8, 6],
    ),
    "conv_transpose2d": (
        nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2, output_padding=1), nn.ReLU(), conv(6, 2)),
        IMAGE,
        [8, 6],
    ),
    "conv_transpose3d": (
        nn.Sequential(nn.Conv3d(3, 8, 1), nn.ConvTranspose3d(8, 6, 2), nn.ReLU(), nn.Conv3d(6, 2, 1)),
        torch.randn(2, 3, 3, 3, 3),
        [8, 6],
    ),
    "depthwise": (
        nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        IMAGE,
        [8],
    ),
    "depthwise 1d": (
        nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 4, 1)),
        torch.randn(2, 3, 9),
        [8],
    ),
    "one input channel": (nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 4)), torch.randn(2, 1, 8, 8), [8]),
    "batch norm": (nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "batch norm without scale": (
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, affine=False), nn.ReLU(), conv(8, 4)),
        IMAGE,
        [8],
    ),
    "batch norm without statistics": (
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), conv(8, 4)),
        IMAGE,
        [8],
    ),
    "batch norm 1d": (
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(4, 6),
        [8],
    ),
    "instance norm": (nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "layer norm": (
        nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(2, 5, 6),
        [8],
    ),
    "layer norm without scale": (
        nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(2, 6),
        [8],
    ),
    "layer norm over an image": (
        nn.Sequential(conv(3, 8), nn.LayerNorm([8, 8, 8]), nn.ReLU(), conv(8, 4)),
        IMAGE,
        [8],
    ),
    "group norm: whole groups and places in them": (
        nn.Sequential(conv(3, 12), nn.GroupNorm(3, 12), nn.ReLU(), conv(12, 4)),
        IMAGE,
        [3, 4],
    ),
    "group norm of one group": (nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "group norm of single channels": (nn.Sequential(conv(3, 8), nn.GroupNorm(8, 8), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "prelu": (nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 4)), IMAGE, [8]),
    "prelu with one slope": (nn.Sequential(conv(3, 8), nn.PReLU(), conv(8, 4)), IMAGE, [8]),
    "glu": (nn.Sequential(conv(3, 8), nn.GLU(1), conv(4, 4)), IMAGE, [4]),
    "max pool": (nn.Sequential(conv(3, 8), nn.MaxPool2d(2), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "average pool": (nn.Sequential(conv(3, 8), nn.AvgPool2d(3, 1), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "adaptive max pool": (nn.Sequential(conv(3, 8), nn.AdaptiveMaxPool2d(2), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "pool 1d": (nn.Sequential(nn.Conv1d(3, 8, 3), nn.AvgPool1d(2), nn.Conv1d(8, 4, 1)), torch.randn(2, 3, 12), [8]),
    "pool 3d": (
        nn.Sequential(nn.Conv3d(3, 8, 1), nn.MaxPool3d(2), nn.Conv3d(8, 4, 1)),
        torch.randn(2, 3, 4, 4, 4),
        [8],
    ),
    "flatten after pooling": (
        nn.Sequential(conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
        IMAGE,
        [8],
    ),
    "flatten of space": (
        nn.Sequential(conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)),
        IMAGE,
        [8],
    ),
    "unflatten": (
        nn.Sequential(nn.Linear(6, 32), nn.Unflatten(1, (8, 2, 2)), nn.ReLU(), conv(8, 4)),
        torch.randn(2, 6),
        [8],
    ),
    "upsampling": (nn.Sequential(conv(3, 8), nn.Upsample(scale_factor=2), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "bilinear upsampling": (
        nn.Sequential(conv(3, 8), nn.Upsample(scale_factor=2, mode="bilinear"), nn.ReLU(), conv(8, 4)),
        IMAGE,
        [8],
    ),
    "pixel shuffle": (nn.Sequential(conv(3, 16), nn.PixelShuffle(2), nn.ReLU(), conv(4, 4)), IMAGE, [4]),
    "pixel unshuffle": (nn.Sequential(conv(3, 4), nn.PixelUnshuffle(2), nn.ReLU(), conv(16, 4)), IMAGE, [4]),
    "channel shuffle": (nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), nn.ReLU(), conv(8, 4)), IMAGE, [2, 4]),
    "channel shuffle of three": (nn.Sequential(conv(3, 12), nn.ChannelShuffle(3), conv(12, 4)), IMAGE, [3, 4]),
    "unfold and fold": (
        nn.Sequential(conv(3, 8), nn.Unfold(2, stride=2), nn.Tanh(), nn.Fold(8, 2, stride=2), conv(8, 4)),
        IMAGE,
        [8],
    ),
    "unfold, dilated and padded": (
        nn.Sequential(nn.Unfold((3, 2), dilation=2, padding=1), nn.Conv1d(18, 8, 1), nn.ReLU(), nn.Conv1d(8, 4, 1)),
        IMAGE,
        [8],
    ),
    "power mean pooling": (nn.Sequential(conv(3, 8), nn.ReLU(), nn.LPPool2d(2, 3), conv(8, 4)), IMAGE, [8]),
    "power mean pooling 1d": (
        nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.LPPool1d(2, 3), nn.Conv1d(8, 4, 1)),
        torch.randn(2, 3, 12),
        [8],
    ),
    "max unpooling": (Unpooled(), IMAGE, []),
    "rms norm": (nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3)), torch.randn(2, 5, 6), [8]),
    "rms norm without scale": (
        nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8, eps=1e-2, elementwise_affine=False), nn.Linear(8, 3)),
        torch.randn(2, 6),
        [8],
    ),
    "local response norm": (nn.Sequential(conv(3, 8), nn.LocalResponseNorm(3), conv(8, 4)), IMAGE, []),
    "weight norm": (
        nn.Sequential(weight_norm(conv(3, 8)), nn.ReLU(), weight_norm(conv(8, 6)), nn.ReLU(), conv(6, 4)),
        IMAGE,
        [8, 6],
    ),
    "weight norm on the other axis": (
        nn.Sequential(weight_norm(nn.Linear(6, 8), dim=1), nn.ReLU(), weight_norm(nn.Linear(8, 3), dim=1)),
        torch.randn(2, 6),
        [8],
    ),
    "spectral norm": (
        nn.Sequential(spectral_norm(conv(3, 8)), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4)),
        IMAGE,
        [6, 8],
    ),
    "dropout": (nn.Sequential(conv(3, 8), nn.Dropout2d(0.5), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "softmax over channels freezes them": (
        nn.Sequential(conv(3, 8), nn.Softmax(1), conv(8, 6), nn.ReLU(), conv(6, 2)),
        IMAGE,
        [6],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_cut_right(name):
    model, inputs, sizes = LAYERS[name]
    assert_cut_is_right(model, inputs, sizes=sizes)


def cat_with_image(self, x):
    return torch.cat([x, IMAGE[:, :2]], 1)


BETWEEN = {
    "reduce mean": (lambda _, x: x.mean((2, 3)), nn.Linear(8, 3), {}, [8]),
    "reduce mean, negative axes": (lambda _, x: x.mean((-1, -2)), nn.Linear(8, 3), {}, [8]),
    "reduce mean, axes kept": (lambda _, x: x * x.mean((2, 3), keepdim=True), conv(8, 4), {}, [8]),
    "mean over channels": (lambda _, x: x * x.sigmoid().mean(1, keepdim=True), conv(8, 4), {}, [8]),
    "sum over channels": (lambda _, x: x * x.sigmoid().sum(1, keepdim=True), conv(8, 4), {}, [8]),
    "max over channels": (lambda _, x: x * x.max(1, keepdim=True)[0], conv(8, 4), {}, [8]),
    "min over channels without them": (lambda _, x: x * x.min(dim=1).values.unsqueeze(1), conv(8, 4), {}, [8]),
    "which channel is largest": (
        lambda _, x: x * x.max(1, keepdim=True)[1].to(x.dtype),
        conv(8, 4),
        {},
        [],
    ),
    "amax over channels": (lambda _, x: x * x.amax(1, keepdim=True), conv(8, 4), {}, [8]),
    "unit length over channels": (lambda _, x: F.normalize(x, dim=1), conv(8, 4), {}, [8]),
    "scale by a parameter": (lambda s, x: x * s.gamma, conv(8, 4), {"gamma": nn.Parameter(torch.ones(8, 1, 1))}, [8]),
    "scale by a constant freezes": (lambda _, x: x * torch.arange(8.0).reshape(8, 1, 1), conv(8, 4), {}, []),
    "cat on channels": (lambda _, x: torch.cat([x, x * 2], 1), conv(16, 4), {}, [8]),
    "cat with the image": (cat_with_image, conv(10, 4), {}, [8]),
    "cat on space": (lambda _, x: torch.cat([x, x * 2], -1), conv(8, 4), {}, [8]),
    "stack and sum": (lambda _, x: torch.stack([x, x.tanh()], 1).sum(1), conv(8, 4), {}, [8]),
    "chunk": (lambda _, x: torch.mul(*x.chunk(2, 1)), conv(4, 4), {}, [4]),
    "chunk on the last axis": (
        lambda _, x: torch.mul(*x.permute(0, 2, 3, 1).chunk(2, -1)).permute(0, 3, 1, 2),
        conv(4, 4),
        {},
        [4],
    ),
    "split by a number freezes": (lambda _, x: torch.mul(*x.split(4, 1)), conv(4, 4), {}, []),
    "split by an attribute": (lambda s, x: torch.mul(*x.split(s.half, 1)), conv(4, 4), {"half": 4}, [4]),
    "split by attributes": (
        lambda s, x: torch.cat(list(reversed(x.split([s.first, s.second], 1))), 1),
        conv(8, 4),
        {"first": 2, "second": 6},
        [8],
    ),
    "split by a tuple attribute": (
        lambda s, x: torch.cat(list(reversed(torch.split(x, s.parts, 1))), 1),
        conv(8, 4),
        {"parts": (3, 5)},
        [8],
    ),
    "slice by a number keeps what is before it": (
        lambda _, x: torch.cat([x[:, 3:], x[:, :3]], 1),
        conv(8, 4),
        {},
        [5],
    ),
    "slice by an attribute": (
        lambda s, x: torch.cat([x[:, s.at :], x[:, : s.at]], 1),
        conv(8, 4),
        {"at": 3},
        [8],
    ),
    "slice by an expression": (
        lambda s, x: torch.cat([x[:, s.at // 2 :], x[:, : s.at // 2]], 1),
        conv(8, 4),
        {"at": 6},
        [8],
    ),
    "slice from the end freezes": (lambda _, x: torch.cat([x[:, -3:], x[:, :-3]], 1), conv(8, 4), {}, []),
    "slice with a stride freezes": (lambda _, x: torch.cat([x[:, ::2], x[:, 1::2]], 1), conv(8, 4), {}, []),
    "slice of space": (lambda _, x: x[:, :, ::2, 1:], conv(8, 4), {}, [8]),
    "slice of length one": (lambda _, x: x * x[:, :1].sigmoid(), conv(8, 4), {}, [7]),
    "narrow": (lambda s, x: x.narrow(1, 0, s.at) + 1, conv(6, 4), {"at": 6}, [6, 2]),
    "narrow to all by an attribute": (lambda s, x: x.narrow(1, 0, s.width), conv(8, 4), {"width": 8}, [8]),
    "narrow to all by a number freezes": (lambda _, x: x.narrow(1, 0, 8), conv(8, 4), {}, []),
    "narrow from the middle": (
        lambda s, x: torch.cat([x.narrow(1, s.at, s.rest), x.narrow(1, 0, s.at)], 1),
        conv(8, 4),
        {"at": 3, "rest": 5},
        [8],
    ),
    "slice to all by an attribute": (lambda s, x: x[:, : s.width], conv(8, 4), {"width": 8}, [8]),
    "tensor_split freezes": (lambda _, x: torch.mul(*x.tensor_split(2, 1)), conv(4, 4), {}, []),
    "chunk into fewer parts than asked for freezes": (
        lambda _, x: torch.cat(list(reversed(x.chunk(5, 1))), 1),
        conv(8, 4),
        {},
        [],
    ),
    "split by keyword": (lambda s, x: torch.mul(*x.split(split_size=s.half, dim=1)), conv(4, 4), {"half": 4}, [4]),
    "select freezes the axis": (lambda _, x: x * x[:, 0:1] + x[:, 2].unsqueeze(1), conv(8, 4), {}, []),
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
    "view by its own sizes": (
        lambda _, x: x.view(x.size(0), x.shape[1], -1).relu().view(x.shape),
        conv(8, 4),
        {},
        [8],
    ),
    "view as another": (lambda _, x: x.flatten(2).relu().view_as(x), conv(8, 4), {}, [8]),
    "view as a stranger ties the two": (
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
    "view by the width that a layer shows": (
        lambda s, x: x.view(2, s.after.in_channels, 64).view(2, -1, 8, 8),
        conv(8, 4),
        {},
        [8],
    ),
    "a cut axis whose size is used on an axis that stays": (
        lambda s, x: x + (x.flatten(2) @ s.mix).reshape(x.shape[0], x.shape[1], 8, 8),
        conv(8, 4),
        {"mix": nn.Parameter(torch.randn(64, 64))},
        [8],
    ),
    "flatten before linear by attribute": (
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
    "expand beside another freezes neither": (
        lambda s, x: torch.cat([x, s.gate(x).expand_as(x)], 1),
        conv(16, 4),
        {"gate": conv(8, 1)},
        [8],
    ),
    "expand of one channel follows": (lambda s, x: x * s.gate(x).expand_as(x), conv(8, 4), {"gate": conv(8, 1)}, [8]),
    "pad on channels by attributes": (
        lambda s, x: F.pad(x, (0, 0, 0, 0, s.left, s.right)),
        conv(12, 4),
        {"left": 1 + 1, "right": 2},
        [8, 4],
    ),
    "pad on channels by numbers stays": (lambda _, x: F.pad(x, (0, 0, 0, 0, 2, 2)), conv(12, 4), {}, [8]),
    "pad on space": (lambda _, x: F.pad(x, (1, 1, 2, 0), mode="reflect"), conv(8, 4), {}, [8]),
    "pad by one attribute twice ties both sides": (
        lambda s, x: F.pad(x, (0, 0, 0, 0, s.side, s.side)),
        conv(12, 4),
        {"side": 2},
        [8, 2],
    ),
    "type as another": (lambda s, x: x.type_as(s.other.weight), conv(8, 4), {"other": nn.Linear(5, 7)}, [8]),
    "a weight that is a vector freezes": (
        lambda s, x: x + F.linear(x.permute(0, 2, 3, 1), s.vector).unsqueeze(1),
        conv(8, 4),
        {"vector": nn.Parameter(torch.randn(8))},
        [],
    ),
    "a width as a number freezes": (lambda _, x: x * x.shape[1], conv(8, 4), {}, []),
    "a width in a root freezes": (lambda _, x: x * x.shape[1] ** -0.5, conv(8, 4), {}, []),
    "a width as a float freezes": (lambda _, x: x / math.sqrt(x.size(1)), conv(8, 4), {}, []),
    "a count of numbers freezes": (lambda _, x: x / x.numel(), conv(8, 4), {}, []),
    "a length freezes": (lambda _, x: x / len(x[0]), conv(8, 4), {}, []),
    "a width that is a kernel too freezes": (
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
    "logarithm of a removed channel": (
        lambda _, x: (x.mean((2, 3), keepdim=True) + 1e-9).log() + x,
        conv(8, 4),
        {},
        [8],
    ),
    "unit sum over space": (lambda _, x: (x + 1) / (x + 1).sum((2, 3), keepdim=True), conv(8, 4), {}, [8]),
    "largest of pairs": (lambda _, x: x.view(2, x.shape[1] // 2, 2, 8, 8).amax(2), conv(4, 4), {}, [4]),
    "attention that shows its weights": (
        lambda s, x: (s.attend(*[x.flatten(2).transpose(1, 2)] * 3)[0]).transpose(1, 2).unflatten(2, (8, 8)),
        conv(8, 4),
        {"attend": nn.MultiheadAttention(8, 2, batch_first=True)},
        [2, 8],
    ),
    "variance over channels": (lambda _, x: x * x.var(1, keepdim=True), conv(8, 4), {}, [8]),
    "variance over channels, biased": (lambda _, x: x * x.var(1, False, keepdim=True), conv(8, 4), {}, [8]),
    "variance over space": (lambda _, x: x * x.var((2, 3), correction=0, keepdim=True), conv(8, 4), {}, [8]),
    "deviation over channels": (lambda _, x: x * x.std(dim=1, keepdim=True), conv(8, 4), {}, [8]),
    "norm over channels": (lambda _, x: x * x.norm(dim=1, keepdim=True), conv(8, 4), {}, [8]),
    "norm of order one": (lambda _, x: x * torch.linalg.vector_norm(x, 1, 1, True), conv(8, 4), {}, [8]),
    "norm over space": (lambda _, x: x * x.norm(2, (2, 3), True), conv(8, 4), {}, [8]),
    "sum of numbers": (lambda _, x: x * x.nansum(1, keepdim=True), conv(8, 4), {}, [8]),
    "smallest over channels": (lambda _, x: x * x.amin(1, keepdim=True), conv(8, 4), {}, [8]),
    "rms norm spelled out": (
        lambda s, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * s.gamma,
        conv(8, 4),
        {"gamma": nn.Parameter(torch.ones(8, 1, 1))},
        [8],
    ),
    "variance and mean": (lambda _, x: torch.var_mean(x, (2, 3), keepdim=True)[0] * x, conv(8, 4), {}, [8]),
    "variance and mean over channels": (
        lambda _, x: torch.var_mean(x, 1, keepdim=True)[1] * x,
        conv(8, 4),
        {},
        [],
    ),
    "product over space": (lambda _, x: x * x.flatten(2)[..., :2].prod(2)[..., None, None], conv(8, 4), {}, [8]),
    "median over space": (lambda _, x: x * x.flatten(2).median(2)[0][..., None, None], conv(8, 4), {}, [8]),
    "logsumexp over space": (lambda _, x: x * x.logsumexp((2, 3), keepdim=True), conv(8, 4), {}, [8]),
    "logsumexp over channels": (lambda _, x: x * x.logsumexp(1, keepdim=True), conv(8, 4), {}, []),
    "any over space": (lambda _, x: x * (x > 1).any(2, keepdim=True), conv(8, 4), {}, [8]),
    "any over channels": (lambda _, x: x * (x > 1).any(1, keepdim=True), conv(8, 4), {}, []),
    "larger of two": (lambda s, x: torch.max(x, s.other(x)), conv(8, 4), {"other": conv(8, 8)}, [8]),
    "largest over space": (lambda _, x: x * x.flatten(2).max(2)[0][..., None, None], conv(8, 4), {}, [8]),
    "min of all": (lambda _, x: x * x.min(), conv(8, 4), {}, []),
    "flip": (lambda _, x: x + x.flip(1), conv(8, 4), {}, [4]),
    "flip of space": (lambda _, x: x + x.flip((2, -1)), conv(8, 4), {}, [8]),
    "roll of space": (lambda _, x: x + x.roll((1, 2), (2, 3)), conv(8, 4), {}, [8]),
    "roll of channels": (lambda _, x: x + x.roll(1, 1), conv(8, 4), {}, []),
    "roll of all": (lambda _, x: x + x.roll(1), conv(8, 4), {}, []),
    "repeat": (lambda _, x: x.repeat(1, 2, 1, 1), conv(16, 4), {}, [8]),
    "repeat with a new axis": (lambda _, x: x.repeat(2, 1, 1, 2, 1)[0], conv(8, 4), {}, [8]),
    "repeat of one channel": (
        lambda s, x: x * s.gate(x).repeat(1, x.shape[1], 1, 1),
        conv(8, 4),
        {"gate": conv(8, 1)},
        [8],
    ),
    "repeat of one channel by a number": (
        lambda s, x: x * s.gate(x).repeat(1, 8, 1, 1),
        conv(8, 4),
        {"gate": conv(8, 1)},
        [],
    ),
    "tile": (lambda _, x: x.tile(2, 1, 1), conv(16, 4), {}, [8]),
    "repeat_interleave": (lambda _, x: x.repeat_interleave(2, 1), conv(16, 4), {}, [8]),
    "repeat_interleave by keyword": (lambda _, x: x.repeat_interleave(repeats=2, dim=1), conv(16, 4), {}, [8]),
    "repeat_interleave of all": (lambda _, x: x.repeat_interleave(2).view(2, 8, 8, 16), conv(8, 4), {}, []),
    "unbind of space": (lambda _, x: torch.stack(x.unbind(2)[::-1], 2), conv(8, 4), {}, [8]),
    "unbind of channels": (lambda _, x: torch.stack(x.unbind(1), 1), conv(8, 4), {}, []),
    "windows": (lambda _, x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)), conv(8, 4), {}, [8]),
    "windows of channels": (lambda _, x: x.unfold(1, 2, 2).mean(-1), conv(4, 4), {}, []),
    "antialiased resizing": (
        lambda _, x: F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True),
        conv(8, 4),
        {},
        [8],
    ),
    "grid sampling": (
        lambda _, x: F.grid_sample(x, torch.linspace(-1, 1, 64).view(2, 4, 4, 2), align_corners=False),
        conv(8, 4),
        {},
        [8],
    ),
    "space to depth": (
        lambda _, x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1),
        conv(32, 4),
        {},
        [8],
    ),
    "space to depth by a view": (
        lambda _, x: x.view(x.shape[0], x.shape[1], 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4).reshape(2, -1, 4, 4),
        conv(32, 4),
        {},
        [8],
    ),
    "stack and flatten": (lambda _, x: torch.stack([x, x.tanh()], 1).flatten(1, 2), conv(16, 4), {}, [8]),
    "stack and flatten, interleaved": (lambda _, x: torch.stack([x, x.tanh()], 2).flatten(1, 2), conv(16, 4), {}, [8]),
    "fractional pooling": (
        lambda _, x: F.fractional_max_pool2d(x, 2, 3, _random_samples=torch.full((2, 8, 2), 0.3)),
        conv(8, 4),
        {},
        [],
    ),
    "real part of a transform": (lambda _, x: torch.fft.fft2(x).real, conv(8, 4), {}, []),
    "complex numbers": (lambda _, x: torch.view_as_real(torch.complex(x, x.tanh())).sum(-1), conv(8, 4), {}, [8]),
    "complex numbers of pairs": (
        lambda _, x: torch.view_as_complex(x.permute(0, 2, 3, 1).unflatten(-1, (-1, 2)).contiguous()).abs(),
        nn.Linear(4, 4),
        {},
        [4],
    ),
    "zeros like": (lambda _, x: torch.cat([x, torch.zeros_like(x)], 1), conv(16, 4), {}, [8]),
    "zeros made by an attribute": (
        lambda s, x: torch.cat([x, torch.zeros(2, s.width, 8, 8)], 1),
        conv(14, 4),
        {"width": 6},
        [8, 6],
    ),
    "zeros made by a number stay": (lambda _, x: torch.cat([x, x.new_zeros(2, 6, 8, 8)], 1), conv(14, 4), {}, [8]),
    "residual": (lambda s, x: x + s.inner(x).relu(), conv(8, 4), {"inner": conv(8, 8)}, [8]),
    "two branches": (
        lambda s, x: s.left(x).relu() + s.right(x),
        conv(6, 4),
        {"left": conv(8, 6), "right": conv(8, 6)},
        [8, 6],
    ),
    "a module used twice": (lambda s, x: s.inner(s.inner(x).relu()), conv(8, 4), {"inner": conv(8, 8)}, [8]),
    "a product of all pairs becomes space": (
        lambda _, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).unsqueeze(1),
        conv(1, 4),
        {},
        [],
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_layers_is_cut_right(name):
    between, after, numbers, sizes = BETWEEN[name]
    model = Net(nn.Sequential(conv(3, 8), nn.ReLU()), between, after, **numbers)
    assert_cut_is_right(model, IMAGE, sizes=sizes)


def test_numbers_in_the_code_are_named_with_their_line():
    model = Net(conv(3, 8), lambda _, x: x.view(2, 8, 64).relu().view(2, 8, 8, 8), conv(8, 4))
    graph, _ = assert_cut_is_right(model, IMAGE)
    assert "number in the code" in graph.blockers[0].reason
    assert graph.blockers[0].source.startswith("test_operators.py:")


def test_an_operator_without_a_rule_is_named():
    model = Net(conv(3, 8), lambda _, x: torch.fft.fft(x, dim=1).abs(), conv(8, 4))
    graph, _ = assert_cut_is_right(model, IMAGE, sizes=[])
    assert "there is no rule for aten.fft_fft" in graph.blockers[0].reason
    assert graph.blockers[0].share == pytest.approx(1.0, abs=0.1)


def fails(step):
    raise KeyError("x")


FAULTS = {
    "loses 8 labels": lambda step: Tensor.of(step.shape),
    r"gives shapes \[\(8,\)\] where the operator gives \[\(2, 8, 8, 8\)\]": lambda step: Tensor.of(
        [8], [step.args[0].axes[1]]
    ),
    "fails: KeyError: 'x'": fails,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rule_that_fails_freezes_what_it_touches_and_warns(fault, monkeypatch):
    monkeypatch.setitem(operators.RULES, "relu", FAULTS[fault])
    with pytest.warns(RuntimeWarning, match=f"The rule of relu {fault}.*please report"):
        graph, _ = assert_cut_is_right(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), IMAGE, sizes=[])
    assert "the rule for aten.relu does not fit here" in {blocker.reason for blocker in graph.blockers}
