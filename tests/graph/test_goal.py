"""Goals as fractions of an earlier model, and goals of several rounds of pruning."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kirsch
from kirsch.errors import GoalError, PlanError, UsageError
from kirsch.graph.cost import Cost
from kirsch.graph.goal import spaced

IMAGES = torch.randn(2, 3, 12, 12)
COST = Cost(parameters=1000, macs=20_000, activations=0, size=4000, memory=800)


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(32, 4)).eval()


def test_linear_rounds_remove_the_same_amount_each():
    assert spaced(0.2, 4, "linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_cubic_rounds_follow_equation_1_of_zhu_and_gupta():
    """s_t = s_f + (s_i - s_f)(1 - (t - t0) / (n Δt))³ with s_i = 0 and s_f = 0.8, at t = t0 + Δt, ... of n = 4."""
    sparsity = [0.8 + (0 - 0.8) * (1 - t / 4) ** 3 for t in (1, 2, 3, 4)]
    assert spaced(0.2, 4, "cubic") == pytest.approx([1 - s for s in sparsity])


@given(st.floats(0.01, 0.99), st.integers(1, 20), st.sampled_from(["linear", "cubic"]))
def test_goals_of_the_rounds_decrease_to_the_last_one(limit, count, spacing):
    goals = spaced(limit, count, spacing)
    assert len(goals) == count
    assert goals[-1] == limit
    assert all(1 > first >= second for first, second in itertools.pairwise(goals))
    relative = [second / first for first, second in zip([1.0, *goals], goals, strict=False)]
    assert math.prod(relative) == pytest.approx(limit)


def test_each_limit_of_a_goal_is_spaced():
    goals = kirsch.Goal(macs=0.5, memory=0.6).rounds(2, spacing="linear", of=COST)
    assert goals == (kirsch.Goal(macs=0.75, memory=0.8, of=COST), kirsch.Goal(macs=0.5, memory=0.6, of=COST))
    assert kirsch.Goal(macs=0.5).rounds(1, of=COST) == (kirsch.Goal(macs=0.5, of=COST),)


def test_the_default_spacing_is_cubic():
    goal = kirsch.Goal(size=0.3)
    assert (
        goal.rounds(3, of=COST) == goal.rounds(3, of=COST, spacing="cubic") != goal.rounds(3, of=COST, spacing="linear")
    )


@pytest.mark.parametrize("reference", [kirsch.trace(network(), IMAGES), {"macs": 100}, 0.5])
def test_another_reference_than_a_cost_is_refused_with_the_fix(reference):
    with pytest.raises(UsageError, match=r"`of` of kirsch\.Goal\.rounds .* of=graph\.cost\."):
        kirsch.Goal(macs=0.5).rounds(2, of=reference)


def test_a_printed_goal_states_the_cost_that_it_is_a_fraction_of():
    assert str(kirsch.Goal(macs=0.5, of=COST)) == "MACs ≤ 50 % of 20.0 k"
    assert str(kirsch.Goal(macs=0.5)) == "MACs ≤ 50 % of the original"


@pytest.mark.parametrize("name", ["macs", "parameters", "size", "memory"])
def test_a_goal_of_an_earlier_model_is_reached_in_rounds_within_one_percent(name):
    layers = nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)
    model, inputs = nn.Sequential(*layers).eval(), torch.randn(2, 20)
    first = kirsch.trace(model, inputs).cost
    for goal in kirsch.Goal(**{name: 0.5}).rounds(3, of=first):
        plan = kirsch.plan(kirsch.trace(model, inputs), goal, round_to=1)
        limit = goal.to_dict()[name]
        assert limit - 0.01 <= getattr(plan.after, name) / getattr(first, name) <= limit
        model = kirsch.prune(model, plan)
    last = getattr(kirsch.trace(model, inputs).cost, name) / getattr(first, name)
    assert 0.49 <= last <= 0.5


def test_a_plan_for_a_goal_that_is_met_removes_nothing_and_can_be_applied_and_stored(tmp_path):
    model = network()
    first = kirsch.trace(model, IMAGES).cost
    model = kirsch.prune(model, kirsch.plan(kirsch.trace(model, IMAGES), kirsch.Goal(macs=0.5, of=first)))
    plan = kirsch.plan(kirsch.trace(model, IMAGES), kirsch.Goal(macs=0.6, of=first))
    assert plan.after == plan.before
    assert plan.groups == ()
    assert "The goal is met before this plan, which removes nothing: MACs are" in plan.notes[0]
    again = kirsch.prune(model, kirsch.Plan.from_json(plan.to_json()))
    kirsch.save(again, tmp_path / "saved")
    loaded = kirsch.load(tmp_path / "saved", network)
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES))


def test_an_empty_plan_is_refused_if_its_goal_is_not_met():
    graph = kirsch.trace(network(), IMAGES)
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.5, of=graph.cost))
    text = plan.to_json()
    emptied = text[: text.index('"groups"')] + '"groups": [],\n "blocks"' + text.partition('"blocks"')[2]
    with pytest.raises(PlanError, match="removes nothing"):
        kirsch.prune(network(), kirsch.Plan.from_json(emptied))


def test_the_reference_of_a_goal_is_stored_with_the_plan_and_shown():
    graph = kirsch.trace(network(), IMAGES)
    goal = kirsch.Goal(macs=0.5, of=graph.cost)
    plan = kirsch.Plan.from_json(kirsch.plan(graph, goal).to_json())
    assert plan.limits == goal
    assert "goal met: ≤ 50 % of " in str(plan)
    assert "goal_of" not in kirsch.plan(graph, kirsch.Goal(macs=0.5)).to_json()


def test_a_model_with_more_cost_than_the_original_of_the_goal_is_refused():
    """The classic mistake: the original was traced with fewer samples than the pruned model."""
    first = kirsch.trace(network(), IMAGES[:1]).cost
    graph = kirsch.trace(network(), IMAGES)
    with pytest.raises(GoalError, match=r"of \S+ . MACs, and Sequential has \S+ .\. .*inputs of the same shape"):
        kirsch.plan(graph, kirsch.Goal(macs=0.5, of=first))
    assert kirsch.plan(graph, kirsch.Goal(parameters=0.5, of=first)).groups  # does not depend on the inputs


def test_an_unreachable_goal_of_a_round_is_stated_as_a_fraction_of_the_original():
    model = network()
    first = kirsch.trace(model, IMAGES).cost
    model = kirsch.prune(model, kirsch.plan(kirsch.trace(model, IMAGES), kirsch.Goal(macs=0.5, of=first)))
    graph = kirsch.trace(model, IMAGES)
    with pytest.raises(GoalError, match=r"macs 10% is requested, .* use the goal macs=0\.\d+\.") as e:
        kirsch.plan(graph, kirsch.Goal(macs=0.1, of=first), min_keep=0.9)
    fraction = float(str(e.value).rpartition("macs=")[2].rstrip("."))
    plan = kirsch.plan(graph, kirsch.Goal(macs=fraction, of=first), min_keep=0.9)
    assert plan.after.macs <= fraction * first.macs


def test_the_ranking_per_cost_divides_by_the_cost_of_a_unit_in_rounds_as_well():
    """The choice must not depend on whether the same limit is a fraction of this or of an earlier, larger model."""
    graph = kirsch.trace(network(), IMAGES)
    larger = Cost(**{name: 2 * value for name, value in graph.cost.to_dict().items()})
    plans = [
        kirsch.plan(graph, goal, ranking="per_cost", round_to=1)
        for goal in (kirsch.Goal(macs=0.6), kirsch.Goal(macs=0.3, of=larger))
    ]
    assert plans[0].groups == plans[1].groups
