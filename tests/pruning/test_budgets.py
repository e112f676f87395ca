"""Goals on the bytes of the weights and the peak memory of the activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import GoalError
from kirsch.pruning.units import unit_cost

IMAGES = torch.randn(2, 3, 16, 16)


class Residual(nn.Module):
    """A residual block, whose input exists until the sum."""

    def __init__(self, width, hidden):
        super().__init__()
        self.inner, self.norm, self.outer = (
            nn.Conv2d(width, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.Conv2d(hidden, width, 1),
        )

    def forward(self, x):
        return x + self.outer(self.norm(self.inner(x)).relu())


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        Residual(16, 48),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * 16, 40),
        nn.ReLU(),
        nn.Linear(40, 4),
    ).eval()


def test_size_is_the_bytes_of_parameters_and_buffers():
    model = network().half()
    graph = kirsch.trace(model, IMAGES.half())
    tensors = [*model.parameters(), *model.buffers()]
    assert graph.cost.size == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_memory_is_that_of_the_tensors_that_exist_at_the_same_time():
    graph = kirsch.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4))
    assert graph.cost.memory == (8 + 8) * 4  # input and output of the ReLU
    graph = kirsch.trace(network(), IMAGES)
    pixels = 2 * 16 * 16
    assert graph.cost.memory == (16 + 48 + 48) * pixels * 4  # input of the block, input and output of an inner layer


def test_views_have_no_memory_of_their_own():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 2)

        def forward(self, x):
            first, second = x.transpose(0, 1).reshape(4, 16).split(8, dim=1)
            return self.layer(first) + second.sum()

    # The transposed input is copied by the reshape. The copy exists until its second part is read.
    assert kirsch.trace(Reshaped(), torch.randn(8, 8)).cost.memory == (64 + 64) * 4


@pytest.mark.parametrize("goal", [{"size": 0.5}, {"memory": 0.6}, {"macs": 0.6, "memory": 0.7, "size": 0.8}])
def test_the_goal_is_met_within_one_percent_and_by_the_pruned_model(goal):
    model, target = network(), kirsch.Goal(**goal)
    plan = kirsch.plan(kirsch.trace(model, IMAGES), target, round_to=1)
    reached = target.fractions(plan.after, plan.before)
    assert all(value <= limit for value, limit in reached.values())
    assert min(limit - value for value, limit in reached.values()) < 0.01
    assert kirsch.trace(kirsch.prune(model, plan), IMAGES).cost == plan.after
    assert kirsch.Plan.from_json(plan.to_json()).after == plan.after


def test_an_unreachable_memory_goal_names_the_layers_at_the_peak():
    graph = kirsch.trace(network(), IMAGES)
    with pytest.raises(GoalError, match=r"memory 10% is requested.*of the bytes of the activations in `1\.inner`"):
        kirsch.plan(graph, kirsch.Goal(memory=0.1), kinds=["channel"], exclude="1.inner")


def test_an_unreachable_memory_goal_names_activations_by_the_layers_that_set_their_width():
    """An activation function has no parameters, and the size of the inputs is fixed."""
    layers = (
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    graph = kirsch.trace(nn.Sequential(*layers).eval(), IMAGES)
    with pytest.raises(GoalError, match=r"in `0` \(.*\), `1` \(.*\), cut as far as min_keep=0\.1"):
        kirsch.plan(graph, kirsch.Goal(memory=0.01))
    with pytest.raises(GoalError, match=r"in `0` \(.*\), `1` \(.*\), which exclude=\['0'\] keeps unchanged"):
        kirsch.plan(graph, kirsch.Goal(memory=0.01), exclude="0")
    with pytest.raises(GoalError, match=r"in `inputs of the model`, whose sizes do not depend on units that can be"):
        kirsch.plan(graph, kirsch.Goal(memory=0.01), round_to=1)


@pytest.mark.parametrize("name", ["macs", "parameters", "size", "memory"])
@pytest.mark.parametrize(
    ("options", "cause", "fix"),
    [
        ({"exclude": ["0", "1.*", "5"]}, "keeps unchanged", "exclude"),
        ({"kinds": ["head"]}, "whose units have the kind 'channel', which `kinds` keeps", "'channel' in kinds"),
        ({"keep": {"0": 1.0, "1.inner": 1.0, "5": 1.0}}, "whose width `keep` sets", "is reached with keep"),
        ({"min_keep": 0.9}, "cut as far as min_keep=0.9, round_to='auto' allow", "min_keep=0.1 (the default)"),
    ],
)
def test_an_unreachable_goal_states_the_least_cost_what_holds_it_and_what_reaches_it(name, options, cause, fix):
    graph, goal = kirsch.trace(network(), IMAGES), kirsch.Goal(**{name: 0.4})
    with pytest.raises(GoalError) as caught:
        kirsch.plan(graph, goal, **options)
    assert caught.value.what.startswith(f"No plan for Sequential reaches the goal: {name} 40% is requested, ")
    assert cause in caught.value.why
    assert fix in caught.value.fix


def test_a_printed_plan_has_a_row_for_each_limit():
    plan = kirsch.plan(kirsch.trace(network(), IMAGES), kirsch.Goal(size=0.6, memory=0.9))
    text = str(plan)
    assert "bytes of the weights" in text
    assert "goal met: ≤ 60 %" in text
    assert "bytes of the activations" in text


def test_the_memory_of_a_model_without_a_block_is_predicted():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), *(Residual(16, 24 + 8 * index) for index in range(3)), nn.Flatten()
    ).eval()
    graph = kirsch.trace(model, IMAGES)
    for block in graph.blocks:
        without = graph.prices.price(graph.keep({}), [block])
        smaller = nn.Sequential(*(layer for index, layer in enumerate(model) if str(index) != block))
        assert without == kirsch.trace(smaller, IMAGES).cost


def test_the_memory_cost_of_a_unit_counts_every_operation_above_the_goal():
    """Four equal blocks: a hidden layer lowers the memory of its block only, and so not the peak."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *(Residual(16, 48) for _ in "1234"), nn.Flatten(), nn.Linear(3136, 4))
    graph = kirsch.trace(model.eval(), IMAGES)
    stream, *hidden = graph.groups
    costs = [unit_cost(graph, kirsch.Goal(memory=0.7), [group]) for group in (stream, *hidden)]
    assert costs[1:] == pytest.approx([costs[1]] * 4)
    assert 1 < costs[0] / costs[1] < 48

    def importance(graph, group):
        return [1.1 * costs[0] if group.name == stream.name else costs[1]] * group.size

    plan = kirsch.plan(graph, kirsch.Goal(memory=0.7), importance=importance, ranking="per_cost", round_to=1)
    assert {removal.name for removal in plan.groups} == {group.name for group in hidden}


def test_a_note_names_the_limit_because_of_which_another_one_is_far_undercut():
    plan = kirsch.plan(kirsch.trace(network(), IMAGES), kirsch.Goal(memory=0.4, macs=0.9), round_to=1)
    (note,) = (note for note in plan.notes if "points below" in note)
    assert note.startswith("MACs are ")
    assert note.endswith("points below the goal of 90.0%, because of the goal on the bytes of the activations.")
