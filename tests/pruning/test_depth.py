"""Choice of the residual blocks to remove."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import GoalError, UnknownNameError, UsageError
from kirsch.graph.plan import Goal
from kirsch.pruning.depth import BLOCK_IMPORTANCES


class Adding(nn.Module):
    """x + weight x."""

    def __init__(self, weight):
        super().__init__()
        self.branch = nn.Linear(2, 2, bias=False)
        self.branch.weight.data = torch.tensor(weight)

    def forward(self, x):
        return x + self.branch(x)


ROTATION = [[0.0, -1.0], [1.0, 0.0]]
"""Rotates by 90 degrees: x + ROTATION x is rotated by 45 degrees."""


def chain(*weights):
    return nn.Sequential(*(Adding(weight) for weight in weights)).eval()


@pytest.fixture
def inputs():
    return torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])


def test_influence_is_one_minus_the_cosine_of_input_and_output(inputs):
    longer, none = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]
    graph = kirsch.trace(chain(ROTATION, longer, none), inputs)
    scores = BLOCK_IMPORTANCES["influence"](graph, [inputs, 2 * inputs], seed=0)
    assert scores == pytest.approx({"0": 1 - 0.5**0.5, "1": 0, "2": 0}, abs=1e-7)


def test_change_is_the_relative_change_of_the_outputs_without_the_block(inputs):
    half = [[0.5, 0.0], [0.0, 0.5]]
    graph = kirsch.trace(chain(half, half), inputs)
    scores = BLOCK_IMPORTANCES["change"](graph, [inputs], seed=0)
    assert scores == pytest.approx({"0": 1 / 3, "1": 1 / 3}, rel=1e-6)


@pytest.mark.parametrize("importance", ["influence", "change"])
def test_the_least_important_blocks_are_removed(inputs, importance):
    small = [[0.0, -0.1], [0.1, 0.0]]
    graph = kirsch.trace(chain(ROTATION, small, ROTATION, small), inputs)
    plan = kirsch.plan_depth(graph, Goal(macs=0.5), inputs, importance)
    assert plan.without == ("1", "3")
    assert plan.after.macs * 2 == plan.before.macs
    assert all(importance in block.reason for block in plan.blocks)


def test_blocks_are_restored_as_long_as_the_goal_is_met(inputs):
    class Wide(Adding):
        def __init__(self):
            super().__init__([[0.1, 0.2], [0.0, 0.1]])
            self.more = nn.Sequential(nn.Linear(2, 50), nn.Linear(50, 2))
            self.more[1].weight.data *= 20

        def forward(self, x):
            return x + self.branch(x) + self.more(x)

    torch.manual_seed(0)
    model = nn.Sequential(Adding([[0.0, 0.0], [0.0, 0.0]]), Wide(), Adding(ROTATION)).eval()
    plan = kirsch.plan_depth(kirsch.trace(model, inputs), Goal(parameters=0.5), inputs, "change")
    assert plan.without == ("1",)


def test_random_blocks_depend_only_on_the_seed(inputs):
    graph = kirsch.trace(chain(*[ROTATION] * 8), inputs)
    drawn = {kirsch.plan_depth(graph, Goal(macs=0.5), inputs, "random", seed=seed).without for seed in range(4)}
    assert len(drawn) > 1
    assert kirsch.plan_depth(graph, Goal(macs=0.5), inputs, "random", seed=2).without in drawn


def test_excluded_blocks_are_kept(inputs):
    graph = kirsch.trace(nn.Sequential(chain(ROTATION, ROTATION), chain(ROTATION, ROTATION)).eval(), inputs)
    assert kirsch.plan_depth(graph, Goal(macs=0.5), inputs, exclude=["1"]).without == ("0.0", "0.1")
    assert kirsch.plan_depth(graph, Goal(macs=0.5), inputs, exclude=["*.0"]).without == ("0.1", "1.1")
    with pytest.raises(UnknownNameError, match="no residual block to `exclude` named '7'"):
        kirsch.plan_depth(graph, Goal(macs=0.5), inputs, exclude=["7"])


def test_an_unreachable_goal_names_the_least_reachable_cost(inputs):
    graph = kirsch.trace(nn.Sequential(chain(ROTATION), nn.Linear(2, 2)).eval(), inputs)
    with pytest.raises(GoalError, match=r"macs 20\.0% is requested, 50\.0% is the least reachable.*1 residual block"):
        kirsch.plan_depth(graph, Goal(macs=0.2), inputs)


def test_an_importance_that_is_not_finite_is_refused(inputs):
    graph = kirsch.trace(chain(ROTATION, ROTATION), inputs)
    with pytest.raises(UsageError, match=r"importance 'influence' of the block '0' is nan"):
        kirsch.plan_depth(graph, Goal(macs=0.5), inputs * float("nan"))


def test_an_unknown_importance_names_the_known_ones(inputs):
    with pytest.raises(UnknownNameError, match="influence"):
        kirsch.plan_depth(kirsch.trace(chain(ROTATION, ROTATION), inputs), Goal(macs=0.5), inputs, "influense")
