"""A pruned model whose checkpoint `from_pretrained` could not load refuses to write one."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import UsageError
from kirsch.frameworks.pytorch.io.vision import import_beside
from proving import shaken

pytest.importorskip("transformers", exc_type=ImportError)
import_beside("torchvision")
transformers = import_beside("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

WORDS = torch.randint(3, 80, (2, 7), generator=torch.Generator().manual_seed(0))
REFUSED = r"would write a checkpoint that from_pretrained cannot load\. .*kirsch\.save"


class Mixed(nn.Module, huggingface_hub.PyTorchModelHubMixin):
    """Keeps the arguments of its constructor as its configuration, as PyTorchModelHubMixin does."""

    def __init__(self, width=24):
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.first(x).relu())


class Wrapper(nn.Module):
    """A model of nobody's library with one of transformers in it, and layers of its own."""

    def __init__(self):
        super().__init__()
        self.bert = bert("BertModel")
        self.head = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, words):
        return self.head(self.bert(words).last_hidden_state[:, 0])


def bert(kind="BertForSequenceClassification", layers=1):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=80, hidden_size=24, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    return shaken(getattr(transformers, kind)(config)).eval()


def t5():
    config = {"d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 80}
    return shaken(transformers.T5ForConditionalGeneration(transformers.T5Config(**config, use_cache=False))).eval()


def vit():
    torch.manual_seed(0)
    config = {**SIZES, "image_size": 16, "patch_size": 8, "num_labels": 3}
    model = shaken(transformers.ViTForImageClassification(transformers.ViTConfig(**config))).eval()
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


def made(kind, config, **settings):
    """A model of words, and its inputs."""
    torch.manual_seed(0)
    config = getattr(transformers, config)(vocab_size=80, bos_token_id=1, eos_token_id=2, **settings)
    return shaken(getattr(transformers, kind)(config)).eval(), {"input_ids": WORDS}


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48, "intermediate_size": 96}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False}
DISTIL = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 32}
MODELS = {
    "bert": lambda: made("BertForSequenceClassification", "BertConfig", **SIZES),
    "gpt2": lambda: made("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "vit": vit,
    "llama": lambda: made("LlamaForCausalLM", "LlamaConfig", **SIZES, num_key_value_heads=2, use_cache=False),
    "distilbert": lambda: made("DistilBertForSequenceClassification", "DistilBertConfig", **DISTIL),
    "t5": lambda: (t5(), {"input_ids": WORDS, "decoder_input_ids": WORDS}),
}


def pruned(model, inputs=WORDS, *, scope="", params=0.6, **options):
    """The pruned model, and the warnings of `kirsch.prune`."""
    plan = kirsch.plan(kirsch.trace(model, inputs, scope=scope), kirsch.Goal(params=params), round_to=1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return kirsch.prune(model, plan), [str(warning.message) for warning in caught]


@pytest.fixture(scope="module")
def small():
    model, said = pruned(bert())
    (text,) = said
    assert "No configuration describes the pruned BertForSequenceClassification." in text
    assert 'kirsch.save, or plan with granularity=["ffn unit"], uniform=True.' in text
    assert "save_pretrained and push_to_hub raise an error" in text
    return model


def assert_refused(model, folder):
    for method in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(UsageError, match=REFUSED):
            method(folder / "checkpoint")
    assert not (folder / "checkpoint").exists()


def test_pruning_warns_and_saving_is_refused_with_the_remedy(small, tmp_path):
    assert_refused(small, tmp_path)
    with pytest.raises(
        UsageError, match=r'Save it with kirsch\.save, or plan with granularity=\["ffn unit"\], uniform=True\.'
    ):
        small.save_pretrained(tmp_path)
    assert_refused(small.bert, tmp_path)  # a part that was cut with it


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("bert", ["ffn unit"]),
        ("gpt2", ["ffn unit"]),
        ("vit", ["ffn unit", "head"]),
        ("llama", ["ffn unit", "head in kv group", "kv group"]),
        ("distilbert", ["ffn unit"]),
        ("t5", ["ffn unit", "head"]),
    ],
)
def test_a_model_that_is_planned_as_the_error_says_can_be_saved_and_loaded(kind, kinds, tmp_path):
    model, inputs = MODELS[kind]()
    named = rf"plan with granularity={re.escape(json.dumps(kinds))}, uniform=True\."
    once, _ = pruned(model, inputs, params=0.9)
    with pytest.raises(UsageError, match=named):
        once.save_pretrained(tmp_path)
    small, said = pruned(model, inputs, params=0.85, granularity=kinds, uniform=True)
    assert not said
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs)[0], small(**inputs)[0])


def test_the_error_names_no_plan_where_no_number_of_the_configuration_counts_units(tmp_path):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], num_labels=3)
    model = shaken(transformers.ResNetForImageClassification(config)).eval()
    small, _ = pruned(model, torch.randn(2, 3, 32, 32), params=0.7)
    with pytest.raises(UsageError, match=r"Save it with kirsch\.save\.$"):
        small.save_pretrained(tmp_path)


def test_copies_conversions_and_pickles_are_refused_too(small, tmp_path):
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(small), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(small))]
    for found in [*copies, copy.deepcopy(small).half(), nn.DataParallel(small).module, torch.compile(small)]:
        assert_refused(found, tmp_path)


@pytest.mark.filterwarnings("ignore:The teacher is not measurably better than chance:UserWarning")
def test_what_kirsch_saves_and_trains_is_refused_too(small, tmp_path):
    kirsch.save(small, tmp_path / "small")
    again = kirsch.load(tmp_path / "small", bert)  # warns of nothing
    assert torch.equal(again.eval()(WORDS).logits, small(WORDS).logits)
    assert_refused(again, tmp_path)
    training = kirsch.Training(epochs=1, learning_rate=0.01)
    data = [(WORDS, torch.tensor([0, 1]))]
    assert_refused(kirsch.distill(small, bert(), data, training=training).model, tmp_path)


def test_the_state_and_the_traced_program_are_those_of_any_model(small):
    assert not [name for name in small.state_dict() if "pretrained" in name]
    program = torch.export.export(small, (WORDS,), strict=False)
    torch.testing.assert_close(program.module()(WORDS).logits, small(WORDS).logits)


def test_a_trainer_of_transformers_does_not_write_it(small, tmp_path):
    args = transformers.TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    with pytest.raises(UsageError, match=REFUSED):
        transformers.Trainer(small, args).save_model(tmp_path / "checkpoint")


def test_a_second_cut_that_a_configuration_describes_allows_saving_again(tmp_path):
    kinds = {"granularity": ["ffn unit"], "exclude": ["bert.pooler"]}
    once, said = pruned(bert(layers=2), params=0.9, **kinds)
    widths = [layer.intermediate.dense.out_features for layer in once.bert.encoder.layer]
    assert len(set(widths)) == 2
    assert said
    assert_refused(once, tmp_path)
    plan = kirsch.plan(kirsch.trace(once, WORDS), kirsch.Goal(params=0.9), round_to=1, **kinds)
    content = json.loads(plan.to_json())
    content["groups"] = [
        {
            "name": group.name,
            "kind": group.kind,
            "size": group.size,
            "removed": list(range(group.size - 20)),
            "reason": "",
        }
        for group in plan.graph.groups
        if group.kind == "ffn unit" and "encoder" in group.name
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twice = kirsch.prune(once, kirsch.Plan.from_json(json.dumps(content)))
    assert_refused(once, tmp_path)
    kirsch.save(twice, tmp_path / "kirsch")
    for model in (twice, kirsch.load(tmp_path / "kirsch", lambda: bert(layers=2)).eval()):
        model.save_pretrained(tmp_path / "checkpoint")
        again = type(model).from_pretrained(tmp_path / "checkpoint").eval()
        assert torch.equal(again(WORDS).logits, twice(WORDS).logits)
        model.bert.save_pretrained(tmp_path / "part")


def test_a_part_that_is_pruned_alone_makes_whole_and_part_refuse(tmp_path):
    model, said = pruned(bert(), scope="bert.encoder")
    assert "a part was pruned alone: 'bert.encoder'" in said[0]
    assert_refused(model, tmp_path)
    assert_refused(model.bert, tmp_path)


def test_only_the_part_that_was_cut_refuses(tmp_path):
    model, said = pruned(t5(), {"input_ids": WORDS, "decoder_input_ids": WORDS}, scope="encoder")
    assert said
    assert_refused(model, tmp_path)
    assert_refused(model.encoder, tmp_path)
    model.decoder.save_pretrained(tmp_path / "decoder")
    assert (tmp_path / "decoder" / "config.json").is_file()


def test_a_checkpoint_within_a_model_of_nobodys_library_is_guarded(tmp_path):
    model, said = pruned(Wrapper())
    assert "No configuration describes the pruned 'bert', a BertModel." in said[0]
    assert_refused(model.bert, tmp_path)
    model, said = pruned(Wrapper(), params=0.99, exclude=["bert"])
    assert model.head[0].out_features < 32
    assert not said  # nothing of it was cut
    model.bert.save_pretrained(tmp_path / "bert")


def test_a_model_that_keeps_its_arguments_refuses(tmp_path):
    model, said = pruned(Mixed(), torch.randn(4, 5))
    assert "from_pretrained would build it in its original size" in said[0]
    assert_refused(model, tmp_path)


def test_a_model_without_save_pretrained_is_pruned_without_a_warning():
    model, said = pruned(nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 3)), torch.randn(4, 5))
    assert not said
    assert not hasattr(model, "save_pretrained")


def test_without_verification_a_checkpoint_is_refused(tmp_path):
    plan = kirsch.plan(kirsch.trace(model := bert(), WORDS), kirsch.Goal(params=0.6), round_to=1)
    with pytest.warns(UserWarning, match="No configuration describes the pruned Bert"):
        small = kirsch.prune(model, plan, verify=False)
    assert_refused(small, tmp_path)
