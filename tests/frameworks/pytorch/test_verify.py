"""The proof sees every fault that is planted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kirsch.errors import VerificationError
from kirsch.frameworks.pytorch import masked
from kirsch.frameworks.pytorch.framework import PyTorch
from kirsch.frameworks.pytorch.surgery import cut
from kirsch.frameworks.pytorch.trace import trace
from kirsch.frameworks.pytorch.verify import verify
from proving import half_of_everything, shaken


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.GroupNorm(3, 12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 4),
    )


@pytest.fixture
def case():
    model = shaken(network())
    graph = trace(model, torch.randn(2, 3, 9, 9))
    keep = graph.keep(half_of_everything(graph))
    return model, graph, keep, cut(model, graph, keep)


def swap(tensor, axis):
    index = list(range(tensor.shape[axis]))
    index[0], index[1] = index[1], index[0]
    return tensor.data.index_select(axis, torch.tensor(index))


FAULTS = {
    "two outputs of a layer swapped": lambda m: setattr(m[0].weight, "data", swap(m[0].weight, 0)),
    "two inputs of a layer swapped": lambda m: setattr(m[3].weight, "data", swap(m[3].weight, 1)),
    "a bias off by one": lambda m: setattr(m[0].bias, "data", m[0].bias.data.roll(1)),
    "a running mean off by one": lambda m: setattr(m[1], "running_mean", m[1].running_mean.roll(1)),
    "a running variance off by one": lambda m: setattr(m[1], "running_var", m[1].running_var.roll(1)),
    "a scale off by one": lambda m: setattr(m[1].weight, "data", m[1].weight.data.roll(1)),
    "groups of a norm in another order": lambda m: setattr(m[4].weight, "data", m[4].weight.data.flip(0)),
    "a wrong number of norm groups": lambda m: setattr(m[4], "num_groups", 1),
    "two inputs of the head swapped": lambda m: setattr(m[9].weight, "data", swap(m[9].weight, 1)),
    "a missing cut": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(8, 3, 3, 3))),
    "a layer norm of the old width": lambda m: setattr(m[8], "normalized_shape", (12,)),
}


def test_a_right_cut_passes(case):
    model, graph, keep, pruned = case
    proof = verify(pruned, model, graph, keep)
    assert proof.passed
    assert proof.error < 1e-12
    assert proof.power > 0.01
    assert len(proof.statistics) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proof_sees(fault, case):
    model, graph, keep, pruned = case
    FAULTS[fault](pruned)
    with pytest.raises(VerificationError):
        PyTorch()._prove(pruned, model, graph, keep)


def test_a_wrong_statistic_is_seen(case, monkeypatch):
    model, graph, keep, pruned = case
    plain = masked.STATISTICS["layer_norm"]
    monkeypatch.setitem(masked.STATISTICS, "layer_norm", lambda mask, *a: plain(torch.ones_like(mask), *a))
    with pytest.raises(VerificationError, match="not equal to the masked original"):
        verify(pruned, model, graph, keep)


def test_branches_that_start_at_zero_cannot_hide_a_fault():
    model = network().eval()
    nn.init.zeros_(model[1].weight)  # the branch puts out nothing
    nn.init.zeros_(model[4].weight)
    graph = trace(model, torch.randn(2, 3, 9, 9))
    keep = graph.keep(half_of_everything(graph))
    pruned = cut(model, graph, keep)
    pruned[3].weight.data = swap(pruned[3].weight, 1)
    with pytest.raises(VerificationError):
        verify(pruned, model, graph, keep)


def test_a_model_that_refuses_float64_is_verified_in_float32():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.second(torch.relu(self.first(x).to(torch.float32)))

    model = shaken(Stubborn())
    graph = trace(model, torch.randn(3, 4))
    keep = graph.keep(half_of_everything(graph))
    proof = verify(cut(model, graph, keep), model, graph, keep)
    assert proof.passed
    assert "float32" in proof.reason
