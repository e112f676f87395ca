"""The fingerprint of a model's weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kirsch.frameworks.find import framework_of
from kirsch.frameworks.pytorch.io.fingerprint import fingerprint


def network():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2, dtype=torch.bfloat16))
    model[0].register_buffer("scale", torch.ones(2), persistent=False)
    return model


def flip(model):
    model[0].weight.view(torch.int32)[1, 0, 2, 2] ^= 1


@pytest.mark.parametrize(
    "change",
    [
        flip,
        lambda m: m[1].running_mean.add_(1),
        lambda m: m[1].num_batches_tracked.add_(1),
        lambda m: m[0].scale.add_(1),
        lambda m: m[2].bias.view(torch.int16).bitwise_xor_(1),
        lambda m: m.double(),
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.reshape(1, 2, 3, 3))),
        lambda m: m.append(nn.Linear(1, 1)),
        lambda m: m.register_module("0x", m._modules.pop("0")),
    ],
)
def test_any_change_of_bits_shapes_dtypes_or_names_changes_the_fingerprint(change):
    model = network()
    other = copy.deepcopy(model)
    assert fingerprint(other) == fingerprint(model)
    with torch.no_grad():
        change(other)
    assert fingerprint(other) != fingerprint(model)


def test_mode_requires_grad_and_memory_layout_do_not_change_the_fingerprint():
    model = network()
    other = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
    other[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    assert framework_of(model).inference.fingerprint(other) == fingerprint(model)


def test_the_order_of_modules_does_not_change_the_fingerprint_and_their_names_do():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    one, two = nn.ModuleDict({"a": first, "b": second}), nn.ModuleDict({"b": second, "a": first})
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(one) != fingerprint(nn.ModuleDict({"a": second, "b": first}))
