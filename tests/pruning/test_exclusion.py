"""`exclude` keeps the parameters of layers, `keep_outputs` keeps their outputs; notes name the effect on the cost."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import UnknownNameError
from kirsch.pruning.prune import prune_with_verification

IMAGE = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions, a wide convolution `last`, and a classifier of its outputs."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.last, self.classifier = nn.Conv2d(16, 64, 1), nn.Linear(64, 5)

    def forward(self, x):
        return self.classifier(self.last(self.features(x)).relu().mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


def pruned(model, macs=0.6, **options):
    plan = kirsch.plan(kirsch.trace(model, IMAGE), kirsch.Goal(macs=macs), **options)
    return plan, kirsch.prune(model, plan)


def test_an_excluded_layer_keeps_its_inputs(model):
    _, small = pruned(model, exclude="last", round_to=1)
    assert torch.equal(small.last.weight, model.last.weight)


def test_a_layer_that_keeps_its_outputs_may_lose_inputs(model):
    _, small = pruned(model, keep_outputs="last", round_to=1)
    assert small.last.out_channels == small.classifier.in_features == 64
    assert small.last.in_channels < 16


def test_other_layers_may_lose_outputs_if_one_layer_keeps_its_outputs(model):
    _, small = pruned(model, keep_outputs=["features.0"], round_to=1)
    assert small.features[0].out_channels == 16
    assert small.features[2].out_channels < 16


def test_the_outputs_of_a_container_of_layers_are_kept(model):
    _, small = pruned(model, keep_outputs=["features"], round_to=1)
    assert small.features[2].out_channels == 16
    assert small.features[0].out_channels < 16


def test_globs_name_the_layers_within_a_module(model):
    plan, _ = pruned(model, 0.85, keep_outputs=["features.*"], round_to=1)
    assert {removal.name for removal in plan.groups} == {"last"}


def test_the_outputs_of_a_transposed_convolution_are_on_the_second_axis_of_its_weight():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    _, small = pruned(model.eval(), keep_outputs=["2"], round_to=1)
    assert small[2].weight.shape[1] == 8
    assert small[2].weight.shape[0] < 16


def test_the_outputs_of_a_recurrent_layer_are_kept():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 4)
            self.into = nn.Linear(3, 16)

        def forward(self, x):
            return self.head(self.layer(self.into(x).relu())[0].mean(1))

    torch.manual_seed(0)
    model, inputs = Recurrent().eval(), torch.randn(2, 5, 3)
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.8), keep_outputs="layer", round_to=1)
    assert [removal.name for removal in plan.groups] == ["into"]


def note_on(plan, option):
    """Return the note of a plan on the option `exclude` or `keep_outputs`."""
    (note,) = [note for note in plan.notes if note.startswith(f"{option}=")]
    return note


def test_a_note_compares_the_least_cost_with_and_without_an_exclusion_and_names_the_alternative(model):
    graph = kirsch.trace(model, IMAGE)
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.6), exclude=["classifier"], round_to=1, min_keep=0.25)
    assert graph.cost.macs == macs(16, 16, 64)
    least, otherwise = macs(4, 4, 64) / graph.cost.macs, macs(4, 4, 16) / graph.cost.macs
    note = note_on(plan, "exclude")
    assert "keeps units of the layers `last`, `classifier`: " in note
    assert f"at least {least:.1%} of the MACs and " in note
    assert f" remain, instead of {otherwise:.1%} and " in note
    assert "keep_outputs in place of exclude" in note
    assert "outputs of the model are always kept" in note


def macs(first, second, last):
    """Return the MACs of two samples in closed form, for the widths of the three convolutions."""
    return 2 * (36 * 27 * first + 16 * 9 * first * second + 16 * second * last + last * 5)


def test_the_cost_of_an_exclusion_does_not_include_what_other_options_keep(model):
    graph = kirsch.trace(model, IMAGE)
    options = {"round_to": 1, "min_keep": 0.25, "exclude": ["features.0"], "keep_outputs": ["last"]}
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.9), **options)
    for option, otherwise in (("exclude", macs(4, 4, 64)), ("keep_outputs", macs(16, 4, 16))):
        assert f"instead of {otherwise / graph.cost.macs:.1%}" in note_on(plan, option)


def test_a_note_says_that_an_option_has_no_effect_if_another_option_keeps_the_same_units(model):
    plan, _ = pruned(model, 0.9, exclude=["last"], keep_outputs=["last"])
    assert "has no effect" in note_on(plan, "keep_outputs")


def test_the_cost_of_an_exclusion_needs_no_importance_of_the_excluded_layers(model):
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    plan = kirsch.plan(kirsch.trace(model, IMAGE), kirsch.Goal(macs=0.6), exclude=["classifier"])
    assert "of the MACs" in note_on(plan, "exclude")


def test_the_note_of_an_exclusion_stays_when_the_plan_is_applied(model):
    plan, _ = pruned(model, keep_outputs=["last"])
    note = note_on(plan, "keep_outputs")
    result = prune_with_verification(model, kirsch.Plan.from_json(plan.to_json()))
    assert note in result.notes


def test_a_note_says_that_an_exclusion_of_the_classifiers_outputs_has_no_effect(model):
    plan, _ = pruned(model, keep_outputs=["classifier"])
    assert any(note.startswith("keep_outputs=['classifier'] has no effect") for note in plan.notes)


def test_a_plan_without_exclusions_has_no_note_on_exclusions(model):
    plan, _ = pruned(model)
    assert not any(re.match("(exclude|keep_outputs)=", note) for note in plan.notes)


def test_the_error_for_an_unknown_layer_in_keep_outputs_names_the_nearest(model):
    with pytest.raises(
        UnknownNameError, match=r"`keep_outputs` names the layer 'clasifier', which does not exist.*'classifier'"
    ):
        pruned(model, keep_outputs=["clasifier"])
