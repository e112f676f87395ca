"""The option `keep`: widths of layers that are set by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import GoalError, UnknownNameError, UsageError

IMAGES = torch.randn(2, 3, 8, 8)


def network():
    layers = {
        "conv1": nn.Conv2d(3, 16, 3, padding=1),
        "norm": nn.BatchNorm2d(16),
        "stage": nn.Sequential(nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3)),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "hidden": nn.Linear(24, 10),
        "relu": nn.ReLU(),
        "head": nn.Linear(10, 4),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model.eval()


@pytest.fixture
def graph():
    return kirsch.trace(network(), IMAGES)


def kept(plan):
    return {removal.name: removal.size - len(removal.removed) for removal in plan.groups}


def test_numbers_and_fractions_set_the_width(graph):
    plan = kirsch.plan(graph, keep={"conv1": 5, "stage.*": 0.5, "head": 1.0})
    assert kept(plan) == {"conv1": 5, "stage.1": 12, "stage.3": 12}
    pruned = kirsch.prune(network(), plan)
    assert (pruned.conv1.out_channels, pruned.stage[3].in_channels, pruned.hidden.in_features) == (5, 12, 12)
    assert plan.goal == {}
    assert kirsch.Plan.from_json(plan.to_json()) == plan


def test_the_least_important_units_are_removed(graph):
    scores = {group.name: np.arange(group.size)[::-1] for group in graph.groups}
    plan = kirsch.plan(graph, keep={"conv1": 14}, importance=scores)
    assert [removal.removed for removal in plan.groups] == [(14, 15)]


def test_a_layer_after_the_one_that_makes_the_units_names_them_too(graph):
    assert kept(kirsch.plan(graph, keep={"norm": 4})) == {"conv1": 4}


def test_the_goal_is_reached_with_the_other_layers(graph):
    goal = kirsch.Goal(macs=0.6)
    plan = kirsch.plan(graph, goal, keep={"conv1": 1.0, "stage.1": 20}, round_to=1)
    assert "conv1" not in kept(plan)
    assert kept(plan)["stage.1"] == 20
    assert 0.59 < plan.after.macs / plan.before.macs <= 0.6


def test_a_name_has_precedence_over_a_pattern(graph):
    assert kept(kirsch.plan(graph, keep={"stage.1": 20, "stage.*": 0.5})) == {"stage.1": 20, "stage.3": 12}


def test_one_is_a_number_and_one_point_zero_a_fraction(graph):
    assert kept(kirsch.plan(graph, keep={"conv1": 1})) == {"conv1": 1}
    assert kirsch.plan(graph, keep={"conv1": 1.0}).groups == ()


def test_uniform_ties_the_widths(graph):
    with pytest.raises(UsageError, match=r"the same width for 'stage\.1', 'stage\.3', and uniform=True"):
        kirsch.plan(graph, keep={"stage.1": 12}, uniform=True)
    assert kept(kirsch.plan(graph, keep={"stage.*": 12}, uniform=True)) == {"stage.1": 12, "stage.3": 12}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, r"The goal is missing\. Give a goal.*`keep`"),
        ({"keep": {}}, r"The goal is missing"),
        ({"keep": {"nothing.*": 0.5}}, r"The pattern 'nothing\.\*' in `keep` matches no layer"),
        ({"keep": {"head": 0.5}}, r"'head', and none of its outputs can be removed.*outputs of the model"),
        ({"keep": {"conv1": 17}}, r"sets 'conv1' to 17 units, and 'conv1' has 16\. Give at most 16"),
        ({"keep": {"stage.*": 12, "*age.1": 0.3}}, r"contradicts itself for 'stage\.1'.*keep=\{'stage\.1': "),
        ({"keep": {"conv1": 4}, "exclude": ["conv1"]}, r"'conv1'.*exclude=\['conv1'\] keeps them.*Remove one"),
        ({"keep": {"conv1": 4}, "keep_outputs": ["norm"]}, r"keep_outputs=\['norm'\] keeps them"),
        ({"keep": {"conv1": 4}, "kinds": ["head"]}, r"none of its outputs can be removed.*`kinds` leaves out"),
        ({"keep": {"conv1": 0}}, r"0"),
        ({"keep": {"conv1": 1.5}}, r"1\.5"),
        ({"keep": {"conv1": True}}, r"True"),
        ({"keep": {"conv1": 4}, "kinds": "block"}, r"`keep` has no effect on a plan with kinds='block'"),
    ],
)
def test_wrong_widths_are_refused(graph, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        kirsch.plan(graph, **options)


def test_an_unknown_layer_suggests_a_known_one(graph):
    with pytest.raises(UnknownNameError, match=r"conv2.*conv1"):
        kirsch.plan(graph, keep={"conv2": 4})


def test_a_goal_that_the_widths_prevent_names_them(graph):
    with pytest.raises(GoalError, match=r"whose width `keep` sets.*keep without 'stage\.\*'"):
        kirsch.plan(graph, kirsch.Goal(macs=0.2), keep={"stage.*": 1.0})


class Attention(nn.Module):
    """Attention with two heads of four channels."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.heads, self.width = 2, 4

    def forward(self, x):
        shape = (self.heads, self.width)
        q, k, v = (layer(x).unflatten(-1, shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(heads.transpose(1, 2).flatten(2)))


def test_a_layer_with_several_kinds_of_units_needs_a_kind_or_a_group():
    graph = kirsch.trace(Attention().eval(), torch.randn(2, 3, 6))
    with pytest.raises(UsageError, match=r"'query', whose outputs have several kinds of units.*\(head\).*\(head dim\)"):
        kirsch.plan(graph, keep={"query": 0.5})
    plan = kirsch.plan(graph, keep={"query": 1}, kinds=["head"])
    assert [(removal.kind, len(removal.removed)) for removal in plan.groups] == [("head", 1)]
    assert [removal.kind for removal in kirsch.plan(graph, keep={"query#1": 1}).groups] == ["head"]
    group = next(group for group in graph.groups if group.kind == "head dim" and "#" in group.name)
    plan = kirsch.plan(graph, keep={group.name: 3})
    assert [(removal.name, len(removal.removed)) for removal in plan.groups] == [(group.name, 1)]
