"""Weights to a file and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kirsch.errors import LoadError
from kirsch.frameworks.pytorch.framework import PyTorch


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
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("build", [Versioned, Tied, lambda: nn.BatchNorm1d(4)])
def test_weights_come_back_bit_for_bit(build, tmp_path):
    model, other = build(), build()
    PyTorch().save_weights(model, tmp_path / "w.safetensors")
    PyTorch().load_weights(other, tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_tied_weights_stay_tied(tmp_path):
    model = Tied()
    PyTorch().save_weights(Tied(), tmp_path / "w.safetensors")
    PyTorch().load_weights(model, tmp_path / "w.safetensors")
    assert model.second.weight is model.first.weight


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), r"The file lacks 1\.weight, 1\.bias\."),
        (lambda: nn.Sequential(nn.Linear(4, 3, bias=False)), r"The model has no 0\.bias\."),
        (lambda: nn.Sequential(nn.Linear(5, 3)), "size mismatch for 0.weight"),
    ],
)
def test_weights_that_do_not_fit_are_told_by_name(build, why, tmp_path):
    PyTorch().save_weights(nn.Sequential(nn.Linear(4, 3)), tmp_path / "w.safetensors")
    with pytest.raises(LoadError, match=rf"do not fit a Sequential\..*{why}.*Give the model that they were saved from"):
        PyTorch().load_weights(build(), tmp_path / "w.safetensors")


def test_a_file_that_is_none_is_told(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    with pytest.raises(LoadError, match="do not fit a Linear"):
        PyTorch().load_weights(nn.Linear(4, 3), tmp_path / "w.safetensors")
