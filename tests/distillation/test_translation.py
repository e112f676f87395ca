"""Distillation of encoder-decoder models of transformers. Padding has no effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distillation.token_models import (
    BOTH,
    PAD,
    QUIET,
    assert_padding_has_no_effect,
    bert,
    causal_batch,
    compute_loss,
    gpt2,
    mask_of,
    pair,
    t5,
    translation,
    translation_terms,
    with_other_padding,
    words,
)
from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import UsageError
from kirsch.frameworks.training import Training


@pytest.mark.parametrize("build", BOTH)
def test_soft_targets_of_a_translation_are_averaged_over_labeled_positions(transformers, build):
    models = pair(build, transformers)
    inputs, labels = translation()
    found, _ = compute_loss(models, Objective((Term("kd", 1.0, temperature=2.0),)), inputs, labels)
    tensors = {name: torch.from_numpy(part) for name, part in inputs.items()}
    with torch.no_grad():
        student, teacher = (model(**tensors, labels=torch.from_numpy(labels)) for model in models)
    labeled = torch.from_numpy(labels) != -100
    log_s, log_t = ((out.logits[labeled] / 2).log_softmax(-1) for out in (student, teacher))
    expected = 4 * F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    assert found["label"] == pytest.approx(float(student.loss))
    assert found["kd"] == pytest.approx(float(expected))


def test_the_option_ignore_index_replaces_minus_100(transformers):
    models = pair(t5, transformers)
    inputs, labels = translation()
    objective = Objective((Term("kd", 1.0, temperature=2.0),))
    found, gradient = compute_loss(models, objective, inputs, labels)
    ignored, ignored_gradient = compute_loss(
        models,
        Objective((Term("kd", 1.0, temperature=2.0),), ignore_index=PAD),
        inputs,
        np.where(labels == -100, PAD, labels),
    )
    assert ignored == pytest.approx(found)
    torch.testing.assert_close(ignored_gradient, gradient)


@pytest.mark.parametrize("build", BOTH)
def test_padding_of_source_and_target_has_no_effect(transformers, build):
    """Hidden states of the encoder are masked by the attention mask, those of the decoder by the labels."""
    inputs, labels = translation()
    other = with_other_padding(
        inputs, input_ids=inputs["attention_mask"], decoder_input_ids=(labels != -100).astype(int)
    )
    assert_padding_has_no_effect(pair(build, transformers), Objective(translation_terms(build)), inputs, other, labels)


@pytest.mark.parametrize("build", BOTH)
def test_without_a_mask_all_positions_of_the_source_count(transformers, build):
    """Batches for speech models often have no attention mask. The terms compare cross-attention.

    The source is longer than the target.
    """
    inputs, labels = translation()
    inputs["attention_mask"] = np.ones_like(inputs["attention_mask"])
    terms = [
        Term(loss, 1.0, student_layer="cross.attention[-1]", name=loss) for loss in ("attention-kl", "attention-mse")
    ]
    found, gradient = compute_loss(pair(build, transformers), Objective(tuple(terms)), inputs, labels)
    del inputs["attention_mask"]
    without, gradient_without = compute_loss(pair(build, transformers), Objective(tuple(terms)), inputs, labels)
    assert without == pytest.approx(found, rel=1e-6)
    torch.testing.assert_close(gradient_without, gradient, rtol=1e-5, atol=1e-7)


def test_returned_attention_is_used_as_weights(transformers):
    """No second softmax is applied."""
    inputs = {"input_ids": words((4, 7)), "attention_mask": mask_of([7, 4, 2, 5], 7)}
    parts = []
    for options in ({}, {"attention": "weights"}):
        term = Term("attention-kl", 1.0, student_layer="attention[-1]", options=options)
        parts.append(compute_loss(pair(bert, transformers), Objective((term,), label_weight=0.0), inputs)[0])
    assert parts[0] == parts[1]


def test_the_decoder_mask_of_the_batch_is_used(transformers):
    inputs, labels = translation()
    inputs["decoder_attention_mask"] = (labels != -100).astype(np.int64)
    objective = Objective(
        (Term("kd", 1.0, temperature=2.0), Term("hidden-mse", 1.0, student_layer="decoder.hidden[-1]"))
    )
    other = with_other_padding(inputs, decoder_input_ids=inputs["decoder_attention_mask"])
    assert_padding_has_no_effect(pair(t5, transformers), objective, inputs, other, None)


@pytest.mark.parametrize("build", BOTH)
def test_batches_without_decoder_input_ids_are_refused(transformers, build):
    inputs, labels = translation()
    del inputs["decoder_input_ids"]
    sentence = r"has a decoder, and the batches have no decoder_input_ids.*prepare_decoder_input_ids_from_labels"
    with pytest.raises(UsageError, match=sentence):
        compute_loss(pair(build, transformers), Objective((Term("kd", 1.0),)), inputs, labels)


def test_boolean_inputs_are_passed_unchanged(transformers):
    student, teacher = pair(gpt2, transformers)
    inputs, labels = causal_batch()
    batch = {"use_cache": False, **inputs, "labels": labels}
    found = distill(student, teacher, [batch], objective=Objective.preset("causal"), hooks=QUIET,
                    training=Training(epochs=1))  # fmt: skip
    assert set(found.history[0]["terms"]) == {"label", "kd"}


@pytest.mark.parametrize("name", ["seqkd", "kd"])
@pytest.mark.parametrize("build", BOTH)
def test_distillation_of_a_translation_model_decreases_the_loss(transformers, build, name):
    student, teacher = pair(build, transformers)
    inputs, labels = translation()
    training = Training(epochs=3, learning_rate=0.03, optimizer="adamw", weight_decay=0.0)
    data = ArrayData(inputs, labels, batch_size=2)
    objective = Objective.preset(name)
    found = distill(student, teacher, data, objective=objective, training=training, hooks=QUIET, check_teacher=False)
    assert set(found.history[0]["terms"]) == ({"label"} if name == "seqkd" else {"label", "kd"})
    assert found.history[-1]["loss"] < found.history[0]["loss"]
