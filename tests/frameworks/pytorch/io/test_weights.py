"""Saving and loading weights returns the same bits and dtypes, or raises an error that names the tensor."""

from __future__ import annotations

import json
import os
import struct

import pytest
import safetensors.torch
import torch
from torch import nn

from kirsch.errors import LoadError, ModelError
from kirsch.frameworks.pytorch.io.weights import load_weights, match_dtypes, save_weights


class Versioned(nn.Module):
    """A model that reads the version of its weights, as torchvision's MNASNet does."""

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


class Untied(nn.Module):
    """`Tied`, with separate weights in each layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))


class OneBuffer(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("buffer", value)


class NonPersistent(nn.Module):
    """A model with a buffer that is not in the state dict, like a table of positions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.linspace(0, 1, 4), persistent=False)


def bits(model):
    """Return dtype, shape and bytes of each tensor of a state dict."""
    return {
        name: (value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, value in model.state_dict().items()
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("build", [Versioned, Tied, lambda: nn.BatchNorm1d(4), lambda: nn.Linear(4, 3).half()])
def test_loading_saved_weights_returns_the_same_bits(build, path):
    model, other = build(), build()
    save_weights(model, path)
    load_weights(other, path)
    assert bits(model) == bits(other)


TYPES = ["float16", "bfloat16", "float64", "float8_e4m3fn", "complex64", "bool", "uint8", "int8", "int64", "uint16"]


@pytest.mark.parametrize("name", TYPES)
def test_tensors_of_each_dtype_are_saved_and_loaded(name, path):
    value = torch.tensor([1.0, 0.0, 3.5]).to(getattr(torch, name))
    save_weights(OneBuffer(value), path)
    other = OneBuffer(torch.zeros_like(value))
    load_weights(other, path)
    assert bits(other) == bits(OneBuffer(value))


@pytest.mark.parametrize("value", [torch.zeros(0, 3), torch.tensor(2.0), torch.arange(6.0).reshape(2, 3).T])
def test_empty_scalar_and_transposed_tensors_are_saved_and_loaded(value, path):
    save_weights(OneBuffer(value), path)
    other = OneBuffer(torch.ones_like(value))
    load_weights(other, path)
    assert bits(other) == bits(OneBuffer(value))


def test_nan_infinity_and_negative_zero_are_saved_and_loaded(path):
    value = torch.tensor([float("nan"), float("-inf"), -0.0])
    save_weights(OneBuffer(value), path)
    other = OneBuffer(torch.zeros(3))
    load_weights(other, path)
    assert bits(other) == bits(OneBuffer(value))


# ------------------------------------------------------------------------------------------------ shared tensors


def test_tied_weights_are_stored_once_and_stay_tied(path):
    model = Tied()
    save_weights(Tied(), path)
    load_weights(model, path)
    assert model.second.weight is model.third.weight is model.first.weight
    assert list(safetensors.torch.load_file(path)) == ["first.weight"]


def test_equal_models_give_equal_files(path):
    """`safetensors.torch.save_model` writes its metadata on tied weights in random order, so its files differ."""
    model, contents = Tied(), set()
    for _ in range(20):
        save_weights(model, path)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_a_file_written_by_save_model_of_safetensors_is_loaded(path):
    model, other = Tied(), Tied()
    safetensors.torch.save_model(model, str(path))
    load_weights(other, path)
    assert bits(other) == bits(model)


def test_overlapping_tensors_are_saved_and_loaded(path):
    def build():
        model, storage = Untied(), torch.randn(8, 4)
        model.first.weight.data, model.second.weight.data = storage[:4], storage[2:6]
        return model

    model, other = build(), build()
    save_weights(model, path)
    load_weights(other, path)
    assert bits(other) == bits(model)


def test_tied_weights_that_differ_in_the_file_raise_an_error(path):
    save_weights(Untied(), path)
    with pytest.raises(
        LoadError, match=r"loaded values of .*weight.* differ from the file, because the model ties tensors"
    ):
        load_weights(Tied(), path)


def test_the_error_for_untied_weights_that_are_tied_in_the_file_names_the_missing_tensors(path):
    save_weights(Tied(), path)
    with pytest.raises(LoadError, match=r"The file lacks second\.weight, third\.weight\."):
        load_weights(Untied(), path)


# ------------------------------------------------------------------------------------------------ types


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_match_dtypes_converts_a_model_to_the_dtypes_of_the_file(kind, path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).to(kind))
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    save_weights(model, path)
    assert match_dtypes(other, path)
    load_weights(other, path)
    assert not match_dtypes(other, path)
    assert bits(other) == bits(model)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in other.parameters())


def test_match_dtypes_keeps_tied_weights_tied(path):
    model, other = Tied().half(), Tied()
    save_weights(model, path)
    assert match_dtypes(other, path)
    load_weights(other, path)
    assert not match_dtypes(other, path)
    assert bits(other) == bits(model)
    assert other.second.weight is other.first.weight


def test_match_dtypes_converts_non_persistent_buffers(path):
    model, other, plain = NonPersistent().half(), NonPersistent(), NonPersistent()
    save_weights(model, path)
    assert match_dtypes(other, path)
    load_weights(other, path)
    assert not match_dtypes(other, path)
    load_weights(plain, path)
    assert other.table.dtype == torch.float16
    assert torch.equal(other.table, model.table)
    assert plain.table.dtype == torch.float32


@pytest.mark.parametrize(("narrow", "wide"), [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64")])
def test_weights_of_a_narrower_dtype_are_loaded(narrow, wide, path):
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
    ("stored", "current", "restore"),
    [(*kinds, restore) for kinds in OTHER_KINDS for restore in (False, True)] + [(*kinds, False) for kinds in NARROWER],
)
def test_the_error_for_a_lossy_conversion_names_tensor_and_dtypes(stored, current, restore, path):
    safetensors.torch.save_file({"buffer": torch.ones(3).to(getattr(torch, stored))}, path)
    model = OneBuffer(torch.zeros(3).to(getattr(torch, current)))
    assert not (restore and match_dtypes(model, path))
    with pytest.raises(LoadError, match=rf"buffer is {stored} in the file and {current} in the model\."):
        load_weights(model, path)
    assert bool((model.buffer == 0).all())


@pytest.mark.parametrize(("stored", "current"), [((4, 6), (6, 4)), ((24,), (4, 6)), ((1,), ()), ((5,), ()), ((), (1,))])
def test_another_shape_raises_an_error(stored, current, path):
    """PyTorch itself would load the first element into a tensor without axes."""
    save_weights(OneBuffer(torch.ones(stored)), path)
    with pytest.raises(LoadError, match=r"buffer has shape \(.*\) in the file and \(.*\) in the model\."):
        load_weights(OneBuffer(torch.zeros(current)), path)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), r"The file lacks 1\.weight, 1\.bias\."),
        (lambda: nn.Sequential(nn.Linear(4, 3, bias=False)), r"The model has no 0\.bias\."),
        (lambda: nn.Sequential(nn.Linear(5, 3)), r"0\.weight has shape \(3, 4\) in the file and \(3, 5\) in the model"),
    ],
)
def test_the_error_for_weights_that_do_not_fit_names_the_tensors(build, why, path):
    save_weights(nn.Sequential(nn.Linear(4, 3)), path)
    with pytest.raises(
        LoadError, match=rf"do not fit a Sequential\..*{why}.*Give the model from which they were saved"
    ):
        load_weights(build(), path)


# ------------------------------------------------------------------------------------------------ files


def raw(header: str, content: bytes) -> bytes:
    """Return the bytes of a safetensors file."""
    return struct.pack("<Q", len(header)) + header.encode() + content


def entry(first: int, end: int, kind: str = "F32", shape: str = "[2]") -> str:
    return f'{{"dtype":"{kind}","shape":{shape},"data_offsets":[{first},{end}]}}'


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"no tensors", "does not start like a zip archive, a pickle"),
        (b"", "an empty file"),
        (raw(f'{{"buffer":{entry(0, 8)},"buffer":{entry(0, 8)}}}', bytes(8)), "'buffer' twice"),
        (raw('{"buffer":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8)), "dtype"),
        (raw(f'{{"buffer":{entry(0, 8)},"other":{entry(4, 12)}}}', bytes(12)), "[Oo]ffset"),
        (raw(f'{{"buffer":{entry(0, 8)}}}', bytes(4)), "(Metadata|header|buffer)"),
        (raw(f'{{"buffer":{entry(0, 8, "F99")}}}', bytes(8)), "F99"),
        (raw(f'{{"__metadata__":{{"kirsch.buffers":"{{"}},"buffer":{entry(0, 8)}}}', bytes(8)), "JSON"),
    ],
)
def test_an_invalid_file_raises_an_error(content, why, path):
    path.write_bytes(content)
    with pytest.raises(LoadError, match=rf"weights .*w\.safetensors cannot be (read|loaded).*{why}"):
        load_weights(OneBuffer(torch.zeros(2)), path)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), os.mkfifo])
def test_a_path_that_is_not_a_file_raises_an_error(make, path):
    make(path)
    with pytest.raises(
        LoadError,
        match=r"w\.safetensors (are not a file|cannot be (read\. It does not exist|loaded: it is a folder))",
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
        (OneBuffer(torch.zeros(2, dtype=torch.complex128)), r"buffer is a tensor of complex128"),
    ],
)
def test_the_error_for_state_that_safetensors_cannot_store_names_the_entry(model, why, path):
    with pytest.raises(ModelError, match=rf"The weights of .* cannot be written\. {why}"):
        save_weights(model, path)


def test_other_programs_can_read_the_file(path):
    model = NonPersistent()
    save_weights(model, path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header.pop("__metadata__") == {"kirsch.buffers": '{"table": "float32"}'}
    assert sorted(header) == ["layer.bias", "layer.weight"]
    assert torch.equal(safetensors.torch.load_file(path)["layer.weight"], model.layer.weight)
