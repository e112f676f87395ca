"""Pruned transformers models are saved with their configuration and loaded without Kirsch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import kirsch
from kirsch.pruning.prune import prune_with_verification
from pruning_notes import assert_one_note, config_notes
from trace_and_cut import with_noise

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48, "intermediate_size": 96}
TEXT = {**SMALL, "vocab_size": 80, "max_position_embeddings": 32, "pad_token_id": 0}
SHARED = {**TEXT, "num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 80, "use_cache": False}
DISTIL = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 80, "max_position_embeddings": 32}
GPT = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 80, "n_positions": 32, "use_cache": False}
LIKE_LLAMA = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}
KEEP_HEAD_DIM = {"head dim": 0}
FFN = ["ffn unit"]

CASES = {
    # name → model class, class and numbers of the configuration, kinds, excluded layers, goal of MACs, changed numbers
    "llama": ("LlamaForCausalLM", "LlamaConfig", SHARED, KEEP_HEAD_DIM, (), 0.5, LIKE_LLAMA),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        SHARED,
        KEEP_HEAD_DIM,
        (),
        0.5,
        {"hidden_size", "intermediate_size", "head_dim", "num_attention_heads"},
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

WITHOUT_KIRSCH = """
import json, sys

import torch

torch.set_num_threads(1)
sys.modules["torchvision"] = None  # a torchvision for another version of torch cannot be imported
import transformers

found = {}
for folder, name in json.loads(sys.argv[1]).items():
    model = getattr(transformers, name).from_pretrained(folder).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        # The alignment of a tensor in memory decides which kernel runs, and kernels differ in the last bit of a result.
        tensor.data = tensor.data.clone()
    inputs = torch.load(f"{folder}/inputs.pt")
    with torch.no_grad():
        found[folder] = torch.equal(model(**inputs)[0], torch.load(f"{folder}/outputs.pt"))
found["kirsch"] = "kirsch" in sys.modules
print(json.dumps(found))
"""


def build(transformers, name, **more):
    kind, config, options, *_ = CASES[name]
    torch.manual_seed(0)
    model = with_noise(getattr(transformers, kind)(getattr(transformers, config)(**{**options, **more}))).eval()
    tokens = torch.randint(3, 80, (2, 7))
    return model, {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]} if name == "t5" else {"input_ids": tokens}


def pruned(transformers, name):
    *_, kinds, excluded, fraction, _ = CASES[name]
    model, inputs = build(transformers, name)
    goal = kirsch.Goal(macs=fraction)
    plan = kirsch.plan(kirsch.trace(model, inputs), goal, uniform=True, loadable=False, kinds=kinds, exclude=excluded)
    return prune_with_verification(model, plan), inputs


@pytest.fixture(scope="module")
def round_trip(transformers, tmp_path_factory):
    """Save each pruned model, and load it in a process without Kirsch.

    Returns name → (pruned, folder), and folder → whether the outputs are bit-identical.
    """
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
        [sys.executable, "-c", WITHOUT_KIRSCH, json.dumps(folders)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_transformers_model_is_loaded_without_kirsch(name, round_trip):
    models, same = round_trip
    found, folder = models[name]
    assert set(found.plan.configuration) == CASES[name][-1]
    assert config_notes(found)[0].endswith("save_pretrained saves it.")
    assert same[folder]
    assert not same["kirsch"]


def test_the_note_lists_old_and_new_numbers(round_trip):
    found, _ = round_trip[0]["bert"]
    number = found.model.bert.encoder.layer[0].intermediate.dense.out_features
    assert config_notes(found) == [f"config: intermediate_size 96 -> {number}; save_pretrained saves it."]


def test_a_language_model_with_dropped_layers_is_loaded_and_generates_text(transformers, tmp_path):
    model, inputs = build(transformers, "llama", num_hidden_layers=4)
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.7), kinds="block", data=inputs)
    found = prune_with_verification(model, plan).model
    assert found.config.num_hidden_layers == len(found.model.layers) < 4
    assert [layer.self_attn.layer_idx for layer in found.model.layers] == list(range(len(found.model.layers)))
    found.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**inputs)[0], found(**inputs)[0])
    cached = found.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, use_cache=True)
    uncached = found.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


def test_narrower_heads_keep_their_scale_and_the_configuration_is_unchanged(transformers, tmp_path):
    model, inputs = build(transformers, "llama", num_hidden_layers=1)
    plan = kirsch.plan(
        kirsch.trace(model, inputs), kirsch.Goal(macs=0.9), uniform=True, loadable=False, kinds=["head dim"], round_to=1
    )
    found = prune_with_verification(model, plan)
    assert found.verification.passed
    assert found.model.config.to_dict() == model.config.to_dict()
    attention = found.model.model.layers[0].self_attn
    assert attention.scaling == attention.head_dim**-0.5 > model.model.layers[0].self_attn.scaling
    assert_one_note(config_notes(found), r"the buffer \S*inv_freq would have other values\. Save it with kirsch\.save")
    kirsch.save(found.model, tmp_path / "small")
    again = kirsch.load(tmp_path / "small", lambda: build(transformers, "llama", num_hidden_layers=1)[0])
    assert torch.equal(again(**inputs)[0], found.model(**inputs)[0])


def test_the_note_names_the_axis_whose_size_no_number_of_the_configuration_gives(transformers):
    model, inputs = build(transformers, "distilbert")
    plan = kirsch.plan(kirsch.trace(model, inputs), kirsch.Goal(macs=0.8), uniform=True, loadable=False, kinds=["head"])
    why = r"no number gives axis 0 of distilbert\.\S+ the size \d+\. Save it with kirsch\.save, or plan with kinds"
    assert_one_note(config_notes(prune_with_verification(model, plan)), why)
