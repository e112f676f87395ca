"""Gates on units that are trained with the model, or alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from coupled_networks import NETWORKS, build
from kirsch.errors import GoalError, UsageError
from kirsch.pruning.importance import IMPORTANCES

USELESS = (1, 6, 8, 11)
"""Hidden units of `trained` whose outputs are noise."""


def samples(count=192):
    random = np.random.default_rng(0)
    labels = np.arange(count) % 4
    return (random.normal(0, 0.5, (count, 8)) + 2 * np.eye(4, 8)[labels]).astype(np.float32), labels


def data():
    return kirsch.ArrayData(*samples(), batch_size=16)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)
    )
    model = kirsch.fit(model, data(), training=kirsch.Training(epochs=6), progress=False).model
    with torch.no_grad():  # useless units of large magnitude: noise, read with random weights
        model[0].weight[USELESS, :4] = 0
        model[0].weight[USELESS, 4:] = 3 * torch.randn(len(USELESS), 4)
        model[3].weight[:, USELESS] = 0.8 * torch.randn(10, len(USELESS))
    return model


@pytest.fixture(scope="module")
def graph(trained):
    return kirsch.trace(trained, torch.randn(2, 8))


@pytest.fixture(scope="module")
def learned(graph):
    return kirsch.learn_gates(
        graph,
        kirsch.Goal(macs=0.6),
        data(),
        training=kirsch.Training(epochs=24, optimizer="adamw", learning_rate=2e-3),
        round_to=1,
        progress=False,
    )


def test_the_expected_cost_and_the_plan_meet_the_budget_within_two_percent(graph, learned):
    assert learned.expected == {"macs": pytest.approx(0.6, rel=0.02)}
    share = learned.plan.after.macs / graph.cost.macs
    assert 0.6 * 0.96 <= share <= 0.6  # one unit of this small network has 2 % of the MACs
    assert learned.plan.method["importance"] == "given scores"


def test_useless_units_are_closed_first_although_their_weights_are_the_largest(graph, learned):
    useful = [unit for unit in range(12) if unit not in USELESS]
    assert learned.scores["0"][[*USELESS]].max() < np.median(learned.scores["0"][useful])
    magnitudes = IMPORTANCES["magnitude"](graph, graph.groups[0])
    assert magnitudes[[*USELESS]].min() > np.median(magnitudes[useful])


def test_the_pruned_model_is_better_than_the_one_pruned_by_magnitude(graph, trained, learned):
    inputs, labels = map(torch.tensor, samples())
    small = kirsch.prune(learned.model, learned.plan)
    other = kirsch.prune(trained, kirsch.plan(graph, kirsch.Goal(macs=0.6), round_to=1))
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(model(inputs), labels)) for model in (small, other)]
    assert losses[0] < 0.5 * losses[1]


def test_the_gates_after_training_are_in_the_weights_of_the_model(learned):
    """Units with a low probability have a gate of 0: the weight that reads them has columns of zeros."""
    assert learned.undecided < 0.5
    closed = [unit for unit, score in enumerate(learned.scores["0"]) if score < 0.2]  # the gate is 0 below 0.31
    assert closed
    assert not learned.model[3].weight[:, closed].any()
    assert "expected 60" in repr(learned)
    assert learned.trained.model is learned.model


def test_several_limits_are_all_met(graph):
    gated = kirsch.with_gates(graph, kirsch.Goal(macs=0.7, parameters=0.5), steps=10)
    learned = kirsch.read_gates(gated, graph, kirsch.Goal(macs=0.7, parameters=0.5), round_to=1)
    assert max(learned.expected["macs"] - 0.7, learned.expected["parameters"] - 0.5) == pytest.approx(0, abs=1e-6)


def test_a_plan_from_gates_that_are_undecided_has_a_note(graph, learned):
    gated = kirsch.with_gates(graph, kirsch.Goal(macs=0.6), steps=10)  # not trained
    untrained = kirsch.read_gates(gated, graph, kirsch.Goal(macs=0.6), round_to=1)
    assert untrained.undecided > 0.9
    assert any(note.startswith("100 % of the gates are between 0.1 and 0.9") for note in untrained.plan.notes)
    for case in (untrained, learned):
        noted = any("Train for more steps" in note for note in case.plan.notes)
        assert noted is (case.undecided > 0.1)


def test_with_frozen_weights_only_the_gates_are_trained(graph, trained):
    training = kirsch.Training(epochs=3, optimizer="adamw", learning_rate=2e-3)
    learned = kirsch.learn_gates(
        graph, kirsch.Goal(macs=0.6), data(), training=training, train_weights=False, round_to=1, progress=False
    )
    assert torch.equal(learned.model[0].weight, trained[0].weight)
    assert any(np.ptp(scores) > 0.1 for scores in learned.scores.values())


def test_the_traced_model_does_not_change_and_the_result_depends_on_the_seed_only(graph, trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    options = {"training": kirsch.Training(epochs=1, optimizer="adamw", learning_rate=2e-3), "progress": False}
    runs = [kirsch.learn_gates(graph, kirsch.Goal(macs=0.6), data(), **options) for _ in range(2)]
    for name, scores in runs[0].scores.items():
        np.testing.assert_array_equal(scores, runs[1].scores[name])
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_gates_are_trained_with_a_teacher():
    model = build("residual").float()
    graph = kirsch.trace(model, model.inputs[:2].float())
    images = kirsch.ArrayData(model.inputs.float().numpy(), np.arange(6) % 3, batch_size=3)
    training = kirsch.Training(epochs=1, optimizer="adamw", learning_rate=2e-3)
    learned = kirsch.learn_gates(
        graph,
        kirsch.Goal(macs=0.7),
        images,
        teacher=model,
        objective=kirsch.Objective.kd(),
        training=training,
        round_to=1,
        progress=False,
        hooks=kirsch.TrainingHooks(event=lambda _event: None),
    )
    assert "kd" in learned.trained.history[0]["terms"]


@pytest.mark.parametrize("name", NETWORKS)
def test_closed_gates_have_the_effect_of_zeros_in_all_weights_that_read_the_unit(name):
    """The pruned model is compared: these networks have no normalization over channels, so it computes the same."""
    model = build(name)
    graph = kirsch.trace(model, model.inputs[:2])
    goal = kirsch.Goal(parameters=0.7)
    gated = kirsch.with_gates(graph, goal, steps=10)
    plan = kirsch.plan(graph, goal, round_to=1, importance="random")
    removed = {removal.name: set(removal.removed) for removal in plan.groups}
    closed = [unit in removed.get(group.name, ()) for group in graph.groups for unit in range(group.size)]
    gates = torch.tensor([0.0 if each else 1.0 for each in closed], dtype=torch.float64)
    factors = gated.gating.factors(gates, gated)
    with torch.no_grad():
        for path, factor in factors.items():
            gated.model.get_parameter(path).mul_(factor)
        found = gated.model(model.inputs)
    torch.testing.assert_close(found, kirsch.prune(model, plan)(model.inputs), rtol=1e-9, atol=1e-9)


def test_random_gates_differ_between_passes_in_training_mode_and_are_fixed_otherwise(graph):
    gated = kirsch.with_gates(graph, kirsch.Goal(macs=0.5), steps=1)
    inputs = torch.randn(4, 8)
    assert torch.equal(gated(inputs), gated(inputs))
    gated.train()
    gated(inputs)
    assert not torch.equal(gated(inputs), gated(inputs))
    assert int(gated.step) == 3


def test_the_budget_is_lowered_over_the_steps(graph):
    """The mean number of open gates follows the schedule; the expected cost at each step is computed from the gates."""
    goal = kirsch.Goal(macs=0.4)
    gating = kirsch.with_gates(graph, goal, steps=100).gating
    values = np.zeros(gating.size)
    costs = []
    for step in (0, 15, 30, 60, 90):
        location = gating.location(values, None, np.float64(step))
        costs.append(gating.expected_cost(1 / (1 + np.exp(-location + 2 / 3 * np.log(0.1 / 1.1))))["macs"])
    assert costs == pytest.approx([0.97, 1 - 0.6 * (1 - 0.95 * 0.75**3), 1 - 0.6 * (1 - 0.95 / 8), 0.4, 0.4], abs=1e-6)


def test_impossible_calls_are_refused_before_training(graph, trained):
    with pytest.raises(GoalError, match="least reachable"):
        kirsch.learn_gates(graph, kirsch.Goal(macs=0.01), data())
    with pytest.raises(GoalError, match="memory cannot be used with gates"):
        kirsch.with_gates(graph, kirsch.Goal(memory=0.5), steps=3)
    with pytest.raises(UsageError, match=r"`data` of kirsch\.learn_gates has no length"):
        kirsch.learn_gates(graph, kirsch.Goal(macs=0.5), iter_only())
    with pytest.raises(UsageError, match=r"A Sequential has no gates\. Give the trained result of kirsch\.with_gates"):
        kirsch.read_gates(trained, graph, kirsch.Goal(macs=0.5))
    gated = kirsch.with_gates(graph, kirsch.Goal(macs=0.7), steps=3, exclude="0")
    with pytest.raises(UsageError, match=r"The model has 10 gates, and 22 units can be removed"):
        kirsch.read_gates(gated, graph, kirsch.Goal(macs=0.7))


def iter_only():
    class Batches:
        def __iter__(self):
            return iter([samples()])

    return Batches()
