"""Copies that share the memory of the parameters, and runs that do not change it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kirsch
from kirsch.frameworks.pytorch.modules.read_only import ChangeInPlaceError, ReadOnly, sharing_copy

CHANGES = {
    "add_": lambda weight: weight.add_(1),
    "data": lambda weight: weight.data.mul_(2),
    "part": lambda weight: weight[0].copy_(weight[1]),
    "item": lambda weight: weight.__setitem__(0, 0.0),
    "out": lambda weight: torch.mul(weight, 2, out=weight),
    "new data": lambda weight: setattr(weight, "data", weight.data * 2),
}


class Changing(nn.Module):
    """A model that changes a parameter in training mode."""

    def __init__(self, change):
        super().__init__()
        self.first, self.last, self.change = nn.Linear(4, 8), nn.Linear(8, 2), change

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.change(self.first.weight)
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_changes_its_parameters_is_pruned_and_unchanged(change):
    model = Changing(change).eval()
    plan = kirsch.plan(kirsch.trace(model, torch.randn(2, 4)), kirsch.Goal(macs=0.5))
    kept = [unit for unit in range(8) if unit not in plan.groups[0].removed]
    weight = model.first.weight.detach().clone()
    pruned = kirsch.prune(model, plan)
    assert torch.equal(pruned.first.weight, weight[kept])
    assert torch.equal(model.first.weight, weight)


@pytest.mark.parametrize("change", [change for name, change in CHANGES.items() if name != "new data"])
def test_an_operation_that_changes_shared_memory_is_refused_before_it_runs(change):
    model = Changing(change).train()
    before, shared = model.first.weight.detach().clone(), sharing_copy(model)
    assert shared.first.weight is not model.first.weight
    assert shared.first.weight.data_ptr() == model.first.weight.data_ptr()
    with pytest.raises(ChangeInPlaceError, match="changes a parameter in place"), ReadOnly(model.parameters()):
        shared(torch.ones(1, 4))
    assert torch.equal(model.first.weight, before)


def test_other_tensors_may_change():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True)).train()
    with ReadOnly(model.parameters()):
        model(torch.randn(6, 4)).add_(1)
    assert model[1].num_batches_tracked == 1


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    shared = sharing_copy(model)
    assert shared[0].weight is shared[1].weight
