"""The error for an unreachable goal names the causes and the options that reach the goal."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import GoalError, NumericError
from kirsch.pruning.choose import plan


class Words(nn.Module):
    """An embedding with most of the parameters, a feed-forward block, and a classifier."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(500, 16)
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 2)

    def forward(self, x):
        x = self.embed(x)
        return self.head((x + self.down(self.up(x).relu())).mean(1))


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return kirsch.trace(Words(), torch.randint(0, 500, (1, 5)))


def refused(graph, goal, **options):
    with pytest.raises(GoalError) as caught:
        plan(graph, goal, **options)
    return caught.value


def test_a_layer_whose_kind_is_kept_is_named_with_its_share(graph):
    error = refused(graph, kirsch.Goal(parameters=0.5), kinds=["ffn unit"])
    share = 500 * 16 / graph.cost.parameters
    assert f"`embed` ({share:.1%})" in error.why
    assert "whose units have the kind 'embedding dim', which `kinds` keeps" in error.why
    assert "'embedding dim' in kinds" in error.fix


@pytest.mark.parametrize(
    ("goal", "options", "fix", "fixed_options"),
    [
        (
            {"parameters": 0.5},
            {"kinds": ["ffn unit"]},
            "'embedding dim' in kinds",
            {"kinds": ["ffn unit", "embedding dim"]},
        ),
        (
            {"parameters": 0.5},
            {"kinds": {"embedding dim": 0}},
            "'embedding dim' in kinds",
            {"kinds": {"embedding dim": 1.0}},
        ),
        ({"parameters": 0.5}, {"exclude": ["embed", "up.bias"]}, "exclude without 'embed'", {"exclude": ["up.bias"]}),
        ({"parameters": 0.4}, {"round_to": 16}, "round_to=4", {"round_to": 4}),
        ({"parameters": 0.4}, {"min_keep": 0.9, "round_to": 1}, "min_keep=0.1 (the default)", {"round_to": 1}),
        ({"parameters": 0.1}, {"min_keep": 0.9, "round_to": 1}, "min_keep=0.05", {"min_keep": 0.05, "round_to": 1}),
        (
            {"parameters": 0.2},
            {"min_keep": 0.9, "exclude": ["embed"], "round_to": 1},
            "exclude without 'embed' and min_keep=0.1 (the default)",
            {"round_to": 1},
        ),
    ],
)
def test_the_suggested_options_reach_the_goal(graph, goal, options, fix, fixed_options):
    target = kirsch.Goal(**goal)
    error = refused(graph, target, **options)
    assert fix in error.fix
    assert target.met_by(plan(graph, target, **fixed_options).after, graph.cost)


@pytest.mark.parametrize("options", [{"round_to": 8}, {"min_keep": 0.7}, {"exclude": ["up.bias"]}])
def test_the_suggested_goal_is_reached_with_the_same_options(graph, options):
    error = refused(graph, kirsch.Goal(parameters=0.01, macs=0.01), **options)
    suggested = re.search(r"With the options given, use the goal macs=([\d.]+), parameters=([\d.]+)\.", error.fix)
    macs, params = (float(number) for number in suggested.groups())
    assert plan(graph, kirsch.Goal(macs=macs, parameters=params), **options).groups


def test_a_goal_that_no_options_reach_names_the_least_reachable_cost(graph):
    error = refused(graph, kirsch.Goal(parameters=0.001))
    assert re.search(
        r"^No options reach the goal: even with round_to=1 and min_keep=0\.001, [\d.]+% of the parameters remain\. "
        r"With the options given",
        error.fix,
    )
    assert "cut as far as min_keep=0.1, round_to='auto' allow" in error.why


def test_frozen_layers_are_named_with_the_operation():
    model = nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 2))
    error = refused(kirsch.trace(model, torch.randn(1, 6)), kirsch.Goal(parameters=0.5))
    assert re.search(r"75\.7% of the parameters in `0`, frozen: a softmax is computed over the axis", error.why)
    assert error.why.startswith("Nothing can be removed with these options. The remaining cost is: ")
    assert error.fix == "No option of kirsch.plan allows more units to be removed."


def test_options_with_which_nothing_can_be_removed_are_not_proposed_again_with_another_goal():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    error = refused(kirsch.trace(model, torch.randn(1, 6)), kirsch.Goal(parameters=0.6), exclude=["2"])
    assert error.why.startswith("Nothing can be removed with these options. ")
    assert error.fix == "The goal is reached with '2' in keep_outputs instead of exclude."


def test_excluded_layers_are_named_with_the_pattern(graph):
    error = refused(graph, kirsch.Goal(parameters=0.5), exclude=["embed"])
    assert "which exclude=['embed'] keeps unchanged" in error.why


def test_all_patterns_that_exclude_a_layer_are_named(graph):
    error = refused(graph, kirsch.Goal(parameters=0.5), exclude=["embed", "*mb*", "up.bias"])
    assert "which exclude=['embed', '*mb*'] keeps unchanged" in error.why
    assert "The goal is reached with exclude=[]." in error.fix


def test_the_cost_of_a_product_of_activations_is_explained_by_the_layers_of_its_module():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.query(x) @ self.key(x).transpose(1, 2)

    graph = kirsch.trace(nn.Sequential(Attention(), nn.Linear(64, 2)), torch.randn(1, 64, 8))
    error = refused(graph, kirsch.Goal(macs=0.5), kinds=["ffn unit"])
    assert re.search(r"in `0` \(57.1%\), `0.query` .* whose units have the kind 'channel'", error.why)


@pytest.mark.parametrize(("outputs", "named"), [(10, False), (200, True)])
def test_causes_of_less_than_a_hundredth_of_the_cost_are_not_named(outputs, named):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(outputs))

        def forward(self, x):
            return x * self.weight

    graph = kirsch.trace(nn.Sequential(nn.Linear(100, 50), nn.Linear(50, outputs), Scale()), torch.randn(1, 100))
    error = refused(graph, kirsch.Goal(parameters=0.001))
    assert (outputs / graph.cost.parameters >= 0.01) is named
    assert ("in `2`, whose units are inputs or outputs of the model" in error.why) is named


def test_a_suggested_option_for_which_the_importance_fails_names_the_parameter():
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    graph = kirsch.trace(model, torch.randn(1, 4))
    goal = kirsch.Goal(parameters=0.1)
    assert "The goal is reached with exclude without '2'" in refused(graph, goal, exclude=["2"]).fix
    with pytest.raises(NumericError, match=r"The parameter '2\.weight' of Sequential holds NaN"):
        plan(graph, goal)


def test_a_goal_on_macs_is_refused_for_a_model_without_macs():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 8)

        def forward(self, x):
            return self.table(x).sum(-1)

    graph = kirsch.trace(Lookup(), torch.randint(0, 9, (1, 4)))
    with pytest.raises(GoalError, match=r"macs=0\.5 has no effect\. Lookup has no MACs\. Give parameters"):
        plan(graph, kirsch.Goal(macs=0.5))


def test_a_goal_on_macs_of_a_model_without_parameters_advises_another_model():
    graph = kirsch.trace(nn.MaxPool1d(2), torch.randn(1, 3, 4))
    with pytest.raises(GoalError, match=r"has no MACs and no parameters\. Give a model that has layers"):
        plan(graph, kirsch.Goal(macs=0.5))


@pytest.mark.parametrize("softmax", ["freeze", "kept"])
def test_kinds_that_the_model_does_not_have_are_named(softmax):
    graph = kirsch.trace(
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(1, 6), softmax=softmax
    )
    error = refused(graph, kirsch.Goal(parameters=0.6), kinds=["expert", "head"])
    assert error.why.startswith(
        "Nothing can be removed with these options. kinds='expert' has no effect: Sequential has no units of this "
        "kind. Its kinds of units: ffn unit."
    )
    assert "kinds='head' has no effect" in error.why
    assert ('Experts can only be removed after kirsch.trace(..., softmax="kept").' in error.why) is (
        softmax == "freeze"
    )
