"""Activations and standard layers: half of all units are removed, and the rest equals the masked model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from frameworks.pytorch.analysis.networks import IMAGE, Between, conv
from trace_and_cut import assert_pruned_correctly


class Unpooled(nn.Module):
    """Max pooling with indices, and its inverse."""

    def __init__(self):
        super().__init__()
        self.before, self.after = conv(3, 8), conv(8, 4)

    def forward(self, x):
        pooled, indices = F.max_pool2d(self.before(x), 2, return_indices=True)
        return self.after(F.max_unpool2d(pooled, indices, 2))


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
def test_activations_keep_the_labels_of_channels(activation):
    assert_pruned_correctly(Between(conv(3, 8), lambda _, x: activation(x), conv(8, 4)), IMAGE, sizes=[8])


LAYERS = {
    "linear": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 6), [8]),
    "linear over tokens": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5, 6), [8]),
    "conv1d": (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), torch.randn(2, 3, 12), [8]),
    "conv2d": (nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), IMAGE, [8]),
    "conv3d": (nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 1)), torch.randn(2, 3, 4, 4, 4), [8]),
    "convolution without a batch axis": (nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), torch.randn(3, 8, 8), [8]),
    "strided, dilated and reflected convolution": (
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
    "group norm of several groups": (
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
def test_a_network_with_the_layer_is_pruned_correctly(name):
    model, inputs, sizes = LAYERS[name]
    assert_pruned_correctly(model, inputs, sizes=sizes)
