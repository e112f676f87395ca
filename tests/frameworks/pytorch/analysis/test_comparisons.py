"""What a model's code compares with its sizes follows a cut, or is held with the line and the way out."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

import kirsch
from kirsch.errors import GoalError, PlanError, VerificationError
from kirsch.graph.plan import Goal
from kirsch.pruning.prune import prune_with_verification
from proving import shaken

IMAGE = torch.randn(2, 3, 6, 6)


class Checked(nn.Module):
    """A layer whose forward asks something of its input first."""

    def __init__(self, check):
        super().__init__()
        self.channels, self.half, self.listed = 16, 8, [16]
        self.named, self.config = {"channels": 16}, SimpleNamespace(channels=16)
        self.conv, self.check = nn.Conv2d(16, 16, 3, padding=1), check

    def forward(self, x):
        self.check(self, x)
        return self.conv(x)


class Net(nn.Module):
    def __init__(self, check):
        super().__init__()
        self.first, self.checked, self.last = nn.Conv2d(3, 16, 1), Checked(check), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.last(torch.relu(self.checked(torch.relu(self.first(x)))))


def raising(s, x):
    if x.shape[1] != s.channels:
        raise ValueError(x.shape)


def asserting(s, x):
    assert x.shape[1] == s.channels


def tupled(s, x):
    assert tuple(x.shape) == (2, s.channels, 6, 6)


def compared_with_a_layer(s, x):
    assert x.shape[1] == s.conv.in_channels


def compared_with_a_weight(s, x):
    assert x.size(1) == s.conv.weight.shape[0]


def compared_with_the_width_of_a_layer(s, x):
    assert s.conv.out_channels == x.shape[1]


def all_of_several(s, x):
    assert all(size == wanted for size, wanted in zip(x.shape, (2, s.channels, 6, 6), strict=True))


def any_of_several(s, x):
    if any(size != s.conv.in_channels for size in (x.shape[1], x.size(1))):
        raise ValueError(x.shape)


FOLLOWING = {
    "assert": asserting,
    "raise": raising,
    "torch._assert": lambda s, x: torch._assert(x.shape[1] == s.channels, "channels"),
    "torch._check": lambda s, x: torch._check(x.shape[1] == s.channels),
    "list": lambda s, x: torch._assert(x.shape[1] == s.listed[0], "channels"),
    "difference": lambda s, x: torch._assert(not x.shape[1] - s.channels, "channels"),
    "shape": tupled,
    "layer": compared_with_a_layer,
    "weight": compared_with_a_weight,
    "width of a layer": compared_with_the_width_of_a_layer,
    "all": all_of_several,
    "any": any_of_several,
    "double": lambda s, x: torch._assert(2 * x.shape[1] == 2 * s.channels, "channels"),
}


def number(_, x):
    assert x.shape[1] == 16


def one_of(_, x):
    assert x.shape[1] in (16, 32)


def at_least(s, x):
    assert x.shape[1] >= s.channels


def multiple(_, x):
    assert x.shape[1] % 16 == 0


def remainder(_, x):
    if x.shape[1] % 16:
        raise ValueError(x.shape)


def named(s, x):
    assert x.shape[1] == s.named["channels"]


def configured(s, x):
    assert x.shape[1] == s.config.channels


def every(_, x):
    assert all(size == wanted for size, wanted in zip(x.shape, (2, 16, 6, 6), strict=True))


def width_of_a_layer(s, _):
    assert s.conv.in_channels == 16


HELD = {
    "number": number,
    "one of several": one_of,
    "at least": at_least,
    "multiple": multiple,
    "remainder": remainder,
    "dict": named,
    "config": configured,
    "all": every,
    "width of a layer": width_of_a_layer,
}


def widths(model):
    return model.first.out_channels, model.checked.conv.out_channels


@pytest.mark.parametrize("kind", FOLLOWING)
def test_an_attribute_that_a_size_is_compared_with_follows(kind):
    model = shaken(Net(FOLLOWING[kind]))
    found = prune_with_verification(model, kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.5)))
    assert found.verification.power > 1e-3
    assert all(width < 16 for width in widths(found.model))


@pytest.mark.parametrize("kind", HELD)
def test_a_size_that_is_compared_with_what_cannot_follow_stays_and_the_error_has_the_line_and_the_way_out(kind):
    model = shaken(Net(HELD[kind]))
    graph = kirsch.trace(model, IMAGE)
    pruned = kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.8)))
    assert pruned.first.out_channels == 16
    line = HELD[kind].__code__.co_firstlineno + 1
    with pytest.raises(GoalError, match=rf"\(test_comparisons\.py:{line}\).*as_graph=True"):
        kirsch.plan(graph, Goal(macs=0.2))
    free = kirsch.trace(model, IMAGE, as_graph=True)
    assert kirsch.prune(model, kirsch.plan(free, Goal(macs=0.2))).first.weight.shape[0] < 16


@pytest.mark.parametrize(
    ("today", "widths_today"), [(16, {8: 8, 12: 12, 7: 7}), (8, {12: 6, 14: 7}), (4, {12: 4, 8: 4})]
)
def test_an_attribute_that_divides_a_size_keeps_its_relation_to_it(today, widths_today):
    """Each size is divisible by 1, which is not what the attribute stands for."""

    def divides(s, x):
        assert x.shape[1] % s.channels == 0

    for width, expected in widths_today.items():
        model = shaken(Net(divides))
        model.checked.channels = today
        graph = kirsch.trace(model, IMAGE)
        plan = kirsch.plan(graph, Goal(macs=0.9), round_to=4)
        pruned = kirsch.prune(model, removing(plan, "first", 16 - width))
        assert (pruned.first.out_channels, pruned.checked.channels) == (width, expected)


def test_a_size_that_no_value_in_the_same_relation_divides_is_refused_at_the_line():
    def divides(s, x):
        assert x.shape[1] % s.channels == 0

    model = shaken(Net(divides))
    model.checked.channels = 4
    plan = kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.9), round_to=4)
    line = divides.__code__.co_firstlineno + 1
    with pytest.raises(PlanError, match=rf"A comparison at test_comparisons\.py:{line} .*`checked\.channels`"):
        kirsch.prune(model, removing(plan, "first", 3))


def removing(plan, name, number):
    """The plan with nothing but so many units of one group."""
    only = dataclasses.replace(plan.groups[0], name=name, size=16, removed=tuple(range(number)))
    return dataclasses.replace(plan, groups=(only,))


def test_a_property_of_an_attribute_follows_or_holds():
    model = shaken(Net(lambda s, x: torch._assert(x.shape[1] == 2 * s.half, "channels")))
    assert prune_with_verification(model, kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.8))).verification.passed


def test_a_condition_that_some_choices_meet_is_left_to_the_plan():
    def eights(_, x):
        if x.shape[1] % 2:
            raise ValueError(x.shape)

    model = shaken(Net(eights))
    graph = kirsch.trace(model, IMAGE)
    assert kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.5), round_to=2)).first.out_channels < 16
    line = eights.__code__.co_firstlineno + 1
    plan = kirsch.plan(graph, Goal(macs=0.5), round_to=2)
    removals = (dataclasses.replace(r, removed=r.removed[r.name == "first" :]) for r in plan.groups)
    with pytest.raises(PlanError, match=rf"A comparison at test_comparisons\.py:{line} does not allow.*as_graph=True"):
        kirsch.prune(model, dataclasses.replace(plan, groups=tuple(removals)))


def test_a_comparison_in_a_graph_of_torch_fx_holds():
    traced = fx.symbolic_trace(shaken(Net(lambda _, x: torch._assert(x.shape[1] == 16, "channels"))))
    found = prune_with_verification(traced, kirsch.plan(kirsch.trace(traced, IMAGE), Goal(macs=0.8)))
    assert found.verification.power > 1e-3


def test_comparisons_that_all_is_given_and_that_only_choose_do_not_hold():
    def choosing(_, x):
        if all(size == 16 for size in x.shape[1:2]):
            return x
        return tuple(size == 16 for size in x.shape)

    model = shaken(Net(choosing))
    assert kirsch.prune(model, kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.5))).first.out_channels < 16


class Skipping(Checked):
    """A layer that only runs for inputs that are wide enough."""

    def forward(self, x):
        if self.channels == 16 and x.shape[1] >= self.channels:
            return super().forward(x)
        return x


def test_a_choice_that_turns_out_otherwise_is_named_when_the_cut_fails():
    model = shaken(Net(lambda _, x: None))
    model.checked = shaken(Skipping(lambda _, x: None))
    graph = kirsch.trace(model, IMAGE)
    plan = removing(kirsch.plan(graph, Goal(macs=0.9)), "first", 4)
    line = Skipping.forward.__code__.co_firstlineno + 1
    sentence = (
        rf"The comparison at test_comparisons\.py:{line} turns out otherwise.*Exclude 'first', or trace.*as_graph"
    )
    with pytest.raises(VerificationError, match=sentence) as caught:
        kirsch.prune(model, plan)
    assert "report the model" not in str(caught.value)


def test_a_reshape_to_the_width_of_a_layer_ties_both():
    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            x = self.first(x)
            x = torch.relu(x.reshape(len(x), self.second.out_channels, 6, 6))
            return self.last(torch.relu(self.second(x)))

    model = shaken(Reshaping())
    pruned = kirsch.prune(model, kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.5)))
    assert pruned.first.out_channels == pruned.second.out_channels < 16


UNSEEN = {
    "lookup": lambda _, x: {16: None}[x.shape[1]],
    "name": lambda _, x: {"w16": None}[f"w{x.shape[1]}"],
    "text": lambda _, x: torch._assert(str(x.shape[1]) == "16", "channels"),
    "list": lambda _, x: torch._assert(not [size for size in x.shape if size not in (2, 16, 6)], "channels"),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_the_ways_out_that_an_error_of_the_pruned_model_names_are_ways_out(kind):
    model = shaken(Net(UNSEEN[kind]))
    graph = kirsch.trace(model, IMAGE)
    with pytest.raises(VerificationError, match=r"Exclude 'first', or trace .* as_graph=True"):
        kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.5)))
    assert kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.6), exclude=["first"])).checked.conv.out_channels < 16
    free = kirsch.trace(model, IMAGE, as_graph=True)
    assert kirsch.prune(model, kirsch.plan(free, Goal(macs=0.5))).first.weight.shape[0] < 16


def test_sizes_that_are_looked_up_do_not_count_as_compared():
    lookup = {number: number for number in range(1, 17)}
    model = shaken(Net(lambda _, x: lookup[x.shape[1]]))
    pruned = kirsch.prune(model, kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.5)))
    assert pruned.first.out_channels < 16


def test_an_error_of_the_pruned_model_has_the_line_and_the_way_out():
    model = shaken(Net(lambda _, x: {16: None}[x.shape[1]]))
    plan = kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.5))
    sentence = r"does not run\. KeyError: \d+\. It is raised at test_comparisons\.py:\d+\..*as_graph=True"
    with pytest.raises(VerificationError, match=sentence) as caught:
        kirsch.prune(model, plan)
    assert not re.search("report the model", str(caught.value))
