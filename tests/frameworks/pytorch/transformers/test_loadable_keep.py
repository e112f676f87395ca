"""Widths by hand that are values of a number of the configuration."""

from __future__ import annotations

import pytest
import torch

import kirsch
from configured_models import INPUT, Config, Small, assert_configuration_builds
from kirsch.errors import UsageError
from trace_and_cut import with_noise


@pytest.fixture
def small():
    torch.manual_seed(0)
    return with_noise(Small(Config())).eval()


@pytest.mark.parametrize("loadable", [None, True])
@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ({"layers.*.up": 8}, {"ffn": 8}),
        ({"layers.*.up": 0.5, "first#1": 2}, {"ffn": 16, "heads": 2, "width": 12}),
        ({"first#1": 3}, {"heads": 3, "width": 18}),
    ],
)
def test_the_configuration_states_widths_by_hand_and_nothing_else_changes(small, keep, expected, loadable):
    plan = kirsch.plan(kirsch.trace(small, INPUT), keep=keep, loadable=loadable)
    assert plan.configuration == expected
    assert plan.method["loadable"] is True
    assert_configuration_builds(kirsch.prune(small, plan))


@pytest.mark.parametrize("ranking", ["global", "per_cost", "local"])
def test_a_goal_is_reached_with_the_other_widths(small, ranking):
    graph, goal = kirsch.trace(small, INPUT), kirsch.Goal(parameters=0.5)
    plan = kirsch.plan(graph, goal, keep={"layers.*.up": 24}, loadable=True, ranking=ranking, round_to=1)
    assert plan.configuration["ffn"] == 24
    assert plan.configuration["width"] < 24
    assert plan.after.parameters <= 0.5 * plan.before.parameters
    assert not plan.blocks  # `keep` names a layer of each block
    assert_configuration_builds(kirsch.prune(small, plan))


def test_widths_that_stay_by_hand_are_not_cut(small):
    graph, goal = kirsch.trace(small, INPUT), kirsch.Goal(parameters=0.6)
    plan = kirsch.plan(graph, goal, keep={"layers.1.up": 1.0}, loadable=True, round_to=1)
    assert "ffn" not in plan.configuration
    assert plan.after.parameters <= 0.6 * plan.before.parameters


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"layers.0.up": 8}, "A step of ffn removes 1 unit of 'layers.0.up', 1 of 'layers.1.up', 1 of 'layers.2.up'."),
        ({"layers.*.up": 8, "layers.2.up": 9}, "A step of ffn removes 1 unit of 'layers.0.up'"),
        ({"first#2": 3}, "cannot be used: layers.0.scale is"),
    ],
)
def test_widths_that_the_configuration_cannot_state_have_an_ordinary_plan_or_an_error(small, keep, words):
    graph = kirsch.trace(small, INPUT)
    plan = kirsch.plan(graph, keep=keep)
    (note,) = (note for note in plan.notes if note.startswith("loadable="))
    assert words in note
    assert plan.method["loadable"] is False
    assert not plan.configuration
    with pytest.raises(UsageError, match="which the configuration cannot state") as caught:
        kirsch.plan(graph, keep=keep, loadable=True)
    assert words in caught.value.why
    assert caught.value.fix.endswith("remove `loadable`, and save the pruned model with kirsch.save.")


def test_the_smallest_model_within_a_drop_has_the_widths_by_hand(small):
    data = [(INPUT, torch.zeros(2, 6, dtype=torch.long))]
    plan = kirsch.plan(
        kirsch.trace(small, INPUT), keep={"layers.*.up": 8}, max_drop=0.99, data=data, metric="agreement"
    )
    assert plan.configuration["ffn"] == 8
    assert plan.configuration["width"] < 24
