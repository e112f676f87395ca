"""Comparisons in a model's code: a compared attribute changes with the size, or the size is frozen."""

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
from trace_and_cut import with_noise

IMAGE = torch.randn(2, 3, 6, 6)


class Checked(nn.Module):
    """A convolution whose `forward` first calls `check` with the module and its input."""

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


def raises_unless_equal(s, x):
    if x.shape[1] != s.channels:
        raise ValueError(x.shape)


def asserts_equal(s, x):
    assert x.shape[1] == s.channels


def asserts_shape(s, x):
    assert tuple(x.shape) == (2, s.channels, 6, 6)


def compares_with_layer(s, x):
    assert x.shape[1] == s.conv.in_channels


def compares_with_weight(s, x):
    assert x.size(1) == s.conv.weight.shape[0]


def compares_width_of_layer(s, x):
    assert s.conv.out_channels == x.shape[1]


def asserts_all(s, x):
    assert all(size == expected for size, expected in zip(x.shape, (2, s.channels, 6, 6), strict=True))


def raises_if_any_differs(s, x):
    if any(size != s.conv.in_channels for size in (x.shape[1], x.size(1))):
        raise ValueError(x.shape)


ADJUSTED = {
    "assert": asserts_equal,
    "raise": raises_unless_equal,
    "torch._assert": lambda s, x: torch._assert(x.shape[1] == s.channels, "channels"),
    "torch._check": lambda s, x: torch._check(x.shape[1] == s.channels),
    "list": lambda s, x: torch._assert(x.shape[1] == s.listed[0], "channels"),
    "difference": lambda s, x: torch._assert(not x.shape[1] - s.channels, "channels"),
    "shape": asserts_shape,
    "in_channels of a layer": compares_with_layer,
    "shape of a weight": compares_with_weight,
    "out_channels of a layer": compares_width_of_layer,
    "all": asserts_all,
    "any": raises_if_any_differs,
    "double": lambda s, x: torch._assert(2 * x.shape[1] == 2 * s.channels, "channels"),
}


def equals_number(_, x):
    assert x.shape[1] == 16


def is_one_of(_, x):
    assert x.shape[1] in (16, 32)


def is_at_least(s, x):
    assert x.shape[1] >= s.channels


def is_multiple(_, x):
    assert x.shape[1] % 16 == 0


def raises_for_remainder(_, x):
    if x.shape[1] % 16:
        raise ValueError(x.shape)


def equals_dict_item(s, x):
    assert x.shape[1] == s.named["channels"]


def equals_config(s, x):
    assert x.shape[1] == s.config.channels


def all_equal_numbers(_, x):
    assert all(size == expected for size, expected in zip(x.shape, (2, 16, 6, 6), strict=True))


def layer_width_equals_number(s, _):
    assert s.conv.in_channels == 16


FROZEN = {
    "number": equals_number,
    "one of several": is_one_of,
    "at least": is_at_least,
    "multiple": is_multiple,
    "remainder": raises_for_remainder,
    "dict": equals_dict_item,
    "config": equals_config,
    "all": all_equal_numbers,
    "in_channels of a layer and a number": layer_width_equals_number,
}


def widths(model):
    return model.first.out_channels, model.checked.conv.out_channels


@pytest.mark.parametrize("kind", ADJUSTED)
def test_an_attribute_compared_with_a_size_is_adjusted(kind):
    model = with_noise(Net(ADJUSTED[kind]))
    result = prune_with_verification(model, kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.5)))
    assert result.verification.power > 1e-3
    assert all(width < 16 for width in widths(result.model))


@pytest.mark.parametrize("kind", FROZEN)
def test_a_size_whose_comparison_cannot_be_adjusted_is_frozen_and_the_error_has_the_line_and_a_fix(kind):
    model = with_noise(Net(FROZEN[kind]))
    graph = kirsch.trace(model, IMAGE)
    pruned = kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.8)))
    assert pruned.first.out_channels == 16
    line = FROZEN[kind].__code__.co_firstlineno + 1
    with pytest.raises(GoalError, match=rf"\(test_comparisons\.py:{line}\).*as_graph=True"):
        kirsch.plan(graph, Goal(macs=0.2))
    as_graph = kirsch.trace(model, IMAGE, as_graph=True)
    assert kirsch.prune(model, kirsch.plan(as_graph, Goal(macs=0.2))).first.weight.shape[0] < 16


@pytest.mark.parametrize(
    ("attribute", "attribute_by_width"), [(16, {8: 8, 12: 12, 7: 7}), (8, {12: 6, 14: 7}), (4, {12: 4, 8: 4})]
)
def test_an_attribute_that_divides_a_size_is_scaled_with_the_size(attribute, attribute_by_width):
    """The attribute is not set to 1, although 1 divides each size."""

    def divides(s, x):
        assert x.shape[1] % s.channels == 0

    for width, expected in attribute_by_width.items():
        model = with_noise(Net(divides))
        model.checked.channels = attribute
        graph = kirsch.trace(model, IMAGE)
        plan = kirsch.plan(graph, Goal(macs=0.9), round_to=4)
        pruned = kirsch.prune(model, removing(plan, "first", 16 - width))
        assert (pruned.first.out_channels, pruned.checked.channels) == (width, expected)


def test_the_error_for_a_size_that_no_value_of_the_attribute_divides_names_the_line():
    def divides(s, x):
        assert x.shape[1] % s.channels == 0

    model = with_noise(Net(divides))
    model.checked.channels = 4
    plan = kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.9), round_to=4)
    line = divides.__code__.co_firstlineno + 1
    with pytest.raises(PlanError, match=rf"comparison at test_comparisons\.py:{line}\..*`checked\.channels`"):
        kirsch.prune(model, removing(plan, "first", 3))


def removing(plan, name, number):
    """Return the plan that removes only this number of units of one group."""
    only = dataclasses.replace(plan.groups[0], name=name, size=16, removed=tuple(range(number)))
    return dataclasses.replace(plan, groups=(only,))


def test_a_size_compared_with_twice_an_attribute_can_be_pruned():
    model = with_noise(Net(lambda s, x: torch._assert(x.shape[1] == 2 * s.half, "channels")))
    assert prune_with_verification(model, kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.8))).verification.passed


def test_a_plan_must_meet_a_condition_that_only_some_widths_meet():
    def asserts_even(_, x):
        if x.shape[1] % 2:
            raise ValueError(x.shape)

    model = with_noise(Net(asserts_even))
    graph = kirsch.trace(model, IMAGE)
    assert kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.5), round_to=2)).first.out_channels < 16
    line = asserts_even.__code__.co_firstlineno + 1
    plan = kirsch.plan(graph, Goal(macs=0.5), round_to=2)
    # One unit fewer is removed from `first`, so that its width is odd.
    removals = (dataclasses.replace(r, removed=r.removed[r.name == "first" :]) for r in plan.groups)
    with pytest.raises(PlanError, match=rf"result of a comparison at test_comparisons\.py:{line}\..*as_graph=True"):
        kirsch.prune(model, dataclasses.replace(plan, groups=tuple(removals)))


def test_a_comparison_in_a_torch_fx_graph_still_holds_after_pruning():
    traced = fx.symbolic_trace(with_noise(Net(lambda _, x: torch._assert(x.shape[1] == 16, "channels"))))
    result = prune_with_verification(traced, kirsch.plan(kirsch.trace(traced, IMAGE), Goal(macs=0.8)))
    assert result.verification.power > 1e-3


def test_comparisons_that_only_choose_a_branch_do_not_freeze_sizes():
    def choosing(_, x):
        if all(size == 16 for size in x.shape[1:2]):
            return x
        return tuple(size == 16 for size in x.shape)

    model = with_noise(Net(choosing))
    assert kirsch.prune(model, kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.5))).first.out_channels < 16


class Skipping(Checked):
    """A layer that only runs for inputs that are wide enough."""

    def forward(self, x):
        if self.channels == 16 and x.shape[1] >= self.channels:
            return super().forward(x)
        return x


def test_the_error_for_a_cut_after_which_forward_takes_another_branch_names_the_comparison():
    model = with_noise(Net(lambda _, x: None))
    model.checked = with_noise(Skipping(lambda _, x: None))
    graph = kirsch.trace(model, IMAGE)
    plan = removing(kirsch.plan(graph, Goal(macs=0.9)), "first", 4)
    line = Skipping.forward.__code__.co_firstlineno + 1
    sentence = (
        rf"The result of the comparison at test_comparisons\.py:{line} changes with.*Exclude .first., or .*as_graph"
    )
    with pytest.raises(VerificationError, match=sentence) as caught:
        kirsch.prune(model, plan)
    assert "report the model" not in str(caught.value)


def test_a_reshape_to_the_width_of_a_layer_ties_both_layers():
    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            x = self.first(x)
            x = torch.relu(x.reshape(len(x), self.second.out_channels, 6, 6))
            return self.last(torch.relu(self.second(x)))

    model = with_noise(Reshaping())
    pruned = kirsch.prune(model, kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.5)))
    assert pruned.first.out_channels == pruned.second.out_channels < 16


UNTRACED = {
    "lookup": lambda _, x: {16: None}[x.shape[1]],
    "name": lambda _, x: {"w16": None}[f"w{x.shape[1]}"],
    "text": lambda _, x: torch._assert(str(x.shape[1]) == "16", "channels"),
    "list": lambda _, x: torch._assert(not [size for size in x.shape if size not in (2, 16, 6)], "channels"),
}


@pytest.mark.parametrize("kind", UNTRACED)
def test_the_fixes_in_the_error_for_untraced_use_of_a_size_work(kind):
    model = with_noise(Net(UNTRACED[kind]))
    graph = kirsch.trace(model, IMAGE)
    with pytest.raises(VerificationError, match=r"Exclude 'first', or trace .* as_graph=True"):
        kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.5)))
    assert kirsch.prune(model, kirsch.plan(graph, Goal(macs=0.6), exclude=["first"])).checked.conv.out_channels < 16
    as_graph = kirsch.trace(model, IMAGE, as_graph=True)
    assert kirsch.prune(model, kirsch.plan(as_graph, Goal(macs=0.5))).first.weight.shape[0] < 16


def test_a_dictionary_lookup_is_not_a_comparison():
    lookup = {number: number for number in range(1, 17)}
    model = with_noise(Net(lambda _, x: lookup[x.shape[1]]))
    pruned = kirsch.prune(model, kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.5)))
    assert pruned.first.out_channels < 16


def test_an_error_of_the_pruned_model_has_the_line_and_a_fix():
    model = with_noise(Net(lambda _, x: {16: None}[x.shape[1]]))
    plan = kirsch.plan(kirsch.trace(model, IMAGE), Goal(macs=0.5))
    sentence = r"does not run\. KeyError: \d+\. The exception is raised at test_comparisons\.py:\d+\..*as_graph=True"
    with pytest.raises(VerificationError, match=sentence) as caught:
        kirsch.prune(model, plan)
    assert not re.search("report the model", str(caught.value))
