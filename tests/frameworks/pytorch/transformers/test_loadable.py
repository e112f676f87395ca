"""Plans with loadable=True only make cuts that the configuration of a transformers model can state."""

from __future__ import annotations

import itertools
import json
import re

import loadable
import pytest
import torch

import kirsch
from configured_models import INPUT, Config, Small, Tied, assert_configuration_builds
from kirsch.errors import GoalError, ModelError, UsageError
from kirsch.frameworks.pytorch.transformers.depths import configured_depths
from kirsch.graph.configuration import ConfiguredDepth
from kirsch.pruning.prune import prune_with_verification
from trace_and_cut import with_noise

RECIPES = {recipe.name: recipe for recipe in loadable.FAMILIES}
CORE = ["Llama", "Gemma 2", "GPT-2", "BLOOM", "Mixtral", "BERT", "ALBERT", "ViT", "T5"]
ELSEWHERE = ["Llama", "BERT"]
"""Families that are also loaded in a process without Kirsch; the benchmark loads all of them."""

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("transformers")]


def half(recipe, **options):
    model, inputs = recipe.build()
    plan = kirsch.plan(kirsch.trace(with_noise(model), inputs), kirsch.Goal(parameters=0.5), loadable=True, **options)
    return model, inputs, plan


@pytest.mark.parametrize("name", CORE)
def test_half_of_the_parameters_remain_and_from_pretrained_loads_the_result(name, tmp_path):
    model, inputs, plan = half(RECIPES[name])
    assert plan.method["loadable"] is True
    found = prune_with_verification(model, plan)
    assert found.warnings == ()
    assert found.plan.configuration == plan.configuration != {}
    assert 0.48 <= sum(p.numel() for p in found.model.parameters()) / sum(p.numel() for p in model.parameters()) <= 0.5
    assert any(note.startswith("config: ") for note in found.notes)
    found.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], found.model(**inputs)[0])
    if name in ELSEWHERE:
        result = loadable.loaded(found.model, inputs, str(tmp_path))
        assert all(result.values()), result
        assert "same" in result


@pytest.mark.sweep
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in CORE])
def test_every_other_family_is_half_as_large_and_loads_elsewhere_or_is_refused_in_the_plan(name):
    found = loadable.row(RECIPES[name])
    if "why" in found:
        assert "cannot state" in found["why"]
    else:
        assert found["same"]
        assert 0.48 <= found["left"] <= 0.5


def test_experts_are_removed_if_the_router_may_choose_among_fewer(tmp_path):
    model, inputs = RECIPES["Mixtral"].build()
    graph = kirsch.trace(with_noise(model), inputs, softmax="kept")
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.75), kinds=["expert"], loadable=True)
    assert plan.configuration == {"num_local_experts": 2}
    pruned = kirsch.prune(model, plan)
    pruned.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], pruned(**inputs)[0])


def test_experts_that_run_one_after_another_cannot_be_traced_and_the_error_has_the_fix():
    model, inputs = RECIPES["Mixtral"].build()
    model.set_experts_implementation("eager")
    with pytest.raises(ModelError, match="cannot be traced") as caught:
        kirsch.trace(model, inputs)
    assert 'Call model.set_experts_implementation("grouped_mm")' in caught.value.fix
    model.set_experts_implementation("grouped_mm")
    kirsch.trace(model, inputs)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return with_noise(Small(Config())).eval()


@pytest.mark.parametrize("parameters", [0.8, 0.6, 0.4, 0.2])
def test_the_configuration_states_the_result_of_each_goal(small, parameters):
    plan = kirsch.plan(kirsch.trace(small, INPUT), kirsch.Goal(parameters=parameters), round_to=1, loadable=True)
    pruned = kirsch.prune(small, plan)
    assert parameters - 0.02 <= plan.after.parameters / plan.before.parameters <= parameters
    for path, number in plan.configuration.items():
        assert getattr(pruned.config, path) == number < getattr(small.config, path)
    assert pruned.config.width % pruned.config.heads == 0
    assert_configuration_builds(pruned)
    assert small.config.to_dict() == Config().to_dict()


def test_width_and_heads_are_cut_together_if_the_head_width_follows_from_both(small):
    graph = kirsch.trace(small, INPUT)
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.7), loadable=True, kinds=["head"])
    assert set(plan.configuration) == {"width", "heads"}
    assert plan.configuration["width"] / plan.configuration["heads"] == 6
    with pytest.raises(GoalError, match=r"It cannot state width: .*scale is 0\.\d+ and would be") as caught:
        kirsch.plan(graph, kirsch.Goal(parameters=0.7), loadable=True, kinds=["head dim"])
    assert "Remove `loadable`" in caught.value.fix


def test_the_error_names_what_the_configuration_can_state_and_the_goal_that_would_fit(small):
    graph = kirsch.trace(small, INPUT)
    with pytest.raises(GoalError, match=r"cannot state a plan for the goal: parameters 10% is requested") as caught:
        kirsch.plan(graph, kirsch.Goal(parameters=0.1), loadable=True, kinds=["ffn unit"])
    assert "It can state ffn (ffn unit)." in caught.value.why
    fitting = float(re.search(r"parameters=(0\.\d+)", caught.value.fix).group(1))
    kirsch.plan(graph, kirsch.Goal(parameters=fitting), loadable=True, kinds=["ffn unit"])
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.1), loadable=False)
    assert plan.configuration == {}


@pytest.mark.parametrize("option", ["exclude", "keep_outputs"])
def test_widths_and_layers_that_an_option_keeps_are_not_cut(small, option):
    plan = kirsch.plan(
        kirsch.trace(small, INPUT), kirsch.Goal(parameters=0.7), loadable=True, **{option: ["layers.1.up"]}
    )
    assert "ffn" not in plan.configuration
    assert "layers.1" not in plan.without


def test_the_cuts_of_a_plan_have_the_least_importance_among_those_of_equal_cost(small):
    """The units of one layer are almost zero: a plan that may remove layers removes this one."""
    with torch.no_grad():
        for parameter in small.layers[1].parameters():
            parameter.mul_(1e-3)
    small.config.kinds = ["a"] * 3
    for layer in small.layers:
        layer.kind = "a"
    plan = kirsch.plan(kirsch.trace(small, INPUT), kirsch.Goal(parameters=0.68), loadable=True)
    assert plan.without == ("layers.1",)
    assert plan.configuration["depth"] == 2
    assert_configuration_builds(kirsch.prune(small, plan))


@pytest.mark.parametrize("types", ["abab", "aaaa", "abba", "aaba"])
@pytest.mark.parametrize("removable", [(0, 1, 2, 3), (0, 3), (1, 2)])
def test_the_removed_layers_are_the_cheapest_that_leave_the_types_of_the_first_layers(types, removable):
    costs = {f"l.{index}": cost for index, cost in enumerate((1.0, 5.0, 2.5, 3.25))}
    blocks = tuple(f"l.{index}" for index in removable)
    found = ConfiguredDepth("depth", 4, tuple(costs), blocks, tuple(types)).removals(costs.__getitem__, blocks)
    expected = []
    for count in range(len(blocks) + 1):
        sets = [
            removed
            for removed in itertools.combinations(blocks, count)
            if [t for path, t in zip(costs, types, strict=True) if path not in removed] == list(types[: 4 - count])
        ]
        expected += [min(sets, key=lambda removed: sum(costs[path] for path in removed))] if sets else []
    assert found == expected


@pytest.mark.parametrize(
    ("name", "numbers"), [("T5", ["num_decoder_layers"]), ("BART", ["encoder_layers", "decoder_layers"])]
)
def test_layers_are_removed_only_if_the_cache_of_generate_has_an_entry_for_each_layer_that_stays(name, numbers):
    """The cache of a T5 has an entry for each layer of the encoder, and `generate` would fail with a longer decoder."""
    model, inputs = RECIPES[name].build()
    assert [depth.path for depth in configured_depths(model, kirsch.trace(model, inputs))] == numbers


def test_loadable_is_refused_without_configuration():
    plain = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    with pytest.raises(UsageError, match=r"It has no configuration from which"):
        kirsch.plan(kirsch.trace(plain, INPUT), kirsch.Goal(parameters=0.7), loadable=True)


def test_a_configuration_that_states_no_cut_is_refused_if_asked_and_else_not_used():
    graph = kirsch.trace(Tied(Config()).eval(), INPUT)
    with pytest.raises(GoalError, match="It can state no cut"):
        kirsch.plan(graph, kirsch.Goal(parameters=0.7), loadable=True)
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.7))
    assert plan.groups
    assert not plan.configuration


def test_a_loadable_plan_is_stored_and_read(small):
    plan = kirsch.plan(kirsch.trace(small, INPUT), kirsch.Goal(parameters=0.4), round_to=1, loadable=True)
    again = kirsch.Plan.from_json(plan.to_json())
    assert (again.configuration, again.method["loadable"]) == (plan.configuration, True)
    assert "loadable" in str(plan)
    pruned = prune_with_verification(small, again)
    assert pruned.plan.configuration == json.loads(plan.to_json())["configuration"]


def test_tensors_that_from_pretrained_computes_are_not_those_of_the_pruned_model(tmp_path):
    """Marian computes the sines of its positions when it is built; they depend on the hidden size."""
    model, inputs = RECIPES["Marian"].build()
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(parameters=0.5), loadable=True)
    assert "d_model" not in plan.configuration
    found = kirsch.prune(model, plan)
    found.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**inputs)[0], found(**inputs)[0])
