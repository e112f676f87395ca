"""`save_pretrained` of a pruned model raises an error if `from_pretrained` could not load the checkpoint."""

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
from trace_and_cut import with_noise

pytest.importorskip("transformers", exc_type=ImportError)
import_beside("torchvision")
transformers = import_beside("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

TOKENS = torch.randint(3, 80, (2, 7), generator=torch.Generator().manual_seed(0))
ERROR = r"would write a checkpoint that from_pretrained cannot load\. .*kirsch\.save"


class Mixed(nn.Module, huggingface_hub.PyTorchModelHubMixin):
    """A model with PyTorchModelHubMixin, which uses the arguments of the constructor as the configuration."""

    def __init__(self, width=24):
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.first(x).relu())


class Wrapper(nn.Module):
    """A user's model with a transformers model and a head."""

    def __init__(self):
        super().__init__()
        self.bert = bert("BertModel")
        self.head = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, tokens):
        return self.head(self.bert(tokens).last_hidden_state[:, 0])


def bert(kind="BertForSequenceClassification", layers=1):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=80, hidden_size=24, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    return with_noise(getattr(transformers, kind)(config)).eval()


def t5():
    config = {"d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 80}
    return with_noise(transformers.T5ForConditionalGeneration(transformers.T5Config(**config, use_cache=False))).eval()


def vit():
    torch.manual_seed(0)
    config = {**SIZES, "image_size": 16, "patch_size": 8, "num_labels": 3}
    model = with_noise(transformers.ViTForImageClassification(transformers.ViTConfig(**config))).eval()
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


def language_model(kind, config, **settings):
    """Return a language model and its inputs."""
    torch.manual_seed(0)
    config = getattr(transformers, config)(vocab_size=80, bos_token_id=1, eos_token_id=2, **settings)
    return with_noise(getattr(transformers, kind)(config)).eval(), {"input_ids": TOKENS}


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48, "intermediate_size": 96}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False}
DISTIL = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 32}
MODELS = {
    "bert": lambda: language_model("BertForSequenceClassification", "BertConfig", **SIZES),
    "gpt2": lambda: language_model("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "vit": vit,
    "llama": lambda: language_model("LlamaForCausalLM", "LlamaConfig", **SIZES, num_key_value_heads=2, use_cache=False),
    "distilbert": lambda: language_model("DistilBertForSequenceClassification", "DistilBertConfig", **DISTIL),
    "t5": lambda: (t5(), {"input_ids": TOKENS, "decoder_input_ids": TOKENS}),
}


def pruned(model, inputs=TOKENS, *, module="", parameters=0.6, **options):
    """Return the pruned model and the warnings of `kirsch.prune`."""
    plan = kirsch.plan(
        kirsch.trace(model, inputs, module=module),
        kirsch.Goal(parameters=parameters),
        round_to=1,
        loadable=False,
        **options,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return kirsch.prune(model, plan), [str(warning.message) for warning in caught]


@pytest.fixture(scope="module")
def small():
    model, (text,) = pruned(bert())
    assert "No configuration describes the pruned BertForSequenceClassification." in text
    assert 'kirsch.save, or plan with kinds=["ffn unit"], uniform=True.' in text
    assert "save_pretrained and push_to_hub raise an error" in text
    return model


def assert_cannot_be_saved(model, folder):
    for method in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(UsageError, match=ERROR):
            method(folder / "checkpoint")
    assert not (folder / "checkpoint").exists()


def test_the_error_for_saving_names_options_of_a_plan_with_which_the_model_can_be_saved(small, tmp_path):
    assert_cannot_be_saved(small, tmp_path)
    with pytest.raises(
        UsageError, match=r'Save it with kirsch\.save, or plan with kinds=\["ffn unit"\], uniform=True\.'
    ):
        small.save_pretrained(tmp_path)
    assert_cannot_be_saved(small.bert, tmp_path)  # a submodule that was cut


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
def test_a_model_planned_with_the_options_in_the_error_can_be_saved_and_loaded(kind, kinds, tmp_path):
    model, inputs = MODELS[kind]()
    named = rf"plan with kinds={re.escape(json.dumps(kinds))}, uniform=True\."
    once, _ = pruned(model, inputs, parameters=0.9)
    with pytest.raises(UsageError, match=named):
        once.save_pretrained(tmp_path)
    small, warned = pruned(model, inputs, parameters=0.85, kinds=kinds, uniform=True)
    assert not warned
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs)[0], small(**inputs)[0])


def test_the_error_proposes_no_plan_if_no_number_of_the_configuration_counts_units(tmp_path):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], num_labels=3)
    model = with_noise(transformers.ResNetForImageClassification(config)).eval()
    small, _ = pruned(model, torch.randn(2, 3, 32, 32), parameters=0.7)
    with pytest.raises(UsageError, match=r"Save it with kirsch\.save\.$"):
        small.save_pretrained(tmp_path)


def test_saving_a_copy_a_conversion_or_a_pickle_raises_the_error(small, tmp_path):
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(small), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(small))]
    for found in [*copies, copy.deepcopy(small).half(), nn.DataParallel(small).module, torch.compile(small)]:
        assert_cannot_be_saved(found, tmp_path)


@pytest.mark.filterwarnings("ignore:The teacher is not measurably better than chance:UserWarning")
def test_saving_a_loaded_or_distilled_model_raises_the_error(small, tmp_path):
    kirsch.save(small, tmp_path / "small")
    again = kirsch.load(tmp_path / "small", bert)  # without a warning
    assert torch.equal(again.eval()(TOKENS).logits, small(TOKENS).logits)
    assert_cannot_be_saved(again, tmp_path)
    training = kirsch.Training(epochs=1, learning_rate=0.01)
    data = [(TOKENS, torch.tensor([0, 1]))]
    assert_cannot_be_saved(kirsch.distill(small, bert(), data, training=training).model, tmp_path)


def test_the_check_of_save_pretrained_does_not_change_the_state_dict_or_the_traced_program(small):
    assert not [name for name in small.state_dict() if "pretrained" in name]
    program = torch.export.export(small, (TOKENS,), strict=False)
    torch.testing.assert_close(program.module()(TOKENS).logits, small(TOKENS).logits)


def test_saving_with_a_trainer_of_transformers_raises_the_error(small, tmp_path):
    args = transformers.TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    with pytest.raises(UsageError, match=ERROR):
        transformers.Trainer(small, args).save_model(tmp_path / "checkpoint")


def test_a_model_pruned_twice_can_be_saved_if_a_configuration_describes_the_result(tmp_path):
    kinds = {"kinds": ["ffn unit"], "exclude": ["bert.pooler"]}
    once, warned = pruned(bert(layers=2), parameters=0.9, **kinds)
    widths = [layer.intermediate.dense.out_features for layer in once.bert.encoder.layer]
    assert len(set(widths)) == 2
    assert warned
    assert_cannot_be_saved(once, tmp_path)
    plan = kirsch.plan(kirsch.trace(once, TOKENS), kirsch.Goal(parameters=0.9), round_to=1, loadable=False, **kinds)
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
    assert_cannot_be_saved(once, tmp_path)
    kirsch.save(twice, tmp_path / "kirsch")
    for model in (twice, kirsch.load(tmp_path / "kirsch", lambda: bert(layers=2)).eval()):
        model.save_pretrained(tmp_path / "checkpoint")
        again = type(model).from_pretrained(tmp_path / "checkpoint").eval()
        assert torch.equal(again(TOKENS).logits, twice(TOKENS).logits)
        model.bert.save_pretrained(tmp_path / "part")


def test_after_pruning_a_submodule_saving_the_model_or_the_submodule_raises_the_error(tmp_path):
    model, warned = pruned(bert(), module="bert.encoder")
    assert "only a part was pruned: 'bert.encoder'" in warned[0]
    assert_cannot_be_saved(model, tmp_path)
    assert_cannot_be_saved(model.bert, tmp_path)


def test_a_submodule_that_was_not_cut_can_be_saved(tmp_path):
    model, warned = pruned(t5(), {"input_ids": TOKENS, "decoder_input_ids": TOKENS}, module="encoder")
    assert warned
    assert_cannot_be_saved(model, tmp_path)
    assert_cannot_be_saved(model.encoder, tmp_path)
    model.decoder.save_pretrained(tmp_path / "decoder")
    assert (tmp_path / "decoder" / "config.json").is_file()


def test_saving_a_transformers_model_within_a_users_model_raises_the_error_only_if_it_was_cut(tmp_path):
    model, warned = pruned(Wrapper())
    assert "No configuration describes the pruned 'bert', a BertModel." in warned[0]
    assert_cannot_be_saved(model.bert, tmp_path)
    model, warned = pruned(Wrapper(), parameters=0.99, exclude=["bert"])
    assert model.head[0].out_features < 32
    assert not warned  # only the head was cut
    model.bert.save_pretrained(tmp_path / "bert")


def test_saving_a_model_with_pytorch_model_hub_mixin_raises_the_error(tmp_path):
    model, warned = pruned(Mixed(), torch.randn(4, 5))
    assert "from_pretrained would build the model in its original size" in warned[0]
    assert_cannot_be_saved(model, tmp_path)


def test_a_model_without_save_pretrained_is_pruned_without_a_warning():
    model, warned = pruned(nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 3)), torch.randn(4, 5))
    assert not warned
    assert not hasattr(model, "save_pretrained")


def test_saving_a_model_pruned_without_verification_raises_the_error(tmp_path):
    plan = kirsch.plan(kirsch.trace(model := bert(), TOKENS), kirsch.Goal(parameters=0.6), round_to=1, loadable=False)
    with pytest.warns(UserWarning, match="No configuration describes the pruned Bert"):
        small = kirsch.prune(model, plan, verify=False)
    assert_cannot_be_saved(small, tmp_path)
