"""The record of a pruning step: removed units and sizes of layers."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import nn

import kirsch
from kirsch.graph.plan import Removal
from kirsch.pruning import step
from kirsch.pruning.step import CALIBRATION, Prune, removal_record


def test_the_record_has_the_removed_units_and_the_outputs_and_parameters_of_each_cut_layer():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    graph = kirsch.trace(model, torch.randn(3, 4))
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.9), round_to=1)
    record = removal_record(graph, replace(plan, groups=(Removal("0", "ffn unit", 8, (1, 5), "by hand"),)))
    assert json.loads(json.dumps(record)) == record
    assert record["groups"] == [
        {
            "name": "0",
            "kind": "ffn unit",
            "size": 8,
            "removed": [1, 5],
            "reason": "by hand",
            "layers": ["0", "1", "3"],
            "parameters": 2 * (5 + 2 + 2),  # per unit: weights and bias, scale and shift, weights of the last layer
            "macs": 2 * 3 * (4 + 2),
        }
    ]
    assert record["layers"] == [  # the last layer loses inputs only
        {"name": "0", "group": "0", "before": 8, "after": 6, "parameters_before": 40, "parameters_after": 30}
    ]


def test_the_record_of_a_group_that_is_kept_has_no_units():
    graph = kirsch.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(1, 4))
    plan = replace(kirsch.plan(graph, kirsch.Goal(parameters=0.9), round_to=1), groups=())
    record = removal_record(graph, plan)
    assert [(group["removed"], group["reason"], group["macs"]) for group in record["groups"]] == [([], "kept", 0)]
    assert [(layer["before"], layer["after"]) for layer in record["layers"]] == [(8, 8)]


def test_a_layer_with_outputs_in_two_groups_is_listed_once():
    """A grouped convolution reads the sum of two layers. Its channels form two groups: conv groups, and positions."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.grouped, self.head = nn.Conv2d(16, 32, 3, groups=4), nn.Linear(32, 4)

        def forward(self, x):
            x = self.first(x).relu()
            return self.head(self.grouped(x + self.second(x)).relu().mean((2, 3)))

    graph = kirsch.trace(Net(), torch.randn(2, 3, 8, 8))
    record = removal_record(graph, kirsch.plan(graph, kirsch.Goal(macs=0.7), round_to=1))
    assert sum("first" in group["layers"] for group in record["groups"]) > 1
    names = [layer["name"] for layer in record["layers"]]
    assert sorted(names) == ["first", "grouped", "second"]


def test_a_recurrent_layer_is_listed_with_its_units_not_with_the_rows_of_its_gates():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(3, 16, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(32, 4)

        def forward(self, x):
            return self.head(self.gru(x)[0][:, -1])

    graph = kirsch.trace(Net().eval(), torch.randn(2, 5, 3))
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.5))
    (layer,) = removal_record(graph, plan)["layers"]
    assert (layer["name"], layer["before"], layer["after"]) == ("gru", 16, 16 - len(plan.groups[0].removed))
    assert layer["parameters_after"] < layer["parameters_before"] / 2 + 100


def test_a_transposed_convolution_is_listed_with_its_outputs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    graph = kirsch.trace(model, torch.randn(1, 3, 8, 8))
    record = removal_record(graph, kirsch.plan(graph, keep={"0": 5, "2": 4}))
    pruned = kirsch.prune(model, kirsch.plan(graph, keep={"0": 5, "2": 4}))
    found = {layer["name"]: (layer["before"], layer["after"]) for layer in record["layers"]}
    assert found == {"0": (8, pruned[0].out_channels), "2": (6, pruned[2].out_channels)} == {"0": (8, 5), "2": (6, 4)}


def test_the_default_ranking_is_milp_if_its_runs_cost_at_most_a_pass_over_the_training_data(monkeypatch):
    monkeypatch.setattr(step, "FEW_MACS", 0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    graph, goal, runs = kirsch.trace(model, torch.randn(1, 4)), kirsch.Goal(macs=0.5), 1 + 2 * 7
    options = {"round_to": 1}
    assert Prune(**options).uses_milp(graph, goal, runs * CALIBRATION)
    assert not Prune(**options).uses_milp(graph, goal, runs * CALIBRATION - 1)
    assert not Prune(**options).uses_milp(graph, goal, None)
    assert not Prune(**options).uses_milp(graph, None, 10**9)
    assert not Prune(**options, ranking="global").uses_milp(graph, goal, 10**9)
    assert not Prune(max_drop=0.1, **options).uses_milp(graph, goal, 10**9)
    monkeypatch.setattr(step, "FEW_MACS", runs * CALIBRATION * graph.cost.macs)
    assert Prune(**options).uses_milp(graph, goal, None)
