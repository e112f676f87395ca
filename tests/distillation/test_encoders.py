"""Losses on hidden states and attention of BERT, with a student of 2 layers and a teacher of 4."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill
from kirsch.distillation.losses.tokens import (
    attention_ce,
    attention_kl,
    attention_mse,
    cls_pkd,
    hidden_cosine,
    hidden_mse,
    minilm,
    token_fsp,
    token_nst,
)
from kirsch.distillation.objective import Objective
from kirsch.frameworks.training import Training, TrainingHooks


@pytest.fixture(scope="module")
def encoders(transformers):
    """Return a student of 2 layers and a teacher of 4, both of width 16."""

    def build(layers, seed):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=32,
            max_position_embeddings=16, attn_implementation="eager",
        )  # fmt: skip
        return transformers.BertModel(config).eval().double()

    return build(2, 0), build(4, 1)


def losses_and_gradient(student, teacher, tokens, mask):
    """Return the losses on the last layers, and the gradient of their sum for the student's word embeddings."""
    student.zero_grad()
    projections = {}

    def values(model, who):
        layer = model.encoder.layer[-1].attention.self
        parts = [layer.query, layer.key, layer.value]
        hooks = [p.register_forward_hook(lambda _, __, out: projections.setdefault(who, []).append(out)) for p in parts]
        out = model(tokens, attention_mask=mask.long(), output_hidden_states=True, output_attentions=True)
        for hook in hooks:
            hook.remove()
        return out

    s = values(student, "student")
    with torch.no_grad():
        t = values(teacher, "teacher")
    # Layer i of 2 is compared with layer 2 i of 4; layer 0 is the embedding.
    pairs = [(s.hidden_states[i], t.hidden_states[2 * i]) for i in range(3)]
    found = {
        "hidden-mse": sum(hidden_mse(*pair, mask=mask) for pair in pairs),
        "hidden-cosine": hidden_cosine(*pairs[-1], mask=mask),
        "cls-pkd": cls_pkd(*pairs[1], mask=mask),
        "token-fsp": token_fsp([pairs[0][0], pairs[1][0]], [pairs[0][1], pairs[1][1]], mask=mask),
        "token-nst": token_nst([pairs[0][0], pairs[1][0]], [pairs[0][1], pairs[1][1]], mask=mask),
        "attention-mse": sum(attention_mse(s.attentions[i], t.attentions[2 * i + 1], mask=mask) for i in range(2)),
        "attention-ce": attention_ce(s.attentions[-1], t.attentions[-1], attention="weights", mask=mask),
        "attention-kl": attention_kl(s.attentions[-1], t.attentions[-1], attention="weights", mask=mask),
        "minilm": minilm(projections["student"], projections["teacher"], heads=8, mask=mask),
    }
    sum(found.values()).backward()
    return {
        name: float(value.detach()) for name, value in found.items()
    }, student.embeddings.word_embeddings.weight.grad.clone()


def test_padding_changes_neither_losses_nor_gradient(encoders):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 30, (3, 7), generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 5, 2])[:, None]
    tokens = torch.where(mask, tokens, 0)
    plain, gradient = losses_and_gradient(*encoders, tokens, mask)
    padded, gradient_padded = losses_and_gradient(*encoders, F.pad(tokens, (0, 5)), F.pad(mask, (0, 5)))
    assert all(math.isfinite(value) and value > 0 for value in plain.values())
    assert plain == pytest.approx(padded, rel=1e-6)  # sums over more keys are rounded differently
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
    np.testing.assert_allclose(gradient_padded, gradient, rtol=1e-6, atol=1e-9)


def test_without_a_mask_padding_changes_every_loss(encoders):
    """Padding has an effect unless it is masked, so the test above can fail."""
    tokens = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 6, dtype=torch.bool)
    plain, _ = losses_and_gradient(*encoders, tokens, mask)
    padded, _ = losses_and_gradient(*encoders, F.pad(tokens, (0, 3)), torch.ones(2, 9, dtype=torch.bool))
    assert all(plain[name] != pytest.approx(padded[name], rel=1e-6) for name in plain)


@pytest.mark.parametrize("name", ["kd", "distilbert", "tinybert", "minilm"])
def test_presets_for_transformers_train_a_narrower_encoder(transformers, name):
    def build(layers, width):
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=width, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=32,
            max_position_embeddings=16, num_labels=2, attn_implementation="eager",
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)

    random, mask = np.random.default_rng(0), np.ones((16, 8), int)
    mask[:, 6:] = 0
    inputs = {"input_ids": random.integers(0, 50, (16, 8)), "attention_mask": mask}
    found = distill(
        build(2, 24),
        build(4, 48),
        ArrayData(inputs, random.integers(0, 2, 16), batch_size=8),
        objective=Objective.preset(name),
        training=Training(epochs=1, learning_rate=1e-3),
        check_teacher=False,
        hooks=TrainingHooks(event=lambda event: None),  # untrained models may give warnings
    )
    shares = found.history[0]["gradient_shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares.values())
