"""The verification in training mode: modules that only run there, and reasons why it is not compared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kirsch.errors import VerificationError
from kirsch.frameworks.pytorch.analysis import operators
from kirsch.frameworks.pytorch.analysis.trace import trace
from kirsch.frameworks.pytorch.verification import masked
from kirsch.graph.labels import Tensor
from trace_and_cut import verified, with_noise


class Auxiliary(nn.Module):
    """A classifier with an auxiliary head on the sum of two layers. The head only runs in training mode."""

    def __init__(self, *, draws=False):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.left, self.right, self.head, self.drop = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3), nn.Dropout(0.5)
        self.norm, self.draws = nn.LayerNorm(6), draws

    def forward(self, x):
        x = self.drop(self.first(x).relu())
        if not self.training or (self.draws and torch.rand([]) < 0.5):
            return self.second(x)
        return self.second(x), self.head(self.norm(F.dropout(self.left(x) + self.right(x), 0.3, training=True)))


def test_modules_that_only_run_in_training_mode_are_cut_and_verified():
    model = with_noise(Auxiliary())
    graph = trace(model, torch.randn(5, 4))
    assert sorted(group.size for group in graph.groups) == [6, 8]
    found = verified(model, torch.randn(5, 4))
    assert (found.unseen, found.not_compared) == ((), ())


def test_training_mode_is_not_compared_if_it_uses_no_further_tensors():
    model = with_noise(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    model.register_buffer("copy", torch.zeros(8))  # read in no mode, as the copied frequencies of rotary embeddings
    assert trace(model, torch.randn(5, 4)).traced.training is None
    assert verified(model, torch.randn(5, 4)).passed


class OnlyFloat32(Auxiliary):
    """A model whose training mode has an operation that does not support float64."""

    def forward(self, x):
        found = super().forward(x)
        if self.training and found[0].dtype is torch.float64:
            raise RuntimeError(self.message)
        return found


def test_a_training_mode_that_does_not_run_in_float64_is_stated_as_not_compared():
    model = with_noise(OnlyFloat32())
    model.message = "not implemented for 'Double'"
    (reason,) = verified(model, torch.randn(5, 4)).not_compared
    sentence = "training mode: the original does not run in float64: RuntimeError: not implemented for 'Double'."
    assert reason == sentence


def test_a_lack_of_memory_in_training_mode_is_raised():
    model = with_noise(OnlyFloat32())
    model.message = "CUDA out of memory"
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        verified(model, torch.randn(5, 4))


@pytest.mark.parametrize("left_out", ["the tie of a sum", "the statistic of a normalization"])
def test_a_fault_in_modules_that_only_run_in_training_mode_is_detected(monkeypatch, left_out):
    def untied(step):
        for tensor in step.tensors()[1:]:
            for axis in tensor.axes:
                step.facts.reduce(axis)
        return Tensor.of(step.shape, step.tensors()[0].axes)

    def plain(mask, *args):
        return masked_norm(torch.ones_like(mask), *args)

    masked_norm = masked.STATISTICS["layer_norm"]
    if left_out == "the tie of a sum":
        monkeypatch.setitem(operators.RULES, "add", untied)
    else:
        monkeypatch.setitem(masked.STATISTICS, "layer_norm", plain)
    with pytest.raises(VerificationError, match=r"in training mode is not equal to the masked original|does not run"):
        verified(with_noise(Auxiliary()), torch.randn(5, 4))


def test_a_model_that_chooses_a_training_branch_at_random_is_verified_in_inference():
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        found = verified(with_noise(Auxiliary(draws=True)), torch.randn(5, 4))
        seen.add(found.unseen)
        assert all("differs by" in reason for reason in found.not_compared)
    assert ("left", "right", "head", "norm") in seen  # listed where the branch was not taken
