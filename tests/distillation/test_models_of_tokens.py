"""Distillation of language, encoder and speech models of transformers. Padding has no effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distillation.token_models import (
    BOTH,
    LAST,
    QUIET,
    WORDS,
    assert_padding_has_no_effect,
    bert,
    causal_batch,
    compute_loss,
    gpt2,
    llama,
    marian,
    mask_of,
    pair,
    t5,
    translation,
    translation_terms,
    with_other_padding,
    words,
)
from kirsch.data.batches import ArrayData, Batch
from kirsch.distillation.distill import distill
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import TopK, build_store
from kirsch.distillation.term import Term
from kirsch.errors import DataError, ShapeError
from kirsch.frameworks.training import Training, TrainingHooks

# ------------------------------------------------------------------------------------------------ the next token


@pytest.mark.parametrize("build", [gpt2, llama])
def test_the_causal_loss_is_the_loss_of_the_next_token(transformers, build):
    """Compared with the loss of transformers, and with the divergence computed directly."""
    models = pair(build, transformers)
    inputs, labels = causal_batch()
    found, _ = compute_loss(models, Objective.preset("causal"), inputs, labels)
    tensors = {name: torch.from_numpy(part) for name, part in inputs.items()}
    with torch.no_grad():
        student, teacher = (model(**tensors, labels=torch.from_numpy(labels)) for model in models)
    labeled = torch.from_numpy(labels)[:, 1:] != -100
    log_s, log_t = (out.logits[:, :-1][labeled].log_softmax(-1) for out in (student, teacher))
    expected = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    assert found["label"] == pytest.approx(0.5 * float(student.loss))
    assert found["kd"] == pytest.approx(0.5 * float(expected))


@pytest.mark.parametrize("left", [False, True], ids=["padding right", "padding left"])
@pytest.mark.parametrize("labeled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_padding_of_a_language_model_has_no_effect(transformers, build, labeled, left):
    inputs, labels = causal_batch(left=left)
    objective = Objective(
        (Term("kd", 1.0, temperature=2.0), Term("hidden-mse", 1.0, student_layer="hidden[-1]")), causal=True
    )
    other = with_other_padding(inputs, input_ids=inputs["attention_mask"])
    assert_padding_has_no_effect(pair(build, transformers), objective, inputs, other, labels if labeled else None)


def test_a_batch_without_labels_is_refused_alone_and_adds_0_to_an_optimizer_step_with_labels(transformers):
    inputs, labels = causal_batch()
    with Distiller(*pair(gpt2, transformers), Objective.preset("causal"), (inputs, labels)) as found:
        empty = (inputs, np.full_like(labels, -100))
        with pytest.raises(DataError, match="All targets of a batch are masked"):
            found(empty)
        counts = found.counts([(inputs, labels), empty])
        assert float(found(empty, step_counts=counts).total.detach()) == 0.0


def test_distillation_of_a_language_model_decreases_the_loss(transformers):
    student, teacher = pair(gpt2, transformers)
    inputs, labels = causal_batch()
    data = ArrayData(inputs, labels, batch_size=2)
    training = Training(epochs=10, learning_rate=0.01, optimizer="adamw", weight_decay=0.0)
    objective = Objective.preset("causal", label_weight=0.0)
    found = distill(student, teacher, data, objective=objective, training=training, hooks=QUIET, check_teacher=False)
    assert found.history[-1]["loss"] < 0.9 * found.history[0]["loss"]


@pytest.mark.parametrize("left", [False, True], ids=["padding right", "padding left"])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_labels_at_padding_have_no_effect_on_a_language_model(transformers, build, left):
    """A data collator may set the labels to the tokens, also at padding."""
    inputs, labels = causal_batch(left=left)
    objective = Objective.preset("causal")
    models = pair(build, transformers)
    ignored, gradient = compute_loss(models, objective, inputs, labels)
    unmasked, gradient_unmasked = compute_loss(models, objective, inputs, inputs["input_ids"])
    assert unmasked == pytest.approx(ignored, rel=1e-12)
    torch.testing.assert_close(gradient_unmasked, gradient)
    with Distiller(*models, objective, (inputs, labels)) as distiller:
        assert distiller.counts([(inputs, inputs["input_ids"])]) == distiller.counts([(inputs, labels)])


def test_the_accuracy_of_a_causal_model_does_not_count_padding(transformers, tmp_path):
    """The accuracy of a student, of a teacher, and of a store."""
    student, teacher = pair(gpt2, transformers)
    inputs, labels = causal_batch()
    found = []
    for targets in (labels, inputs["input_ids"]):
        data, events = ArrayData(inputs, targets, batch_size=4), []
        for source in (teacher, build_store(tmp_path / str(len(found)), teacher, data, keep=TopK(WORDS))):
            distill(
                student,
                source,
                data,
                objective=Objective.preset("causal", terms=(Term("kd", 0.5, temperature=1.0),)),
                training=Training(epochs=1, learning_rate=1e-9),
                validation=(inputs, targets),
                hooks=TrainingHooks(event=events.append),
            )
        found.append([event["accuracy"] for event in events if "accuracy" in event])
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0])


def test_the_accuracy_of_a_causal_model_is_the_accuracy_of_the_next_token(transformers):
    student, teacher = pair(gpt2, transformers)
    inputs, labels = causal_batch()
    events = []
    found = distill(
        student,
        teacher,
        ArrayData(inputs, labels, batch_size=4),
        objective=Objective.preset("causal"),
        training=Training(epochs=1, learning_rate=1e-9),
        validation=(inputs, labels),
        hooks=TrainingHooks(event=events.append),
    )
    with torch.no_grad():
        logits = [model(**{n: torch.from_numpy(p) for n, p in inputs.items()}).logits for model in (student, teacher)]
    labeled = labels[:, 1:] != -100
    accuracies = [(z.argmax(-1).numpy()[:, :-1] == labels[:, 1:])[labeled].mean() for z in logits]
    assert found.history[0]["accuracy"] == pytest.approx(accuracies[0])
    (event,) = (event for event in events if event["event"] == "teacher")
    assert (event["accuracy"], event["classes"]) == (pytest.approx(accuracies[1]), WORDS)


def test_batches_without_labels_are_weighted_by_their_number_of_positions(transformers):
    """Two batches with different amounts of padding give the same optimizer step as one batch with all samples."""
    inputs, _ = causal_batch()
    objective = Objective((Term("kd", 1.0, temperature=2.0),), label_weight=0.0, causal=True)
    found = [
        distill(
            *pair(gpt2, transformers),
            ArrayData(inputs, None, batch_size=size),
            objective=objective,
            training=Training(epochs=1, gradient_accumulation_steps=4 // size, learning_rate=0.1, schedule="constant"),
            hooks=QUIET,
        ).model
        for size in (4, 2)
    ]
    for first, second in zip(*(model.parameters() for model in found), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)  # transformers computes softmaxes in float32


# ------------------------------------------------------------------------------------------------ encoders


ENCODED = (
    Term("kd", 1.0, temperature=2.0),
    Term("hidden-mse", 1.0, student_layer="hidden[*]", name="hidden"),
    Term("attention-mse", 1.0, student_layer="**.attention.self/softmax:in", name="scores"),
    Term("attention-kl", 1.0, student_layer="attention[-1]", options={"attention": "weights"}, name="weights"),
    Term("minilm", 1.0, student_layer=[f"**.self.{n}[-1]" for n in ("query", "key", "value")], options={"heads": 2}),
)
"""Terms with means over samples, positions, queries, and pairs of positions."""


@pytest.mark.parametrize("labeled", [True, False], ids=["labels", "no labels"])
def test_padding_of_an_encoder_has_no_effect(transformers, labeled):
    mask = mask_of([7, 4, 2, 5], 7)
    inputs = {"input_ids": words((4, 7)), "attention_mask": mask}
    other = with_other_padding(inputs, input_ids=mask)
    labels = np.arange(4) % 2 if labeled else None
    assert_padding_has_no_effect(pair(bert, transformers), Objective(ENCODED), inputs, other, labels)


@pytest.mark.parametrize(
    ("student_names", "teacher_names", "index"),
    [
        (["cat", "dog"], ["dog", "cat"], 0),
        (["cat", "dog"], ["Cat", "bird"], 1),
        (["cat", "dog"], ["Cat", "Dog"], None),
        (["cat", "dog"], ["Katze", "Hund"], None),
        (["cat", "dog"], ["LABEL_0", "LABEL_1"], None),
    ],
)
def test_class_names_in_another_order_are_refused(transformers, student_names, teacher_names, index):
    student, teacher = pair(bert, transformers)
    for model, names in ((student, student_names), (teacher, teacher_names)):
        model.config.id2label = dict(enumerate(names))
    inputs = {"input_ids": words((4, 7)), "attention_mask": mask_of([7, 4, 2, 5], 7)}
    if index is None:
        compute_loss((student, teacher), Objective.kd(), inputs)
        return
    names = rf"'{student_names[index]}' in the student, '{teacher_names[index]}' in the teacher"
    sentence = rf"The name of class {index} is {names}\. Soft targets"
    with pytest.raises(ShapeError, match=sentence):
        compute_loss((student, teacher), Objective.kd(), inputs)
    compute_loss(
        (student, teacher), Objective((Term("hidden-mse", 1.0, student_layer="hidden[-1]"),)), inputs, np.arange(4) % 2
    )


# ------------------------------------------------------------------------------------------------ speech


def wav2vec2(transformers, width):
    """Return a speech model with four samples of sound per frame."""
    config = transformers.Wav2Vec2Config(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(2, 2), num_conv_pos_embeddings=4, hidden_dropout=0.0,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True, attention_dropout=0.0,
        mask_time_prob=0.0, layerdrop=0.0, attn_implementation="eager", feat_proj_dropout=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def test_padding_of_sound_has_no_effect(transformers):
    """Padded frames are masked, both in the logits and in the hidden states."""
    mask = mask_of([40, 24, 32, 40], 40)
    sound = np.random.default_rng(0).standard_normal((4, 40))
    inputs = {"input_values": sound * mask, "attention_mask": mask}
    longer = {
        "input_values": np.pad(inputs["input_values"], ((0, 0), (0, 12))),
        "attention_mask": np.pad(mask, ((0, 0), (0, 12))),
    }
    terms = (
        Term("ctc-frames", 1.0, temperature=2.0, options={"blank": "drop"}),
        Term("hidden-mse", 1.0, student_layer="hidden[-1]", name="hidden"),
        Term("attention-kl", 1.0, student_layer="attention[-1]", name="attention"),
    )
    found, gradient = compute_loss(pair(wav2vec2, transformers), Objective(terms, label_weight=0.0), inputs)
    padded, gradient_padded = compute_loss(pair(wav2vec2, transformers), Objective(terms, label_weight=0.0), longer)
    assert padded == pytest.approx(found, rel=1e-6)
    torch.testing.assert_close(gradient_padded, gradient, rtol=1e-5, atol=1e-7)
    with Distiller(*pair(wav2vec2, transformers), Objective(terms, label_weight=0.0), inputs) as distiller:
        counts = distiller.counts([inputs])
    assert counts["labels"] == counts["positions of tokens"] == 10 + 6 + 8 + 10


# ------------------------------------------------------------------------------------------------ several batches


def unequal_batch(build):
    """Return a batch whose parts have different fractions of the labels, the tokens and the pairs of tokens."""
    inputs, labels = translation()
    if build in (t5, marian):
        return inputs, labels
    if build is gpt2:
        return causal_batch()
    return {"input_ids": words((4, 7)), "attention_mask": mask_of([7, 4, 2, 5], 7)}, np.arange(4) % 2


@pytest.mark.parametrize("labeled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("build", [bert, gpt2, *BOTH])
def test_the_batches_of_an_optimizer_step_sum_to_the_loss_of_one_large_batch(transformers, build, labeled):
    """A batch is weighted by the number of items that a term averages: labels, tokens or pairs of tokens."""
    student, teacher = pair(build, transformers)
    inputs, labels = unequal_batch(build)
    if not labeled and build in BOTH:  # with labels, the mask of the decoder follows from the labels
        inputs["decoder_attention_mask"] = (labels != -100).astype(np.int64)
    terms = translation_terms(build) if build in BOTH else ENCODED if build is bert else (Term("kd", 1.0), LAST)
    objective = Objective(terms, causal=build is gpt2)
    batch = Batch(inputs, labels if labeled else None)
    with Distiller(student, teacher, objective, batch).eval() as found:
        window = [part_of(batch, rows) for rows in (slice(1), slice(1, 4))]
        counts = found.counts(window)
        assert counts == found.counts([batch])
        parts = [found(part, step_counts=counts) for part in window]
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        gradients = [torch.autograd.grad(part.total, trained, allow_unused=True) for part in parts]
        one_batch = found(batch)
        expected = torch.autograd.grad(one_batch.total, trained, allow_unused=True)
    assert one_batch.terms.keys() == {term.record_name for term in terms} | ({"label"} if labeled else set())
    for name, value in one_batch.terms.items():
        total = sum(float(part.terms[name].detach()) for part in parts)
        assert total == pytest.approx(float(value.detach()), rel=1e-6), name
    for first, second, both in zip(*gradients, expected, strict=True):
        if both is not None:
            torch.testing.assert_close(first + second, both, rtol=1e-5, atol=1e-7)  # softmaxes in float32


def part_of(batch, rows):
    targets = None if batch.targets is None else batch.targets[rows]
    return Batch({name: value[rows] for name, value in batch.inputs.items()}, targets)
