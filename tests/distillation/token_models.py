"""Small models of transformers with their batches and terms, and their losses with other padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kirsch.data.batches import Batch
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.term import Term
from kirsch.frameworks.training import TrainingHooks

WORDS, PAD = 20, 0
QUIET = TrainingHooks(event=lambda event: None)


def gpt2(transformers, width):
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=width, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(transformers, width):
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert(transformers, width):
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=2, attn_implementation="eager",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def t5(transformers, width):
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=PAD, pad_token_id=PAD, attn_implementation="eager",
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def marian(transformers, width):
    config = transformers.MarianConfig(
        vocab_size=WORDS, d_model=width, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, dropout=0.0,
        pad_token_id=PAD, decoder_start_token_id=PAD, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    return transformers.MarianMTModel(config)


LAST = Term("hidden-mse", 1.0, student_layer="hidden[-1]", name="last")


def pair(build, transformers):
    """Return a student of width 8 and a teacher of width 12, in inference mode and float64."""
    models = []
    for width in (8, 12):
        torch.manual_seed(width)
        models.append(build(transformers, width).eval().double())
    return models


def mask_of(lengths, longest, *, left=False):
    mask = np.arange(longest) < np.array(lengths)[:, None]
    return (mask[:, ::-1] if left else mask).astype(np.int64).copy()


def words(shape, seed=0):
    return np.random.default_rng(seed).integers(3, WORDS, shape)


def causal_batch(*, left=False):
    mask = mask_of([7, 4, 2, 5], 7, left=left)
    tokens = words((4, 7))
    return {"input_ids": tokens, "attention_mask": mask}, np.where(mask == 1, tokens, -100)


def translation():
    """Return sources and targets of several lengths; the decoder input is the target, shifted by one position."""
    source, target = mask_of([6, 3, 4, 1], 6), mask_of([2, 5, 5, 3], 5)
    labels = np.where(target == 1, words((4, 5), 1), -100)
    decoder_input_ids = np.concatenate([np.full((4, 1), PAD), np.where(labels == -100, PAD, labels)[:, :-1]], axis=1)
    return {"input_ids": words((4, 6)), "attention_mask": source, "decoder_input_ids": decoder_input_ids}, labels


def compute_loss(models, objective, inputs, labels=None):
    """Return the terms of the loss of a batch, and the gradient of the total for the student."""
    student, teacher = models
    tensors = {name: torch.from_numpy(part) for name, part in inputs.items()}
    batch = Batch(tensors, None if labels is None else torch.from_numpy(labels))
    bound = Distiller(student, teacher, objective, batch)
    try:
        output = bound.step(bound.module, batch, 0.0)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(output.total, trained, allow_unused=True)
    finally:
        bound.module.close()
        bound.close()
    terms = {name: float(value.detach()) for name, value in output.terms.items()}
    return terms, torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def with_other_padding(inputs, **masks):
    """Return the inputs with other words where a mask is 0."""
    return {
        name: np.where(masks[name] == 1, part, words(part.shape, 9)) if name in masks else part
        for name, part in inputs.items()
    }


def assert_padding_has_no_effect(models, objective, inputs, other, labels):
    terms, gradient = compute_loss(models, objective, inputs, labels)
    other_terms, other_gradient = compute_loss(models, objective, other, labels)
    assert any((inputs[name] != other[name]).any() for name in inputs)
    assert all(math.isfinite(value) for value in terms.values())
    assert other_terms == pytest.approx(terms, rel=1e-6)  # transformers computes some softmaxes in float32
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-7)
    assert gradient.abs().max() > 0


BOTH = [t5, marian]


def translation_terms(build):
    """Return terms on encoder, decoder and cross-attention."""
    decoder = "decoder.block.1" if build is t5 else "model.decoder.layers.1"
    cross = f"{decoder}.{'layer.1.EncDecAttention' if build is t5 else 'encoder_attn'}/softmax:in"
    return (
        Term("kd", 1.0, temperature=2.0),
        Term("hidden-mse", 1.0, student_layer="encoder.hidden[*]", name="encoder"),
        Term("hidden-mse", 1.0, student_layer="decoder.hidden[*]", name="decoder"),
        Term("hidden-mse", 1.0, student_layer="hidden[-1]", name="last"),
        Term("hidden-mse", 1.0, student_layer=decoder, name="layer"),
        Term(
            "attention-kl",
            1.0,
            student_layer="decoder.attention[-1]",
            options={"attention": "weights"},
            name="attention",
        ),
        Term(
            "attention-kl",
            1.0,
            student_layer="encoder.attention[-1]",
            options={"attention": "weights"},
            name="encoder-attention",
        ),
        Term("attention-kl", 1.0, student_layer="cross.attention[-1]", options={"attention": "weights"}, name="cross"),
        Term("attention-mse", 1.0, student_layer=cross, name="scores"),
    )
