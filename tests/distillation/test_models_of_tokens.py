"""Distillation of language, encoder, encoder-decoder and speech models of transformers. Padding has no effect."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kirsch.data.batches import ArrayData, Batch
from kirsch.distillation.distill import distill
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import DataError, ShapeError, UsageError
from kirsch.frameworks.training import Training, TrainingHooks

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


# ------------------------------------------------------------------------------------------------ encoder and decoder


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
    """The terms compare cross-attention, as in speech models. The source is longer than the target."""
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
