"""Weights to a file and back: bit for bit, in their types, or refused by name."""

from __future__ import annotations

import json
import os
import struct

import pytest
import safetensors.torch
import torch
from torch import nn

from kirsch.errors import LoadError, ModelError
from kirsch.frameworks.pytorch.io.weights import load_weights, save_weights, take_types


class Versioned(nn.Module):
    """Reads the version of its weights, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be set to 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.second.weight = self.third.weight = self.first.weight


class Loose(nn.Module):
    """`Tied`, with weights of its own in each layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))


class Holding(nn.Module):
    """One buffer."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("held", value)


class Aside(nn.Module):
    """A buffer that the state dict leaves out, as tables of positions are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.linspace(0, 1, 4), persistent=False)


def bits(model):
    """Every tensor of a state dict, with its type and bytes."""
    return {
        name: (value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, value in model.state_dict().items()
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("build", [Versioned, Tied, lambda: nn.BatchNorm1d(4), lambda: nn.Linear(4, 3).half()])
def test_weights_come_back_bit_for_bit(build, path):
    model, other = build(), build()
    save_weights(model, path)
    load_weights(other, path)
    assert bits(model) == bits(other)


TYPES = ["float16", "bfloat16", "float64", "float8_e4m3fn", "complex64", "bool", "uint8", "int8", "int64", "uint16"]


@pytest.mark.parametrize("name", TYPES)
def test_every_type_comes_back(name, path):
    value = torch.tensor([1.0, 0.0, 3.5]).to(getattr(torch, name))
    save_weights(Holding(value), path)
    other = Holding(torch.zeros_like(value))
    load_weights(other, path)
    assert bits(other) == bits(Holding(value))


@pytest.mark.parametrize("value", [torch.zeros(0, 3), torch.tensor(2.0), torch.arange(6.0).reshape(2, 3).T])
def test_empty_single_and_transposed_tensors_come_back(value, path):
    save_weights(Holding(value), path)
    other = Holding(torch.ones_like(value))
    load_weights(other, path)
    assert bits(other) == bits(Holding(value))


def test_numbers_that_are_not_finite_come_back(path):
    value = torch.tensor([float("nan"), float("-inf"), -0.0])
    save_weights(Holding(value), path)
    other = Holding(torch.zeros(3))
    load_weights(other, path)
    assert bits(other) == bits(Holding(value))


# ------------------------------------------------------------------------------------------------ shared tensors


def test_tied_weights_are_stored_once_and_stay_tied(path):
    model = Tied()
    save_weights(Tied(), path)
    load_weights(model, path)
    assert model.second.weight is model.third.weight is model.first.weight
    assert list(safetensors.torch.load_file(path)) == ["first.weight"]


def test_the_bytes_of_a_file_follow_from_the_model_alone(path):
    """A run whose model has tied weights is resumed to the same bits; notes on them came in random order."""
    model, found = Tied(), set()
    for _ in range(20):
        save_weights(model, path)
        found.add(path.read_bytes())
    assert len(found) == 1


def test_a_file_of_save_model_is_taken(path):
    model, other = Tied(), Tied()
    safetensors.torch.save_model(model, str(path))
    load_weights(other, path)
    assert bits(other) == bits(model)


def test_overlapping_tensors_come_back(path):
    def build():
        model, whole = Loose(), torch.randn(8, 4)
        model.first.weight.data, model.second.weight.data = whole[:4], whole[2:6]
        return model

    model, other = build(), build()
    save_weights(model, path)
    load_weights(other, path)
    assert bits(other) == bits(model)


def test_tied_weights_that_differ_in_the_file_are_refused(path):
    save_weights(Loose(), path)
    with pytest.raises(LoadError, match=r"other values in .*weight.*: it shares tensors that the file keeps apart"):
        load_weights(Tied(), path)


def test_loose_weights_that_the_file_has_once_are_named(path):
    save_weights(Tied(), path)
    with pytest.raises(LoadError, match=r"The file lacks second\.weight, third\.weight\."):
        load_weights(Loose(), path)


# ------------------------------------------------------------------------------------------------ types


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_the_file_are_restored_where_that_is_asked(kind, path):
    model, other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).to(kind)), nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4)
    )  # fmt: skip
    save_weights(model, path)
    assert take_types(other, path)
    load_weights(other, path)
    assert not take_types(other, path)
    assert bits(other) == bits(model)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in other.parameters())


def test_tied_weights_stay_tied_when_their_type_is_restored(path):
    model, other = Tied().half(), Tied()
    save_weights(model, path)
    assert take_types(other, path)
    load_weights(other, path)
    assert not take_types(other, path)
    assert bits(other) == bits(model)
    assert other.second.weight is other.first.weight


def test_buffers_outside_the_state_dict_take_their_type_too(path):
    model, other, plain = Aside().half(), Aside(), Aside()
    save_weights(model, path)
    assert take_types(other, path)
    load_weights(other, path)
    assert not take_types(other, path)
    load_weights(plain, path)
    assert other.table.dtype == torch.float16
    assert torch.equal(other.table, model.table)
    assert plain.table.dtype == torch.float32


@pytest.mark.parametrize(("narrow", "wide"), [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64")])
def test_a_type_in_which_every_value_fits_is_taken(narrow, wide, path):
    model = nn.Linear(4, 3).to(getattr(torch, narrow))
    other = nn.Linear(4, 3).to(getattr(torch, wide))
    save_weights(model, path)
    load_weights(other, path)
    assert other.weight.dtype == getattr(torch, wide)
    assert torch.equal(other.weight, model.weight.to(other.weight.dtype))


OTHER_KINDS = [
    ("int64", "float32"), ("bool", "float32"), ("float32", "int64"),
    ("float32", "bool"), ("int32", "int64"), ("int8", "float16"),
]  # fmt: skip
NARROWER = [
    ("complex64", "float32"),
    ("float32", "complex64"),
    ("float64", "float32"),
    ("float32", "float16"),
    ("float16", "bfloat16"),
    ("float8_e4m3fn", "float32"),
]


@pytest.mark.parametrize(
    ("stored", "own", "restore"),
    [(*kinds, restore) for kinds in OTHER_KINDS for restore in (False, True)] + [(*kinds, False) for kinds in NARROWER],
)
def test_a_conversion_that_could_change_values_is_refused_with_tensor_and_types(stored, own, restore, path):
    safetensors.torch.save_file({"held": torch.ones(3).to(getattr(torch, stored))}, path)
    model = Holding(torch.zeros(3).to(getattr(torch, own)))
    assert not (restore and take_types(model, path))
    with pytest.raises(LoadError, match=rf"held is {stored} in the file and {own} in the model\."):
        load_weights(model, path)
    assert bool((model.held == 0).all())


@pytest.mark.parametrize(("stored", "own"), [((4, 6), (6, 4)), ((24,), (4, 6)), ((1,), ()), ((5,), ()), ((), (1,))])
def test_another_shape_is_refused_whatever_its_size(stored, own, path):
    """PyTorch itself takes the first element where the model's tensor has no axes."""
    save_weights(Holding(torch.ones(stored)), path)
    with pytest.raises(LoadError, match=r"held has shape \(.*\) in the file and \(.*\) in the model\."):
        load_weights(Holding(torch.zeros(own)), path)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), r"The file lacks 1\.weight, 1\.bias\."),
        (lambda: nn.Sequential(nn.Linear(4, 3, bias=False)), r"The model has no 0\.bias\."),
        (lambda: nn.Sequential(nn.Linear(5, 3)), r"0\.weight has shape \(3, 4\) in the file and \(3, 5\) in the model"),
    ],
)
def test_weights_that_do_not_fit_are_told_by_name(build, why, path):
    save_weights(nn.Sequential(nn.Linear(4, 3)), path)
    with pytest.raises(LoadError, match=rf"do not fit a Sequential\..*{why}.*Give the model that they were saved from"):
        load_weights(build(), path)


# ------------------------------------------------------------------------------------------------ files


def raw(header: str, content: bytes) -> bytes:
    """A safetensors file by hand."""
    return struct.pack("<Q", len(header)) + header.encode() + content


def entry(first: int, end: int, kind: str = "F32", shape: str = "[2]") -> str:
    return f'{{"dtype":"{kind}","shape":{shape},"data_offsets":[{first},{end}]}}'


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"no tensors", "Neither a zip archive nor a pickle"),
        (b"", "an empty file"),
        (raw(f'{{"held":{entry(0, 8)},"held":{entry(0, 8)}}}', bytes(8)), "'held' twice"),
        (raw('{"held":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8)), "dtype"),
        (raw(f'{{"held":{entry(0, 8)},"other":{entry(4, 12)}}}', bytes(12)), "[Oo]ffset"),
        (raw(f'{{"held":{entry(0, 8)}}}', bytes(4)), "(Metadata|header|buffer)"),
        (raw(f'{{"held":{entry(0, 8, "F99")}}}', bytes(8)), "F99"),
        (raw(f'{{"__metadata__":{{"kirsch.buffers":"{{"}},"held":{entry(0, 8)}}}', bytes(8)), "JSON"),
    ],
)
def test_a_file_that_is_not_sound_is_refused(content, why, path):
    path.write_bytes(content)
    with pytest.raises(LoadError, match=rf"The weights .*w\.safetensors cannot be (read|loaded).*{why}"):
        load_weights(Holding(torch.zeros(2)), path)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), os.mkfifo])
def test_a_path_that_is_no_file_is_refused_at_once(make, path):
    make(path)
    with pytest.raises(
        LoadError,
        match=r"weights .*w\.safetensors (are not a file|cannot be (read\. It does not exist|loaded: it is a folder))",
    ):
        load_weights(nn.Linear(4, 3), path)


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Extra(2, 2), r"_extra_state is a dict"),
        (nn.Linear(2, 2, device="meta"), r"bias is a Parameter without values|bias is a Tensor without values"),
        (Holding(torch.zeros(2, dtype=torch.complex128)), r"held is a tensor of complex128"),
    ],
)
def test_what_no_file_can_hold_is_named(model, why, path):
    with pytest.raises(ModelError, match=rf"The weights of .* cannot be written\. {why}"):
        save_weights(model, path)


def test_the_header_is_plain_safetensors(path):
    """Other programs read the file."""
    model = Aside()
    save_weights(model, path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header.pop("__metadata__") == {"kirsch.buffers": '{"table": "float32"}'}
    assert sorted(header) == ["layer.bias", "layer.weight"]
    assert torch.equal(safetensors.torch.load_file(path)["layer.weight"], model.layer.weight)
