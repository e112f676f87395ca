"""The configuration of a pruned model is updated if a configuration describes the model."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import PlanError, UsageError
from kirsch.frameworks.pytorch.transformers import blueprint
from kirsch.frameworks.pytorch.transformers.blueprint import numbers, with_numbers
from kirsch.pruning.prune import prune_with_verification
from pruning_notes import assert_one_note, config_notes
from trace_and_cut import with_noise


class Config:
    """A configuration like those of transformers: attributes, conversion to a dict and back, validation."""

    def __init__(self, width=8, heads=1, ffn=None, ratio=2.0, sizes=(12, 16), inner=None, **rest):
        self.width, self.heads, self.ffn, self.ratio, self.sizes = width, heads, ffn, ratio, list(sizes)
        self.inner = Config(**inner) if isinstance(inner, dict) else inner
        self.depth = rest.get("depth", 2)
        if width % heads:
            raise ValueError(f"{width} is not a multiple of {heads}")

    def to_dict(self):
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**public, "inner": self.inner and self.inner.to_dict()}

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Configurable(nn.Module):
    """A model with widths from a default (None), a ratio, a list and a sub-configuration."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first = nn.Linear(5, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.ffn or 4 * config.width) for _ in range(config.depth))
        self.wide = Block(config.width, int(config.ratio * config.width))
        self.listed = nn.ModuleList(Block(config.width, size) for size in config.sizes)
        self.inner = Block(config.width, config.inner.width) if config.inner else nn.Identity()
        self.head = nn.Linear(config.width, 3)
        self.scale = config.width**-0.5
        self.register_buffer("third", torch.full((1,), 1 / 3), persistent=False)  # rounded in half precision

    def forward(self, x):
        x = self.first(x)
        for block in [*self.blocks, self.wide, *self.listed, self.inner]:
            x = block(x)
        return self.head(x * self.scale if self.scaled else x) * self.third

    scaled = False

    def save_pretrained(self, folder):
        raise NotImplementedError


class Scaled(Configurable):
    """A model whose `forward` multiplies by a factor that the constructor computes from the width."""

    scaled = True


class Reading(Configurable):
    """A model whose `forward` reads the configuration."""

    def forward(self, x):
        return super().forward(x) * self.config.width**0.5


INPUT = torch.randn(4, 5)


def configurable(kind=Configurable, **options):
    return with_noise(kind(Config(inner={"width": 20}, **options))).eval()


def halved(model, kinds=("ffn unit",), **options):
    graph = kirsch.trace(model, INPUT.to(model.first.weight))
    options = {"uniform": True, "round_to": 1, "loadable": False, **options}
    return prune_with_verification(model, kirsch.plan(graph, kirsch.Goal(parameters=0.6), kinds=kinds, **options))


def assert_configuration_builds(model):
    """Check that a model built from the configuration loads the weights and returns the same outputs."""
    built = type(model)(with_numbers(model.config, {})).eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(INPUT), model(INPUT))


def test_numbers_of_a_configuration_are_found_in_lists_and_sub_configurations():
    found = numbers(Config(inner={"width": 20, "heads": 1}))
    assert found["width"] == 8
    assert found["ffn"] is None
    assert found["sizes.1"] == 16
    assert found["inner.width"] == 20
    assert "inner.heads" not in found  # 1 cannot be a size that is cut


def test_private_attributes_of_a_configuration_are_kept():
    config = Config(inner={"width": 20})
    config.inner._attention = "eager"
    other = with_numbers(config, {"inner.width": 12, "sizes.0": 6})
    assert (other.inner.width, other.sizes, other.inner._attention) == (12, [6, 16], "eager")
    assert (config.inner.width, config.sizes) == (20, [12, 16])


def test_all_changed_numbers_are_set_and_build_the_pruned_model():
    model = configurable()
    found = halved(model)
    changes = found.plan.configuration
    assert set(changes) == {"ffn", "ratio", "sizes.0", "sizes.1", "inner.width"}
    assert found.model.config.ffn == found.model.blocks[0].up.out_features < 32
    assert found.model.config.inner.width == changes["inner.width"] == found.model.inner.up.out_features
    assert_configuration_builds(found.model)
    assert f"ffn None -> {changes['ffn']}" in config_notes(found)[0]
    assert model.config.ffn is None  # the original is not changed


def test_the_embedding_width_is_set():
    found = halved(configurable(), kinds=["embedding dim", "ffn unit"])
    assert found.plan.configuration["width"] == found.model.first.out_features < 8
    assert_configuration_builds(found.model)


def test_the_configuration_of_a_bfloat16_model_is_updated():
    found = halved(configurable().bfloat16())
    assert "ffn" in found.plan.configuration
    assert found.model.third.dtype == torch.bfloat16


@pytest.mark.parametrize("depth", [2, 3])
def test_the_number_of_layers_is_updated_after_blocks_are_dropped(depth):
    model = configurable(depth=4)
    graph = kirsch.trace(model, INPUT)
    plan = kirsch.plan(
        graph, kirsch.Goal(parameters=0.9 if depth == 3 else 0.7), kinds="block", data=INPUT, exclude=["listed", "wide"]
    )
    found = prune_with_verification(model, plan)
    assert found.plan.configuration == {"depth": depth} == {"depth": len(found.model.blocks)}
    assert config_notes(found) == [f"config: depth 4 -> {depth}; save_pretrained saves it."]
    assert_configuration_builds(found.model)


def test_the_configuration_is_unchanged_if_no_number_counts_the_dropped_blocks():
    model = configurable()
    plan = kirsch.plan(
        kirsch.trace(model, INPUT),
        kirsch.Goal(parameters=0.95),
        kinds="block",
        data=INPUT,
        exclude=["blocks", "listed", "inner"],
    )
    assert plan.without == ("wide",)
    notes = config_notes(prune_with_verification(model, plan))
    assert_one_note(notes, "No configuration describes .* other parameter names")


def test_the_configuration_is_unchanged_if_layers_have_different_sizes():
    model = configurable()
    plan = kirsch.plan(
        kirsch.trace(model, INPUT), kirsch.Goal(parameters=0.7), kinds=["ffn unit"], round_to=1, loadable=False
    )
    counts = {len(removal.removed) for removal in plan.groups if removal.name.startswith("blocks")}
    assert len(counts) == 2
    found = prune_with_verification(model, plan)
    assert found.model.config.to_dict() == model.config.to_dict()
    assert found.plan.configuration == {}
    (note,) = config_notes(found)
    assert note.startswith(
        "No configuration describes the pruned Configurable. Layers of one kind have different sizes"
    )
    assert 'Save it with kirsch.save, or plan with kinds=["ffn unit"], uniform=True.' in note


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Scaled, r"the shapes agree and the outputs differ: scale is 0\.3536 and would be 0\.\d+\. Save it"),
        (Reading, r"the outputs differ: the forward of the pruned model reads its configuration\. Save"),
    ],
)
def test_the_configuration_is_unchanged_if_the_built_model_has_other_outputs(kind, why):
    model = configurable(kind)
    found = halved(model, kinds=["embedding dim"])
    assert found.model.first.out_features < 8
    assert found.model.config.to_dict() == model.config.to_dict()
    assert_one_note(config_notes(found), why)


def stated_notes(found):
    return [note for note in found.notes if "states the configuration" in note]


def test_the_note_names_the_exception_for_numbers_that_the_configuration_rejects():
    found = halved(configurable(heads=8), kinds=["embedding dim"])
    assert found.model.first.out_features < 8
    assert_one_note(
        config_notes(found),
        r"cannot be built with the numbers that give its sizes: ValueError: \d is not a multiple of 8\.",
    )


def test_the_search_for_a_configuration_stops_at_the_limit_of_built_models(monkeypatch):
    monkeypatch.setattr(blueprint, "MOST_BUILDS", 12)
    model = configurable()
    found = halved(model)
    assert_one_note(config_notes(found), r"None was found in 12 trials\.")
    assert found.model.config.to_dict() == model.config.to_dict()


def test_the_note_says_if_the_configuration_does_not_build_the_original():
    model = configurable()
    model.inner = nn.Identity()
    assert_one_note(config_notes(halved(model)), r"Its configuration builds a model with other parameter names\.")


def test_the_configuration_is_unchanged_without_verification():
    model = configurable()
    plan = kirsch.plan(
        kirsch.trace(model, INPUT), kirsch.Goal(parameters=0.6), uniform=True, kinds=["ffn unit"], loadable=False
    )
    found = prune_with_verification(model, plan, verify=False)
    assert found.model.config.to_dict() == model.config.to_dict()
    assert "because the pruned model was not verified" in config_notes(found)[0]


def test_save_pretrained_of_a_loaded_model_raises_the_same_error_as_before_it_was_saved(tmp_path):
    model = configurable()
    found = halved(model, uniform=False)
    assert found.verification is not None
    kirsch.save(found.model, tmp_path / "small")
    loaded = kirsch.load(tmp_path / "small", lambda: copy.deepcopy(model))
    errors = []
    for pruned in (found.model, loaded):
        with pytest.raises(UsageError, match="No configuration describes the pruned") as caught:
            pruned.save_pretrained(tmp_path / "never")
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_the_configuration_is_unchanged_after_pruning_with_the_option_module():
    model = configurable()
    graph = kirsch.trace(model, INPUT, module="wide")
    found = prune_with_verification(model, kirsch.plan(graph, kirsch.Goal(parameters=0.6)))
    assert "only a part was pruned" in config_notes(found)[0]
    assert found.model.config.to_dict() == model.config.to_dict()


def test_a_model_without_a_configuration_has_no_note():
    model = with_noise(nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 3)))
    found = prune_with_verification(model, kirsch.plan(kirsch.trace(model, INPUT), kirsch.Goal(parameters=0.5)))
    assert config_notes(found) == []
    model.config = {"width": 32}  # a dict has no to_dict
    found = prune_with_verification(model, kirsch.plan(kirsch.trace(model, INPUT), kirsch.Goal(parameters=0.5)))
    assert config_notes(found) == []


def test_a_model_that_is_pruned_twice_and_loaded_has_the_updated_configuration(tmp_path):
    once = halved(configurable()).model
    twice = halved(once).model
    assert twice.config.ffn < once.config.ffn
    assert_configuration_builds(twice)
    kirsch.save(twice, tmp_path / "twice")
    again = kirsch.load(tmp_path / "twice", configurable)
    assert again.config.to_dict() == twice.config.to_dict()
    assert torch.equal(again(INPUT), twice(INPUT))


@pytest.mark.parametrize(
    ("numbers_", "sentence"),
    [
        (
            {"n_embd": 12},
            "states a number for configuration.n_embd. The configuration of the Configurable has no such number",
        ),
        ({"widht": 6}, "Did you mean 'width'?"),
        (
            {"depth": 10**9},
            "states 1e+09 for configuration.depth. This is more than 4 times the largest size of the Configurable",
        ),
    ],
)
def test_a_plan_with_numbers_that_the_configuration_lacks_raises_an_error(numbers_, sentence):
    model = configurable()
    content = json.loads(halved(model).plan.to_json()) | {"configuration": numbers_}
    for verify in (True, False):
        with pytest.raises(PlanError, match=re.escape(sentence)):
            kirsch.prune(model, kirsch.Plan.from_json(json.dumps(content)), verify=verify)


def test_the_configuration_is_unchanged_if_the_numbers_of_the_plan_do_not_fit():
    model = configurable()
    plan = halved(model).plan
    content = json.loads(plan.to_json())
    content["configuration"]["ffn"] += 1
    found = prune_with_verification(copy.deepcopy(model), kirsch.Plan.from_json(json.dumps(content)), verify=False)
    assert found.model.config.ffn is None
    assert found.plan.configuration == {}
    assert_one_note(stated_notes(found), r"states the configuration ffn=\d+, .*\. This configuration does not describe")


@pytest.mark.parametrize("numbers_", [{"width": 5}, {"ffn": 20}])
def test_a_wrong_configuration_in_a_plan_is_noted_and_computed_again(numbers_):
    model = configurable()
    plan = halved(model).plan
    content = json.loads(plan.to_json()) | {"configuration": numbers_}
    found = prune_with_verification(model, kirsch.Plan.from_json(json.dumps(content)))
    assert found.plan.configuration == plan.configuration
    ((name, number),) = numbers_.items()
    assert_one_note(
        stated_notes(found), rf"states the configuration {name}={number}\. .* has ffn={plan.configuration['ffn']}, "
    )


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("stated", [True, False])
def test_a_correct_or_missing_configuration_in_a_plan_has_no_note(verify, stated):
    model = configurable()
    content = json.loads(halved(model).plan.to_json())
    content["configuration"] = content["configuration"] if stated else {}
    found = prune_with_verification(model, kirsch.Plan.from_json(json.dumps(content)), verify=verify)
    assert stated_notes(found) == []
