"""A model that carries a configuration is told what it has become, where one number a kind of layer says it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import PlanError, UsageError
from kirsch.frameworks.pytorch.io.vision import import_beside
from kirsch.frameworks.pytorch.transformers import blueprint
from kirsch.frameworks.pytorch.transformers.blueprint import changed, numbers
from kirsch.pruning.prune import prune_with_verification
from proving import shaken

# ---------------------------------------------------------------------------------------- a model of nobody's library


class Config:
    """As the configurations of transformers: attributes, to a dict and back, checked when it is made."""

    def __init__(self, width=8, heads=1, ffn=None, ratio=2.0, sizes=(12, 16), inner=None, **rest):
        self.width, self.heads, self.ffn, self.ratio, self.sizes = width, heads, ffn, ratio, list(sizes)
        self.inner = Config(**inner) if isinstance(inner, dict) else inner
        self.depth = rest.get("depth", 2)
        if width % heads:
            raise ValueError(f"{width} is no multiple of {heads}")

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


class Carrying(nn.Module):
    """Has a width that is None in its configuration, one that is a multiple, two in a list, and one further within."""

    factor = None

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
        self.register_buffer(
            "third", torch.full((1,), 1 / 3), persistent=False
        )  # its bits are others in half precision

    def forward(self, x):
        x = self.first(x)
        for block in [*self.blocks, self.wide, *self.listed, self.inner]:
            x = block(x)
        return self.head(x * self.scale if self.scaled else x) * self.third

    scaled = False

    def save_pretrained(self, folder):
        raise NotImplementedError


class Scaled(Carrying):
    """Its forward reads a number that the width gives it when it is made."""

    scaled = True


class Reading(Carrying):
    """Its forward reads the configuration."""

    def forward(self, x):
        return super().forward(x) * self.config.width**0.5


INPUT = torch.randn(4, 5)


def carrying(kind=Carrying, **options):
    return shaken(kind(Config(inner={"width": 20}, **options))).eval()


def halved(model, kinds=("ffn unit",), **options):
    graph = kirsch.trace(model, INPUT.to(model.first.weight))
    options = {"uniform": True, "round_to": 1, **options}
    return prune_with_verification(model, kirsch.plan(graph, kirsch.Goal(params=0.6), granularity=kinds, **options))


def config_notes(found):
    return [note for note in found.notes if "config" in note]


def assert_built_anew(model):
    """What the model's configuration builds has its parameters, and computes what it computes."""
    anew = type(model)(changed(model.config, {})).eval()
    anew.load_state_dict(model.state_dict())
    assert torch.equal(anew(INPUT), model(INPUT))


def test_the_numbers_of_a_configuration_are_found_where_they_stand():
    found = numbers(Config(inner={"width": 20, "heads": 1}))
    assert found["width"] == 8
    assert found["ffn"] is None
    assert found["sizes.1"] == 16
    assert found["inner.width"] == 20
    assert "inner.heads" not in found  # 1 is no size to cut


def test_what_is_private_goes_with_a_configuration_that_is_changed():
    config = Config(inner={"width": 20})
    config.inner._attention = "mine"
    other = changed(config, {"inner.width": 12, "sizes.0": 6})
    assert (other.inner.width, other.sizes, other.inner._attention) == (12, [6, 16], "mine")
    assert (config.inner.width, config.sizes) == (20, [12, 16])


def test_every_number_that_changed_is_written_and_builds_the_pruned_model():
    model = carrying()
    found = halved(model)
    said = found.plan.configuration
    assert set(said) == {"ffn", "ratio", "sizes.0", "sizes.1", "inner.width"}
    assert found.model.config.ffn == found.model.blocks[0].up.out_features < 32
    assert found.model.config.inner.width == said["inner.width"] == found.model.inner.up.out_features
    assert_built_anew(found.model)
    assert f"ffn None -> {said['ffn']}" in config_notes(found)[0]
    assert model.config.ffn is None  # the model given is left as it is


def test_a_width_of_the_whole_model_is_one_number():
    found = halved(carrying(), kinds=["embedding dim", "ffn unit"])
    assert found.plan.configuration["width"] == found.model.first.out_features < 8
    assert_built_anew(found.model)


def test_a_model_that_was_converted_to_another_type_is_described_as_well():
    found = halved(carrying().bfloat16())
    assert "ffn" in found.plan.configuration
    assert found.model.third.dtype == torch.bfloat16


@pytest.mark.parametrize("depth", [2, 3])
def test_blocks_that_are_left_out_are_counted(depth):
    model = carrying(depth=4)
    graph = kirsch.trace(model, INPUT)
    plan = kirsch.plan_depth(graph, kirsch.Goal(params=0.9 if depth == 3 else 0.7), INPUT, exclude=["listed", "wide"])
    found = prune_with_verification(model, plan)
    assert found.plan.configuration == {"depth": depth} == {"depth": len(found.model.blocks)}
    assert config_notes(found) == [f"config: depth 4 -> {depth}; save_pretrained holds it."]
    assert_built_anew(found.model)


def test_blocks_that_no_number_counts_leave_the_configuration_as_it_is():
    model = carrying()
    plan = kirsch.plan_depth(
        kirsch.trace(model, INPUT), kirsch.Goal(params=0.95), INPUT, exclude=["blocks", "listed", "inner"]
    )
    assert plan.without == ("wide",)
    assert_said(config_notes(prune_with_verification(model, plan)), "No configuration describes .* names differ")


def test_layers_that_differ_leave_the_configuration_as_it_is():
    model = carrying()
    plan = kirsch.plan(kirsch.trace(model, INPUT), kirsch.Goal(params=0.7), granularity=["ffn unit"], round_to=1)
    counts = {len(removal.removed) for removal in plan.groups if removal.name.startswith("blocks")}
    assert len(counts) == 2
    found = prune_with_verification(model, plan)
    assert found.model.config.to_dict() == model.config.to_dict()
    assert found.plan.configuration == {}
    (note,) = config_notes(found)
    assert note.startswith("No configuration describes the pruned Carrying. Layers differ")
    assert 'Save it with kirsch.save, or plan with granularity=["ffn unit"], uniform=True.' in note


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Scaled, r"it has these shapes and differs: scale is 0\.3536 and would be 0\.\d+\. Save it"),
        (Reading, r"it has these shapes and differs: the forward of the pruned model reads its configuration\. Save"),
    ],
)
def test_a_configuration_that_would_compute_something_else_is_not_taken(kind, why):
    model = carrying(kind)
    found = halved(model, kinds=["embedding dim"])
    assert found.model.first.out_features < 8
    assert found.model.config.to_dict() == model.config.to_dict()
    assert_said(config_notes(found), why)


def stated_notes(found):
    return [note for note in found.notes if "states the configuration" in note]


def assert_said(notes, pattern):
    (note,) = notes
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(note)


def test_numbers_that_the_configuration_refuses_are_named():
    found = halved(carrying(heads=8), kinds=["embedding dim"])
    assert found.model.first.out_features < 8
    assert_said(config_notes(found), r"The numbers that would are refused: ValueError: \d is no multiple of 8\.")


def test_the_search_ends(monkeypatch):
    monkeypatch.setattr(blueprint, "MOST_BUILDS", 12)
    model = carrying()
    found = halved(model)
    assert_said(config_notes(found), r"None was found in 12 trials\.")
    assert found.model.config.to_dict() == model.config.to_dict()


def test_a_model_that_its_configuration_does_not_build_is_said_to_be_such():
    model = carrying()
    model.inner = nn.Identity()
    assert_said(config_notes(halved(model)), r"Its own builds no such model: names differ\.")


def test_without_verification_nothing_is_said_to_fit():
    model = carrying()
    plan = kirsch.plan(kirsch.trace(model, INPUT), kirsch.Goal(params=0.6), uniform=True, granularity=["ffn unit"])
    found = prune_with_verification(model, plan, verify=False)
    assert found.model.config.to_dict() == model.config.to_dict()
    assert "without verification" in config_notes(found)[0]


def test_a_loaded_model_that_no_configuration_describes_has_the_text_of_prune(tmp_path):
    model = carrying()
    found = halved(model, uniform=False)
    assert found.verification is not None
    kirsch.save(found.model, tmp_path / "small")
    loaded = kirsch.load(tmp_path / "small", lambda: copy.deepcopy(model))
    errors = []
    for made in (found.model, loaded):
        with pytest.raises(UsageError, match="No configuration describes the pruned") as caught:
            made.save_pretrained(tmp_path / "never")
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_a_part_that_is_pruned_in_its_place_leaves_the_configuration_as_it_is():
    model = carrying()
    graph = kirsch.trace(model, INPUT, scope="wide")
    found = prune_with_verification(model, kirsch.plan(graph, kirsch.Goal(params=0.6)))
    assert "a part was pruned alone" in config_notes(found)[0]
    assert found.model.config.to_dict() == model.config.to_dict()


def test_a_model_without_a_configuration_has_no_note():
    model = shaken(nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 3)))
    found = prune_with_verification(model, kirsch.plan(kirsch.trace(model, INPUT), kirsch.Goal(params=0.5)))
    assert config_notes(found) == []
    model.config = {"width": 32}  # it has no way to a dict and back
    found = prune_with_verification(model, kirsch.plan(kirsch.trace(model, INPUT), kirsch.Goal(params=0.5)))
    assert config_notes(found) == []


def test_a_model_that_is_pruned_twice_and_loaded_has_its_configuration(tmp_path):
    once = halved(carrying()).model
    twice = halved(once).model
    assert twice.config.ffn < once.config.ffn
    assert_built_anew(twice)
    kirsch.save(twice, tmp_path / "twice")
    again = kirsch.load(tmp_path / "twice", carrying)
    assert again.config.to_dict() == twice.config.to_dict()
    assert torch.equal(again(INPUT), twice(INPUT))


@pytest.mark.parametrize(
    ("numbers_", "sentence"),
    [
        (
            {"n_embd": 12},
            "states a number for configuration.n_embd. The configuration of the Carrying has no such number",
        ),
        ({"widht": 6}, "Did you mean 'width'?"),
        ({"depth": 10**9}, "states 1e+09 for configuration.depth. No size of the Carrying comes near it"),
    ],
)
def test_a_configuration_that_is_none_of_the_model_is_refused_before_anything_is_built(numbers_, sentence):
    model = carrying()
    content = json.loads(halved(model).plan.to_json()) | {"configuration": numbers_}
    for verify in (True, False):
        with pytest.raises(PlanError, match=re.escape(sentence)):
            kirsch.prune(model, kirsch.Plan.from_json(json.dumps(content)), verify=verify)


def test_a_plan_that_states_numbers_of_another_model_changes_nothing():
    model = carrying()
    plan = halved(model).plan
    content = json.loads(plan.to_json())
    content["configuration"]["ffn"] += 1
    found = prune_with_verification(copy.deepcopy(model), kirsch.Plan.from_json(json.dumps(content)), verify=False)
    assert found.model.config.ffn is None
    assert found.plan.configuration == {}
    assert_said(stated_notes(found), r"states the configuration ffn=\d+, .*\. It does not describe the model")


@pytest.mark.parametrize("numbers_", [{"width": 5}, {"ffn": 20}])
def test_a_stated_configuration_that_the_cut_does_not_give_is_noted_and_computed_anew(numbers_):
    model = carrying()
    plan = halved(model).plan
    content = json.loads(plan.to_json()) | {"configuration": numbers_}
    found = prune_with_verification(model, kirsch.Plan.from_json(json.dumps(content)))
    assert found.plan.configuration == plan.configuration
    ((name, number),) = numbers_.items()
    assert_said(
        stated_notes(found), rf"states the configuration {name}={number}\. .* has ffn={plan.configuration['ffn']}, "
    )


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("stated", [True, False])
def test_the_configuration_that_the_cut_gives_has_no_note_on_what_the_plan_states(verify, stated):
    model = carrying()
    content = json.loads(halved(model).plan.to_json())
    content["configuration"] = content["configuration"] if stated else {}
    found = prune_with_verification(model, kirsch.Plan.from_json(json.dumps(content)), verify=verify)
    assert stated_notes(found) == []


# ------------------------------------------------------------------------------------------------------ transformers

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48, "intermediate_size": 96}
TEXT = {**SMALL, "vocab_size": 80, "max_position_embeddings": 32, "pad_token_id": 0}
SHARED = {**TEXT, "num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 80, "use_cache": False}
DISTIL = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 80, "max_position_embeddings": 32}
GPT = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 80, "n_positions": 32, "use_cache": False}
LIKE_LLAMA = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}
HEADS_STAY_WIDE = {"head dim": 0}
FFN = ["ffn unit"]

CASES = {
    # name: class, class of its configuration, numbers in it, what may go, excluded, fraction of MACs, what changes
    "llama": ("LlamaForCausalLM", "LlamaConfig", SHARED, HEADS_STAY_WIDE, (), 0.5, LIKE_LLAMA),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        SHARED,
        HEADS_STAY_WIDE,
        (),
        0.5,
        {"hidden_size", "intermediate_size", "head_dim"},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, FFN, (), 0.8, {"n_inner"}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        {"embedding dim": 0},
        (),
        0.6,
        {"d_ff", "d_kv", "num_heads"},
    ),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        TEXT,
        FFN,
        ("bert.pooler",),
        0.8,
        {"intermediate_size"},
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        DISTIL,
        FFN,
        ("pre_classifier",),
        0.8,
        {"hidden_dim"},
    ),
}

ELSEWHERE = """
import json, sys

import torch

torch.set_num_threads(1)
sys.modules["torchvision"] = None  # one that was built for another torch cannot be imported
import transformers

found = {}
for folder, name in json.loads(sys.argv[1]).items():
    model = getattr(transformers, name).from_pretrained(folder).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # where it lies in memory decides which kernel runs, and so the last bit
    inputs = torch.load(f"{folder}/inputs.pt")
    with torch.no_grad():
        found[folder] = torch.equal(model(**inputs)[0], torch.load(f"{folder}/outputs.pt"))
found["kirsch"] = "kirsch" in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("transformers", exc_type=ImportError)
    import_beside("torchvision")
    return import_beside("transformers")


def made(transformers, name, **more):
    kind, config, options, *_ = CASES[name]
    torch.manual_seed(0)
    model = shaken(getattr(transformers, kind)(getattr(transformers, config)(**{**options, **more}))).eval()
    words = torch.randint(3, 80, (2, 7))
    return model, {"input_ids": words, "decoder_input_ids": words[:, :5]} if name == "t5" else {"input_ids": words}


def pruned(transformers, name):
    *_, kinds, excluded, fraction, _ = CASES[name]
    model, inputs = made(transformers, name)
    goal = kirsch.Goal(macs=fraction)
    plan = kirsch.plan(kirsch.trace(model, inputs), goal, uniform=True, granularity=kinds, exclude=excluded)
    return prune_with_verification(model, plan), inputs


@pytest.fixture(scope="module")
def round_trip(transformers, tmp_path_factory):
    """Name → what was pruned, and whether another process got the same bits from its folder; whether it had Kirsch."""
    out, folders = {}, {}
    for name in CASES:
        found, inputs = pruned(transformers, name)
        folder = tmp_path_factory.mktemp(name)
        found.model.save_pretrained(folder)
        torch.save(inputs, folder / "inputs.pt")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.no_grad():
            torch.save(found.model(**inputs)[0], folder / "outputs.pt")
        torch.set_num_threads(threads)
        out[name], folders[str(folder)] = (found, str(folder)), CASES[name][0]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(folders)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_model_of_transformers_is_loaded_without_kirsch(name, round_trip):
    models, same = round_trip
    found, folder = models[name]
    assert set(found.plan.configuration) == CASES[name][-1]
    assert config_notes(found)[0].endswith("save_pretrained holds it.")
    assert same[folder]
    assert not same["kirsch"]


def test_the_note_says_what_changed(round_trip):
    found, _ = round_trip[0]["bert"]
    number = found.model.bert.encoder.layer[0].intermediate.dense.out_features
    assert config_notes(found) == [f"config: intermediate_size 96 -> {number}; save_pretrained holds it."]


def test_a_language_model_with_fewer_layers_says_so(transformers, tmp_path):
    model, inputs = made(transformers, "llama", num_hidden_layers=4)
    plan = kirsch.plan_depth(kirsch.trace(model, inputs), kirsch.Goal(macs=0.7), inputs)
    found = prune_with_verification(model, plan).model
    assert found.config.num_hidden_layers == len(found.model.layers) < 4
    assert [layer.self_attn.layer_idx for layer in found.model.layers] == list(range(len(found.model.layers)))
    found.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**inputs)[0], found(**inputs)[0])
    words = found.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, use_cache=True)
    plain = found.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(words, plain)


def test_heads_of_which_a_part_goes_keep_their_scale_and_the_configuration_stays(transformers, tmp_path):
    model, inputs = made(transformers, "llama", num_hidden_layers=1)
    plan = kirsch.plan(
        kirsch.trace(model, inputs), kirsch.Goal(macs=0.9), uniform=True, granularity=["head dim"], round_to=1
    )
    found = prune_with_verification(model, plan)
    assert found.verification.passed
    assert found.model.config.to_dict() == model.config.to_dict()
    assert_said(config_notes(found), r"self_attn\.scaling is 0\.2887 and would be 0\.\d+\. Save it with kirsch\.save")
    kirsch.save(found.model, tmp_path / "small")
    again = kirsch.load(tmp_path / "small", lambda: made(transformers, "llama", num_hidden_layers=1)[0])
    assert torch.equal(again(**inputs)[0], found.model(**inputs)[0])


def test_widths_that_no_number_holds_are_named(transformers):
    model, inputs = made(transformers, "distilbert")
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.8), uniform=True, granularity=["head"])
    why = r"no number gives axis 0 of distilbert\.\S+ its \d+\. Save it with kirsch\.save, or plan with granul"
    assert_said(config_notes(prune_with_verification(model, plan)), why)
