"""Noise of the verification: each tensor that needs it has noise, and a wrong cut of a large weight is seen without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import VerificationError
from kirsch.frameworks.pytorch.surgery.cut import cut
from kirsch.frameworks.pytorch.verification.noise import ConvertedTensors, Noise, named_tensors
from kirsch.frameworks.pytorch.verification.verify import verify
from kirsch.graph.labels import Tensor

SHAPE = (512, 512)


def changed(change):
    weight = 0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    change(weight)
    return weight


def assign(index, value):
    def change(weight):
        weight[index] = weight[value].clone() if isinstance(value, tuple) else value

    return change


NEEDED = {
    "zero": assign(slice(None), 0.0),
    "constant": assign(slice(None), 0.5),
    "small": lambda weight: weight.mul_(1e-3),
    "two rows are zero": assign([3, 400], 0.0),
    "two columns are zero": assign((slice(None), [3, 400]), 0.0),
    "two rows are equal": assign((3,), (400,)),
    "half of the rows is zero": assign(slice(256, None), 0.0),
    "the upper triangle is zero": lambda weight: weight.tril_(),
    "nan": assign((3, 256), float("nan")),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_large_weight_with_equal_or_small_slices_has_noise(name):
    layer = nn.Linear(*SHAPE, bias=False)
    layer.weight.data = changed(NEEDED[name])
    assert Noise(layer).changes(id(layer.weight))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(512, 512), {"weight": False, "bias": True}),
        (nn.Linear(511, 512), {"weight": True, "bias": True}),
        (nn.Conv2d(256, 128, 3), {"weight": False, "bias": True}),
        (nn.Embedding(1000, 300, padding_idx=0), {"weight": False}),
        (nn.BatchNorm1d(1 << 18), {"weight": True, "bias": True, "running_mean": True, "running_var": True}),
    ],
    ids=str,
)
def test_small_tensors_and_vectors_have_noise_and_large_weights_have_none(layer, expected):
    noise = Noise(layer)
    tensors = named_tensors(layer)
    assert {name: noise.changes(id(tensors[name])) for name in expected} == expected
    for name, changes in expected.items():
        value = tensors[name].detach()
        converted = ConvertedTensors(layer, noise, torch.float64)[name]
        assert converted.dtype is torch.float64
        assert torch.equal(converted, value.double()) is not changes
        other = Noise(layer, factor=-10.0)
        assert not torch.equal(other.added(id(tensors[name]), torch.float32), value)


def test_a_tensor_that_is_only_read_is_not_copied():
    layer = nn.Linear(512, 512)
    for read_only in (True, False):
        found = ConvertedTensors(layer, Noise(layer), torch.float32, read_only=read_only)
        assert (found["weight"].data_ptr() == layer.weight.data_ptr()) is read_only
        assert found["bias"].data_ptr() != layer.bias.data_ptr()
    double = ConvertedTensors(layer, Noise(layer), torch.float64, read_only=True)["weight"]
    assert torch.equal(double, layer.weight.detach().double())


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 600), nn.GELU(), nn.Linear(600, 600), nn.GELU(), nn.Linear(600, 4))


def equal_slices(model):
    """Make all slices of the large weight equal; only noise shows the units that a wrong cut keeps."""
    model[2].weight.data[:] = model[2].weight.data[0, 0]


@pytest.mark.parametrize("change", [lambda model: None, equal_slices], ids=["different slices", "equal slices"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_large_weight_that_is_cut_at_wrong_units_is_rejected(axis, change):
    model = wide().eval()
    change(model)
    graph = kirsch.trace(model, torch.randn(2, 16))
    assert Noise(model).changes(id(model[2].weight)) is (change is equal_slices)
    keep = graph.keep({group.name: tuple(range(0, 600, 2)) for group in graph.groups})
    assert verify(cut(model, graph, keep), model, graph, keep).passed
    weight = graph.tensors["2.weight"]
    axes = [labels[::-1] if number == axis else labels for number, labels in enumerate(weight.axes)]
    graph.tensors["2.weight"] = Tensor.of(weight.shape, axes)  # a wrong analysis: kept units are removed on this axis
    with pytest.raises(VerificationError, match=r"The cut is wrong"):
        verify(cut(model, graph, keep), model, graph, keep)
