"""Tokens are removed from a language model and its tokenizer, which then load without Kirsch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import kirsch
from kirsch.errors import ModelError, UsageError, VerificationError
from kirsch.pruning.vocabulary.tokenizer import needed, rewritten

pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["the cat sat on the mat", "a dog sat on the log", "pruning of a vocabulary", "low lower lowest new newest"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
KINDS = ["BPE", "WordPiece", "Unigram", "WordLevel"]


def tokenizer(transformers, kind):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if kind == "BPE":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    elif kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>")
    else:
        model, trained_by = {
            "WordPiece": (models.WordPiece, trainers.WordPieceTrainer),
            "WordLevel": (models.WordLevel, trainers.WordLevelTrainer),
        }[kind]
        made = Tokenizer(model(unk_token="<unk>"))
        made.pre_tokenizer, trainer = pre_tokenizers.Whitespace(), trained_by(vocab_size=80, special_tokens=SPECIAL)
    made.train_from_iterator(TEXTS * 3, trainer)
    ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def llama(transformers, size, **options):
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(vocab_size=size, **(settings | special | options))
    return transformers.LlamaForCausalLM(config).eval()


def ids_of(tokens, texts):
    return sorted({number for text in texts for number in tokens(text)["input_ids"]})


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_kept_tokens_has_the_same_tokens_and_outputs(transformers, kind):
    tokens = tokenizer(transformers, kind)
    model = llama(transformers, len(tokens) + 3)
    found = kirsch.trim_vocabulary(model, ids_of(tokens, TEXTS[:2]), tokenizer=tokens)
    assert len(found.kept) < len(tokens) - 5
    for text in TEXTS[:2]:
        old, new = tokens(text)["input_ids"], found.tokenizer(text)["input_ids"]
        assert new == found.to_new(old)
        assert found.to_old(new) == old
        assert found.tokenizer.decode(new) == tokens.decode(old)
        expected = logits(model, [old])[..., list(found.kept)]
        torch.testing.assert_close(logits(found.model, [new]), expected)


def test_bpe_keeps_the_parts_of_kept_tokens_and_all_bytes(transformers):
    tokens = tokenizer(transformers, "BPE")
    state = json.loads(tokens.backend_tokenizer.to_str())
    of_token, merges = state["model"]["vocab"], [tuple(merge) for merge in state["model"]["merges"]]
    longest = max(of_token, key=len)
    kept = needed(state, {of_token[longest]})
    results = {first + second for first, second in merges}
    assert {number for token, number in of_token.items() if token not in results} <= kept
    parts = next(merge for merge in merges if "".join(merge) == longest)
    assert {of_token[part] for part in parts} <= kept
    assert len(kept) < len(of_token)
    new = rewritten(state, {old: number for number, old in enumerate(sorted(kept))})
    assert longest in new["model"]["vocab"]
    assert all("".join(merge) in new["model"]["vocab"] for merge in new["model"]["merges"])
    assert sorted(new["model"]["vocab"].values()) == list(range(len(kept)))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_those_of_the_kept_tokens_and_tied_layers_stay_tied(transformers, tied):
    model = llama(transformers, 40, tie_word_embeddings=tied).train()
    model.lm_head.weight.requires_grad_(tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = kirsch.trim_vocabulary(model, [30, 7, 9])
    small = found.model
    assert found.kept == (0, 1, 2, 7, 9, 30)
    assert small.config.vocab_size == 6
    assert torch.equal(small.model.embed_tokens.weight, model.model.embed_tokens.weight[list(found.kept)])
    assert torch.equal(small.lm_head.weight, model.lm_head.weight[list(found.kept)])
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    assert small.training
    assert small.lm_head.weight.requires_grad == tied
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_special_ids_of_configuration_and_generation_are_rewritten(transformers):
    model = llama(transformers, 40, pad_token_id=5, bos_token_id=20, eos_token_id=[30, 31])
    model.generation_config.suppress_tokens = [3, 30, 8]
    found = kirsch.trim_vocabulary(model, [3, 10])
    assert found.kept == (3, 5, 10, 20, 30, 31)
    config, generation = found.model.config, found.model.generation_config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 3, [4, 5])
    assert found.model.model.embed_tokens.padding_idx == 1
    assert (generation.bos_token_id, generation.eos_token_id) == (3, [4, 5])
    assert generation.suppress_tokens == [0, 4]
    assert model.generation_config.suppress_tokens == [3, 30, 8]
    model.generation_config.sequence_bias = {(3,): 1.0}
    with pytest.raises(UsageError, match=r"`sequence_bias` of the GenerationConfig"):
        kirsch.trim_vocabulary(model, [3, 10])


def test_encoder_decoders_and_heads_with_a_bias_are_trimmed(transformers):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=40, **sizes, **heads))
    bart.final_logits_bias.normal_()
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **shape))
    torch.nn.init.normal_(bert.cls.predictions.bias)
    for model in (bart, bert):
        found = kirsch.trim_vocabulary(model, range(25))
        tied = found.model.get_output_embeddings().weight is found.model.get_input_embeddings().weight
        assert tied
        assert found.model.config.vocab_size == len(found.kept) == 25
    assert found.model.cls.predictions.bias.shape == (25,)


def test_ids_are_converted_in_the_type_in_which_they_are_given(transformers):
    found = kirsch.trim_vocabulary(llama(transformers, 40), [7, 9])
    assert found.to_new([[7, 9], [0, 2]]) == [[3, 4], [0, 2]]
    assert torch.equal(found.to_new(torch.tensor([9, 7])), torch.tensor([4, 3]))
    assert np.array_equal(found.to_old(np.array([4, 3])), [9, 7])
    assert found.to_new([7, 8], unknown=2) == [3, 2]
    with pytest.raises(UsageError, match=r"1 token that are not|8"):
        found.to_new([7, 8])
    with pytest.raises(UsageError, match="-100"):
        found.to_new([7, -100])


@pytest.mark.parametrize(
    ("keep", "message"),
    [([], "is empty"), ([40], "ids 0 to 39"), ([0.5], "float64"), ("all", "`keep`.*'all'")],
)
def test_wrong_ids_are_refused_before_any_work(transformers, keep, message):
    with pytest.raises(UsageError, match=message):
        kirsch.trim_vocabulary(llama(transformers, 40), keep)


def test_models_without_a_stated_vocabulary_are_refused(transformers):
    with pytest.raises(ModelError, match="cannot be trimmed"):
        kirsch.trim_vocabulary(torch.nn.Linear(4, 4), [1])
    model = llama(transformers, 40)
    cut = kirsch.prune(model, kirsch.plan(kirsch.trace(model, {"input_ids": torch.ones(1, 4).long()}), macs(0.9)))
    cut.model.layers[0].mlp.up_proj = torch.nn.Linear(16, 7, bias=False)
    with pytest.raises(ModelError, match=r"up_proj.*has the shape"):
        kirsch.trim_vocabulary(cut, [1])


def macs(fraction):
    return kirsch.Goal(macs=fraction)


def test_a_model_that_depends_on_the_number_of_the_padding_token_is_refused(transformers):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.RobertaConfig(vocab_size=40, pad_token_id=5, bos_token_id=6, eos_token_id=7, **shape)
    model = transformers.RobertaForMaskedLM(config)  # the numbers of positions begin after the padding token
    with pytest.raises(VerificationError, match="Keep all tokens up to"):
        kirsch.trim_vocabulary(model, range(10, 30))
    assert kirsch.trim_vocabulary(model, range(30)).kept == tuple(range(30))


WITHOUT_KIRSCH = """
import json, sys
sys.modules["kirsch"] = sys.modules["torchvision"] = None
import torch, transformers
torch.set_num_threads(1)
folder = sys.argv[1]
stored = torch.load(folder + "/stored.pt")
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
tokens = transformers.AutoTokenizer.from_pretrained(folder)
ids = torch.tensor([tokens(stored["text"])["input_ids"]])
assert torch.equal(ids, stored["ids"])
new_of_old = {int(old): new for old, new in json.load(open(folder + "/token_map.json")).items()}
assert [new_of_old[old] for old in stored["old"]] == ids[0].tolist()
assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), stored["generated"])
"""


def test_model_tokenizer_and_map_load_and_generate_in_a_process_without_kirsch(transformers, tmp_path):
    tokens = tokenizer(transformers, "BPE")
    found = kirsch.trim_vocabulary(llama(transformers, len(tokens)), ids_of(tokens, TEXTS[:2]), tokenizer=tokens)
    found.save(tmp_path)
    ids = torch.tensor([found.tokenizer(TEXTS[0])["input_ids"]])
    generated = found.model.generate(ids, max_new_tokens=4, do_sample=False)
    old = tokens(TEXTS[0])["input_ids"]
    torch.save({"text": TEXTS[0], "ids": ids, "old": old, "generated": generated}, tmp_path / "stored.pt")
    paths = os.pathsep.join(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if "src" not in path)
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", WITHOUT_KIRSCH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
