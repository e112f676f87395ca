"""Rankings of the units of several layers: "global", "local", "isomorphic" and "per_cost"."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import UsageError
from kirsch.pruning import scores as scores_module
from kirsch.pruning.importance import importance_of
from kirsch.pruning.importance.importance import as_importance
from kirsch.pruning.options import PlanOptions
from kirsch.pruning.selection import ranked_together

IMAGES = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width, hidden):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x):
        return x + self.outer(self.inner(x).relu())


def network():
    """Return a network with inner channels of three blocks, two plain layers, and channels between the blocks."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        Block(8, 16),
        Block(8, 32),
        Block(8, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )


@pytest.fixture
def graph():
    return kirsch.trace(network(), IMAGES)


def removed(plan):
    return {removal.name: len(removal.removed) for removal in plan.groups}


def scores_of(graph, means):
    """Return scores of all groups, with the mean 1 or that of `means`."""
    random = np.random.default_rng(0)
    return {group.name: means.get(group.name, 1.0) * random.uniform(0.5, 1.5, group.size) for group in graph.groups}


def test_groups_of_the_same_kind_and_connections_are_ranked_together(graph):
    groups = {index: [group] for index, group in enumerate(graph.groups)}
    classes = ranked_together(graph, groups, PlanOptions(ranking="isomorphic"))
    named = {tuple(graph.groups[index].name for index in indices) for indices in classes}
    assert named == {("0",), ("1.inner", "2.inner", "3.inner"), ("6", "8")}
    assert ranked_together(graph, groups, PlanOptions(ranking="local")) == [[index] for index in range(6)]
    assert ranked_together(graph, groups, PlanOptions()) is None


def test_isomorphic_removes_the_same_fraction_of_each_class(graph):
    scores = scores_of(graph, {"1.inner": 0.1})  # the inner channels of the first block are less important
    goal = kirsch.Goal(parameters=0.5)
    plan = kirsch.plan(graph, goal, importance=scores, ranking="isomorphic", round_to=1, min_keep=0.01)
    counts = removed(plan)
    inner = sum(counts.get(f"{block}.inner", 0) for block in (1, 2, 3)) / (16 + 32 + 64)
    assert abs(inner - counts["0"] / 8) < 1 / 8  # one unit of the first layer
    assert counts["1.inner"] == 15  # all that may be removed
    removed_scores = [np.sort(scores[name])[counts[name] - 1] for name in ("2.inner", "3.inner")]
    kept_scores = [np.sort(scores[name])[counts[name]] for name in ("2.inner", "3.inner")]
    assert max(removed_scores) <= min(kept_scores)


def test_a_global_ranking_compares_importances_from_labels_relative_to_the_mean_of_each_group(graph):
    """Changes of the loss are smaller in wide layers. Their sum over a layer is not the change without the layer."""

    def plan(scale, needs):
        scales = dict(zip([group.name for group in graph.groups], scale, strict=True))
        found = as_importance(lambda _, group: scales[group.name] * (1 + np.arange(group.size)), "planted", needs)
        data = [(IMAGES, torch.tensor([0, 1]))] if needs == "labels" else None
        return removed(kirsch.plan(graph, kirsch.Goal(macs=0.5), importance=found, round_to=1, data=data))

    same, different = np.ones(len(graph.groups)), 10.0 ** np.arange(len(graph.groups))
    assert plan(same, "labels") == plan(different, "labels")
    assert plan(same, "weights") != plan(different, "weights")  # a function of the user is compared as it is


def test_per_cost_prefers_units_of_high_cost(graph):
    equal = {group.name: np.ones(group.size) for group in graph.groups}
    goal = kirsch.Goal(macs=0.7)
    counts = removed(kirsch.plan(graph, goal, importance=equal, ranking="per_cost", round_to=1, min_keep=0.01))
    costs = {cost.group.name: cost.macs / cost.group.size for cost in graph.group_costs()}
    first = max(costs, key=costs.get)
    share = counts[first] * costs[first] / sum(count * costs[name] for name, count in counts.items())
    assert share > 0.7  # the rest, where a unit of the first is more than remains to the goal


def test_per_cost_keeps_the_order_within_a_group(graph):
    scores = scores_of(graph, {})
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.6), importance=scores, ranking="per_cost", round_to=1)
    for removal in plan.groups:
        order = np.argsort(scores[removal.name])
        assert set(removal.removed) == set(order[: len(removal.removed)].tolist())


def test_per_cost_refuses_negative_importances(graph):
    scores = {group.name: np.full(group.size, -1.0) for group in graph.groups}
    goal = kirsch.Goal(macs=0.6)
    with pytest.raises(UsageError, match=r"is negative for units of '0'.*Use neither of them"):
        kirsch.plan(graph, goal, importance=scores, ranking="per_cost")
    with pytest.raises(UsageError, match=r"is negative for units of '0'.*the weights in `kinds`"):
        kirsch.plan(graph, goal, importance=scores, kinds={"channel": 2.0})
    with pytest.raises(UsageError, match=r'ranking="per_cost" cannot be used with importance=\'flap\''):
        kirsch.plan(graph, goal, importance="flap", ranking="per_cost")  # before data is missing


@pytest.mark.parametrize("ranking", ["global", "local", "isomorphic", "per_cost"])
@pytest.mark.parametrize("goal", [kirsch.Goal(macs=0.5), kirsch.Goal(parameters=0.4, macs=0.6)])
def test_goals_are_met_within_one_percent(graph, ranking, goal):
    plan = kirsch.plan(graph, goal, ranking=ranking, round_to=1, min_keep=0.01)
    reached = goal.fractions(plan.after, plan.before)
    assert all(value <= limit for value, limit in reached.values())
    assert min(limit - value for value, limit in reached.values()) < 0.01


class Residual(nn.Module):
    """A classifier of tokens with a residual stream, as in a transformer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.wide, self.narrow = nn.Embedding(10, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head((x + self.narrow(self.wide(x).relu())).mean(1))


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("convolutions", {"taylor": "per_cost", "snip": "per_cost", "fisher": "per_cost", "hessian": "global"}),
        ("transformer", {"taylor": "global", "snip": "global", "fisher": "per_cost", "hessian": "global"}),
    ],
)
def test_the_default_ranking_follows_from_the_importance_and_the_kinds_of_units(network, expected):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 6), nn.Flatten())
    inputs = torch.randn(4, 3, 8, 8)
    if network == "transformer":
        model = Residual()
        inputs = torch.arange(12).reshape(4, 3) % 10
    model.eval()
    graph = kirsch.trace(model, inputs[:1])
    data = [(inputs, torch.arange(4))]
    for importance, ranking in (expected | {"magnitude": "global"}).items():
        needed = {} if importance == "magnitude" else {"data": data}
        plan = kirsch.plan(graph, kirsch.Goal(macs=0.7), importance=importance, round_to=1, **needed)
        assert plan.method["ranking"] == ranking
        plan = kirsch.plan(graph, kirsch.Goal(macs=0.9, memory=0.95), importance=importance, round_to=1, **needed)
        assert plan.method["ranking"] == "global"


@pytest.mark.parametrize("divided", [True, False])
def test_scores_from_labels_are_divided_by_the_mean_of_their_layer_except_in_transformers(divided):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model, inputs = (plain, torch.randn(16, 3)) if divided else (Residual(), torch.randint(0, 10, (16, 3)))
    graph = kirsch.trace(model.eval(), inputs[:1])
    options = PlanOptions(importance="taylor", ranking="global")
    scores = scores_module.scores_of(
        graph, options, importance_of("taylor"), [(inputs, torch.arange(16) % 4)], "cross-entropy"
    )
    means = [scores.get(group, options).mean() for group in graph.groups]
    assert len(means) == 2
    assert (np.array(means) == pytest.approx(1)) is divided
