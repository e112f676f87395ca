"""Which blocks go, and why these."""

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


TURN = [[0.0, -1.0], [1.0, 0.0]]
"""Turns by a right angle: x + TURN x lies half way between."""


def row(*weights):
    return nn.Sequential(*(Adding(weight) for weight in weights)).eval()


@pytest.fixture
def inputs():
    return torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])


def test_the_influence_of_a_block_is_one_minus_the_cosine_of_what_it_is_given_and_puts_out(inputs):
    longer, none = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]
    graph = kirsch.trace(row(TURN, longer, none), inputs)
    found = BLOCK_IMPORTANCES["influence"](graph, [inputs, 2 * inputs], seed=0)
    assert found == pytest.approx({"0": 1 - 0.5**0.5, "1": 0, "2": 0}, abs=1e-7)


def test_the_change_by_a_block_is_that_of_the_output_without_it(inputs):
    half = [[0.5, 0.0], [0.0, 0.5]]
    graph = kirsch.trace(row(half, half), inputs)
    found = BLOCK_IMPORTANCES["change"](graph, [inputs], seed=0)
    assert found == pytest.approx({"0": 1 / 3, "1": 1 / 3}, rel=1e-6)


@pytest.mark.parametrize("importance", ["influence", "change"])
def test_what_does_least_goes_first(inputs, importance):
    small = [[0.0, -0.1], [0.1, 0.0]]
    graph = kirsch.trace(row(TURN, small, TURN, small), inputs)
    plan = kirsch.plan_depth(graph, Goal(macs=0.5), inputs, importance)
    assert plan.without == ("1", "3")
    assert plan.after.macs * 2 == plan.before.macs
    assert all(importance in block.reason for block in plan.blocks)


def test_what_the_goal_leaves_room_for_comes_back(inputs):
    class Wide(Adding):
        def __init__(self):
            super().__init__([[0.1, 0.2], [0.0, 0.1]])
            self.more = nn.Sequential(nn.Linear(2, 50), nn.Linear(50, 2))
            self.more[1].weight.data *= 20

        def forward(self, x):
            return x + self.branch(x) + self.more(x)

    torch.manual_seed(0)
    model = nn.Sequential(Adding([[0.0, 0.0], [0.0, 0.0]]), Wide(), Adding(TURN)).eval()
    plan = kirsch.plan_depth(kirsch.trace(model, inputs), Goal(params=0.5), inputs, "change")
    assert plan.without == ("1",)


def test_equal_seeds_draw_equal_blocks(inputs):
    graph = kirsch.trace(row(*[TURN] * 8), inputs)
    drawn = {kirsch.plan_depth(graph, Goal(macs=0.5), inputs, "random", seed=seed).without for seed in range(4)}
    assert len(drawn) > 1
    assert kirsch.plan_depth(graph, Goal(macs=0.5), inputs, "random", seed=2).without in drawn


def test_what_is_excluded_stays(inputs):
    graph = kirsch.trace(nn.Sequential(row(TURN, TURN), row(TURN, TURN)).eval(), inputs)
    assert kirsch.plan_depth(graph, Goal(macs=0.5), inputs, exclude=["1"]).without == ("0.0", "0.1")
    assert kirsch.plan_depth(graph, Goal(macs=0.5), inputs, exclude=["*.0"]).without == ("0.1", "1.1")
    with pytest.raises(UnknownNameError, match="no residual block to `exclude` named '7'"):
        kirsch.plan_depth(graph, Goal(macs=0.5), inputs, exclude=["7"])


def test_a_goal_out_of_reach_says_what_is_in_reach(inputs):
    graph = kirsch.trace(nn.Sequential(row(TURN), nn.Linear(2, 2)).eval(), inputs)
    with pytest.raises(GoalError, match=r"macs 20\.0% is requested, 50\.0% is the least reachable.*1 residual block"):
        kirsch.plan_depth(graph, Goal(macs=0.2), inputs)


def test_numbers_that_are_none_are_refused(inputs):
    graph = kirsch.trace(row(TURN, TURN), inputs)
    with pytest.raises(UsageError, match=r"importance 'influence' of the block '0' is nan"):
        kirsch.plan_depth(graph, Goal(macs=0.5), inputs * float("nan"))


def test_an_unknown_importance_names_the_known_ones(inputs):
    with pytest.raises(UnknownNameError, match="influence"):
        kirsch.plan_depth(kirsch.trace(row(TURN, TURN), inputs), Goal(macs=0.5), inputs, "influense")
