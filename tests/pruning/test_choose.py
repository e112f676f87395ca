"""A plan meets its goal by removing the least important units. If no plan can, the error names the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import GoalError, NumericError, PlanError, UnknownNameError, UsageError
from kirsch.frameworks.pytorch.analysis.count import count
from kirsch.pruning.importance import IMPORTANCES, magnitude
from kirsch.pruning.options import PlanOptions
from kirsch.pruning.selection import width_multiple

IMAGE = torch.randn(1, 3, 16, 16)


def network(width=32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


@pytest.mark.parametrize("ranking", ["global", "local"])
@pytest.mark.parametrize("goal", [{"macs": 0.5}, {"macs": 0.3}, {"parameters": 0.5}, {"macs": 0.6, "parameters": 0.4}])
def test_the_goal_is_met_within_one_percent_of_the_original(ranking, goal):
    model = network()
    target = kirsch.Goal(**goal)
    plan = kirsch.plan(kirsch.trace(model, IMAGE), target, ranking=ranking, round_to=1)
    reached = target.fractions(plan.after, plan.before)
    assert all(value <= limit for value, limit in reached.values())
    assert any(limit - value <= 0.01 for value, limit in reached.values())


@pytest.mark.parametrize("ranking", ["global", "local"])
def test_a_goal_that_only_the_smallest_model_meets_is_met(ranking):
    graph = kirsch.trace(nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2)), torch.randn(1, 4))
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.1), ranking=ranking, round_to=1, min_keep=0.1)
    assert (plan.before.macs, plan.after.macs) == (60, 6)


def test_the_cost_of_a_plan_is_the_cost_of_the_pruned_model():
    model = network()
    assert (kirsch.trace(model, IMAGE).cost.parameters, kirsch.trace(model, IMAGE).cost.macs) == count(model, IMAGE)
    plan = kirsch.plan(kirsch.trace(model, IMAGE), kirsch.Goal(macs=0.5))
    assert (plan.after.parameters, plan.after.macs) == count(kirsch.prune(model, plan), IMAGE)


def test_kept_channels_are_the_largest_by_magnitude():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([4.0, 1.0, 3.0, 2.0])[:, None].expand(4, 4))
        model[1].weight.fill_(1.0)
    plan = kirsch.plan(kirsch.trace(model, torch.randn(1, 4)), kirsch.Goal(parameters=0.5), round_to=1)
    assert plan.groups[0].removed == (1, 3)


def uneven():
    """Return the graph of two layers.

    Unit 0 has the larger root mean square, units 1 and 2 have the larger mean absolute value.
    """
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[6.0, 0.0], [4.0, -4.0], [-4.0, 4.0]]))
        model[1].weight.fill_(1.0)
    return kirsch.trace(model, torch.randn(1, 2))


@pytest.mark.parametrize(("norm", "rows"), [(1, [3.0, 4.0, 4.0]), (2, [18**0.5, 4.0, 4.0])])
def test_magnitude_equals_its_closed_form(norm, rows):
    graph = uneven()
    found = magnitude(graph, graph.groups[0], norm=norm, seed=0)
    np.testing.assert_allclose(found, (np.array(rows) / np.mean(rows) + 1.0) / 2, rtol=1e-6)


@pytest.mark.parametrize(("norm", "removed"), [(1, (0,)), (2, (1,))])
def test_the_norm_decides_which_unit_is_the_smallest(norm, removed):
    plan = kirsch.plan(uneven(), kirsch.Goal(parameters=0.7), norm=norm, round_to=1)
    assert plan.groups[0].removed == removed
    assert plan.groups[0].reason == f"smallest weights of the group (L{norm})"


@pytest.mark.parametrize("norm", [1, 2])
def test_an_empty_parameter_does_not_change_the_importances(norm):
    class Joined(nn.Module):
        """A model with empty parameters, like YOLOS with one layer, which has no intermediate position embeddings."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
            self.rows, self.columns = nn.Parameter(torch.zeros(0, 16)), nn.Parameter(torch.zeros(16, 0))

        def forward(self, x):
            return self.last(torch.cat([self.rows, self.first(x) + self.columns.sum(1)]))

    torch.manual_seed(0)
    model, example = Joined(), torch.randn(3, 8)
    plain = nn.Sequential(model.first, model.last)
    plans = [kirsch.plan(kirsch.trace(m, example), kirsch.Goal(parameters=0.7), norm=norm) for m in (model, plain)]
    assert plans[0].groups[0].removed == plans[1].groups[0].removed
    assert kirsch.prune(model, plans[0]).rows.shape == (0, 8)


def test_random_importance_depends_only_on_the_seed():
    graph = kirsch.trace(network(), IMAGE)
    plans = [kirsch.plan(graph, kirsch.Goal(macs=0.5), importance="random", seed=seed) for seed in (1, 1, 2)]
    assert plans[0].groups == plans[1].groups
    assert plans[0].groups != plans[2].groups


@pytest.mark.parametrize("round_to", [4, 8, 16])
def test_kept_widths_are_multiples_of_round_to(round_to):
    plan = kirsch.plan(kirsch.trace(network(), IMAGE), kirsch.Goal(macs=0.5), round_to=round_to)
    assert all((group.size - len(group.removed)) % round_to == 0 for group in plan.groups)


@pytest.mark.parametrize(
    ("units", "multiples"),
    [
        (7, [1, 1, 1]),
        (8, [4, 4, 4]),
        (15, [4, 4, 4]),
        (16, [8, 4, 4]),
        (31, [8, 4, 4]),
        (127, [8, 4, 4]),
        (128, [16, 8, 4]),
    ],
)
def test_round_to_auto_is_1_below_8_units_and_at_least_4_otherwise(units, multiples):
    graph = kirsch.trace(nn.Sequential(nn.Linear(4, units), nn.Linear(units, 2)), torch.randn(1, 4))
    assert [width_multiple(graph.groups[0], PlanOptions(), fineness) for fineness in range(3)] == multiples


@pytest.mark.parametrize(("goal", "kept"), [(0.5, 16), (0.75, 24), (0.875, 28), (0.9, 28)])
def test_round_to_auto_is_halved_until_the_plan_is_close_to_its_goal(goal, kept):
    graph = kirsch.trace(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), torch.randn(1, 4))
    (removal,) = kirsch.plan(graph, kirsch.Goal(macs=goal)).groups
    assert removal.size - len(removal.removed) == kept


def test_a_plan_far_below_its_goal_has_a_note_with_the_reason():
    plan = kirsch.plan(kirsch.trace(network(), IMAGE), kirsch.Goal(macs=0.55), ranking="local", round_to=32)
    reason = "below the goal of 55.0%. round_to=32 rounds the widths. The plan may come closer with a smaller round_to."
    assert any(note.endswith(reason) for note in plan.notes)
    graph = kirsch.trace(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(1, 4))
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.9), round_to=1)  # one of three units is a third of the MACs
    distance = "23.3 points below the goal of 90.0%."
    reason = f"{distance} With one unit more, they are at least 100.0% (`0`)."
    assert any(reason in note for note in plan.notes)


def test_a_plan_close_to_its_goal_has_no_note_on_the_goal():
    plan = kirsch.plan(kirsch.trace(network(), IMAGE), kirsch.Goal(macs=0.5), round_to=1)
    assert not any("below the goal" in note for note in plan.notes)


def test_a_plan_with_widths_that_run_slowly_has_a_note():
    plan = kirsch.plan(kirsch.trace(network(), IMAGE), kirsch.Goal(macs=0.5), round_to=1)
    (note,) = (note for note in plan.notes if note.startswith("Output widths that are not multiples of 4 run slowly"))
    widths = {
        name: layer.weight.shape[0]
        for name, layer in kirsch.prune(network(), plan).named_children()
        if getattr(layer, "weight", torch.empty(0)).ndim > 1
    }
    del widths["10"]  # the outputs of the model stay
    unaligned = [f"`{name}` ({width})" for name, width in widths.items() if width % 4]
    assert note.endswith(f": {', '.join(unaligned)}.")


def test_the_note_on_widths_names_the_width_of_a_layer_with_several_groups():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 24), nn.Linear(4, 8), nn.Linear(4, 16)
            self.head = nn.Linear(24, 2)

        def forward(self, x):
            return self.head(self.a(x) + torch.cat([self.b(x), self.c(x)], -1))

    graph = kirsch.trace(Joined(), torch.randn(1, 4))
    assert [group.size for group in graph.groups] == [8, 16]
    plan = kirsch.plan(graph, keep={"a#1": 5, "a#2": 11})
    (note,) = plan.notes
    assert note.endswith("run slowly on some runtimes: `b` (5), `c` (11).")  # `a` has 16
    plan = kirsch.plan(graph, keep={"a": 0.63})
    assert any(note.endswith("run slowly on some runtimes: `a` (15), `b` (5), `c` (10).") for note in plan.notes)
    with pytest.raises(UsageError, match=r"several groups of units.*'a#1' \(.*'a#2' \(.*give a fraction"):
        kirsch.plan(graph, keep={"a": 12})


@pytest.mark.parametrize("pattern", ["3", "3.weight", "[3]"])
def test_an_excluded_layer_is_not_changed(pattern):
    model = network()
    plan = kirsch.plan(kirsch.trace(model, IMAGE), kirsch.Goal(macs=0.9), exclude=[pattern])
    assert torch.equal(kirsch.prune(model, plan)[3].weight, model[3].weight)
    assert plan.groups


def test_an_unknown_layer_to_exclude_names_the_nearest():
    model = nn.Sequential()
    model.add_module("features", nn.Linear(4, 8))
    model.add_module("head", nn.Linear(8, 2))
    graph = kirsch.trace(model, torch.randn(1, 4))
    with pytest.raises(
        UnknownNameError, match=r"`exclude` names the layer 'feature', which does not exist.*Did you mean 'features'\?"
    ):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), exclude=["feature"])


def test_an_unknown_importance_lists_known_names_and_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Known: .*magnitude, .*Did you mean 'magnitude'\?"):
        kirsch.plan(kirsch.trace(network(), IMAGE), kirsch.Goal(macs=0.5), importance="magnitud")


@pytest.mark.parametrize(
    ("scores", "found"),
    [([1.0, 2.0], r"found \S+ of shape \(2,\)\."), ([1.0, np.nan, 2.0], r"found \S+ of shape \(3,\) with NaN")],
)
def test_an_importance_must_return_a_finite_number_for_each_unit(monkeypatch, scores, found):
    monkeypatch.setitem(IMPORTANCES._objects, "constant", lambda graph, group: np.array(scores))
    graph = kirsch.trace(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(1, 4))
    with pytest.raises(UsageError, match=rf"'constant' returns no usable scores for '0'\. Expected 3 .*, {found}"):
        kirsch.plan(graph, kirsch.Goal(macs=0.5), importance="constant")


def test_an_unreachable_goal_names_the_least_reachable_cost():
    with pytest.raises(GoalError, match=r"macs 0\.1% is requested, [\d.]+% is the least reachable"):
        kirsch.plan(kirsch.trace(network(), IMAGE), kirsch.Goal(macs=0.001))


def test_an_unreachable_goal_names_the_frozen_layers():
    model = nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 2))
    with pytest.raises(GoalError, match=r"a softmax is computed over the axis"):
        kirsch.plan(kirsch.trace(model, torch.randn(1, 6)), kirsch.Goal(parameters=0.5))


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.2])
def test_a_goal_that_is_not_a_fraction_is_refused(value):
    with pytest.raises(GoalError, match="fraction of the original, between 0 and 1"):
        kirsch.Goal(macs=value)


def test_a_goal_without_limits_is_refused():
    with pytest.raises(GoalError, match="at least one limit"):
        kirsch.Goal()


def test_options_out_of_range_are_named_together():
    with pytest.raises(
        UsageError, match=r"`norm` .* is 3.*`ranking` .* is 'each'.*`round_to` .* is 0.*`min_keep` .* is 0"
    ):
        kirsch.plan(
            kirsch.trace(network(), IMAGE), kirsch.Goal(macs=0.5), ranking="each", round_to=0, norm=3, min_keep=0
        )


def test_a_plan_is_restored_from_json():
    plan = kirsch.plan(kirsch.trace(network(), IMAGE), kirsch.Goal(macs=0.5))
    assert kirsch.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="not JSON"):
        kirsch.Plan.from_json("{")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parameter_that_is_not_finite_is_named(value):
    model = network()
    with torch.no_grad():
        model[3].weight[0] = value
    with pytest.raises(NumericError, match=r"The parameter '3\.weight' of Sequential holds NaN or infinity"):
        kirsch.plan(kirsch.trace(model, IMAGE), kirsch.Goal(macs=0.5))
