"""A step of mutual learning equals distillation with the peers as teachers. All settings of a run are supported."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from distillation.examples import samples
from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.losses import hard_label, soft_target
from kirsch.distillation.mutual import MutualStep, distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Ramp, Term
from kirsch.errors import DataError, Interrupted, ShapeError, UsageError
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.pruning.regularizers import L1
from training_runs import equal_weights

N, D, K = 24, 6, 3
ONE_STEP = Training(epochs=1, learning_rate=0.1, schedule="constant", weight_decay=0.0)
QUIET = TrainingHooks(event=lambda _event: None)


def one_batch():
    return ArrayData(*samples(N), batch_size=N)


def batches(size=6):
    return ArrayData(*samples(N), batch_size=size)


def linear(seed, classes=K):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, classes, bias=False)).double()


def deep(seed, width=5):
    torch.manual_seed(seed)
    layers = nn.Linear(D, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, K)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "lskd"])
def test_a_step_equals_distillation_with_the_peers_as_teachers(name, count):
    """Linear students return the same in training and inference mode, so that `distill` computes the same step."""
    loss = Objective.preset(name)
    objective = Objective(
        tuple(Term(t.loss, 0.5, temperature=2.0, options=t.options) for t in loss.terms), label_weight=0.7
    )
    students = [linear(seed) for seed in range(count)]
    found = distill_mutually(students, one_batch(), objective=objective, training=ONE_STEP)
    for index, student in enumerate(students):
        peers = students[:index] + students[index + 1 :]
        alone = distill(student, peers, one_batch(), objective=objective, training=ONE_STEP, check_teacher=False)
        torch.testing.assert_close(found[index].model[0].weight, alone.model[0].weight, rtol=1e-12, atol=1e-14)
        assert found[index].history[0]["terms"] == pytest.approx(alone.history[0]["terms"], rel=1e-12)
        assert found[index].history[0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-12)
        for shares, expected in alone.first_batch.items():
            assert found[index].first_batch[shares] == pytest.approx(expected, rel=1e-5)  # norms are summed in float32


def test_a_loss_that_trains_the_embedding_of_its_teacher_does_not_train_the_peer():
    objective = Objective((Term("crd-batch", 0.5),))
    students = [linear(seed) for seed in range(2)]
    found = distill_mutually(students, one_batch(), objective=objective, training=ONE_STEP)
    options = {"objective": objective, "training": ONE_STEP, "check_teacher": False}
    for index, student in enumerate(students):
        alone = distill(student, students[1 - index], one_batch(), **options)
        torch.testing.assert_close(found[index].model[0].weight, alone.model[0].weight, rtol=1e-12, atol=1e-14)


def test_the_warnings_of_all_students_are_merged():
    def step(*warnings):
        return SimpleNamespace(check=lambda _batch, *, on_any_device: [*warnings, *["any device"] * on_any_device])

    mutual = MutualStep(None, [step("first"), step("first", "second")], [None, None])
    assert mutual.check(None) == ["first", "second"]
    assert mutual.check(None, on_any_device=True) == ["first", "any device", "second"]


@pytest.mark.parametrize("combine", ["logits", "confidence", "sum"])
def test_peers_are_combined_like_teachers(combine):
    objective = Objective((Term("kd", 0.5, temperature=2.0),), combine_teachers=combine)
    students = [linear(seed) for seed in range(3)]
    found = distill_mutually(students, one_batch(), objective=objective, training=ONE_STEP, hooks=QUIET)[1].model
    peers = [students[0], students[2]]
    options = {"objective": objective, "training": ONE_STEP, "hooks": QUIET, "check_teacher": False}
    alone = distill(students[1], peers, one_batch(), **options).model
    torch.testing.assert_close(found[0].weight, alone[0].weight, rtol=1e-12, atol=1e-14)


def test_the_kd_term_of_the_default_objective_has_the_gradient_of_the_mean_divergence_to_the_peers():
    """The paper defines the loss of three or more students in this way."""
    students = [linear(seed) for seed in range(3)]
    inputs = torch.from_numpy(samples(N)[0])
    logits = [student(inputs) for student in students]
    mean = (soft_target(logits[0], logits[1], temperature=1.0) + soft_target(logits[0], logits[2], temperature=1.0)) / 2
    (gradient,) = torch.autograd.grad(mean, [students[0][0].weight])
    objective = Objective((Term("kd", 1.0, temperature=1.0),), label_weight=0.0)
    found = distill_mutually(students, one_batch(), objective=objective, training=ONE_STEP)[0].model
    torch.testing.assert_close(students[0][0].weight - found[0].weight, 0.19 * gradient, rtol=1e-10, atol=1e-14)


def test_the_logits_of_peers_are_computed_in_training_mode():
    """Batch normalization uses the statistics of the batch, and not the initial running statistics 0 and 1."""

    def normed(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, K)).double()

    networks = normed(0), normed(1)
    first, second = distill_mutually(networks, one_batch(), training=ONE_STEP)
    inputs, targets = (torch.from_numpy(part) for part in samples(N))
    with torch.no_grad():
        logits_0, logits_1 = (network.train()(inputs) for network in networks)
    assert first.history[0]["terms"] == pytest.approx(
        {
            "label": float(hard_label(logits_0, targets)),
            "kd": float(soft_target(logits_0, logits_1, temperature=1.0)),
        },
        rel=1e-9,
    )
    assert second.history[0]["terms"]["kd"] == pytest.approx(
        float(soft_target(logits_1, logits_0, temperature=1.0)), rel=1e-9
    )


def test_students_of_different_architectures_are_trained_and_returned_in_order():
    students = [linear(0), deep(1), deep(2, width=9)]
    before = copy.deepcopy(students)
    found = distill_mutually(students, batches(), training=Training(epochs=15), validation=samples(N))
    assert [type(trained.model) for trained in found] == [nn.Sequential] * 3
    assert [len(trained.model) for trained in found] == [1, 5, 5]
    assert not any(module.training for trained in found for module in trained.model.modules())
    assert all(trained.history[-1]["accuracy"] == 1.0 for trained in found)
    assert all(equal_weights(now, then) for now, then in zip(students, before, strict=True))
    assert all(student.training for student in students)
    assert not any(p.grad is not None for student in students for p in student.parameters())


def test_each_student_has_a_history_and_the_terms_in_events_have_the_index_of_the_student():
    events = []
    students = [linear(0), linear(1)]
    hooks = TrainingHooks(event=events.append)

    def validation(model):
        return {"norm": model[0].weight.norm().item()}

    found = distill_mutually(students, one_batch(), training=ONE_STEP, hooks=hooks, validation=validation)
    assert [event["event"] for event in events] == ["first_batch", "epoch"]
    assert set(events[1]["terms"]) == {"0.label", "0.kd", "1.label", "1.kd"}
    assert events[1]["1.norm"] == found[1].history[0]["norm"] == pytest.approx(found[1].model[0].weight.norm().item())
    for trained in found:
        (record,) = trained.history
        assert set(record) == {"epoch", "learning_rate", "seconds", "loss", "terms", "gradient_shares", "norm"}
        assert set(record["terms"]) == {"label", "kd"}
        assert sum(record["gradient_shares"].values()) == pytest.approx(1)
        assert sum(trained.first_batch["loss_shares"].values()) == pytest.approx(1)
    assert events[1]["loss"] == pytest.approx(sum(trained.history[0]["loss"] for trained in found))


def test_with_a_weight_near_0_each_student_is_trained_as_without_the_others():
    objective = Objective((Term("kd", Ramp(0.0, 1e-9, 5.0), temperature=1.0),))
    training = Training(epochs=1, learning_rate=0.1)
    found = distill_mutually([linear(0), linear(1)], batches(), objective=objective, training=training,
                             hooks=TrainingHooks(event=lambda event: None))  # fmt: skip
    for index in range(2):
        alone = fit(linear(index), batches(), training=training).model
        torch.testing.assert_close(found[index].model[0].weight, alone[0].weight, rtol=1e-6, atol=1e-9)


def test_accumulated_batches_equal_one_large_batch():
    found = [
        distill_mutually(
            [linear(0), linear(1)], batches(size), training=Training(epochs=1, gradient_accumulation_steps=N // size)
        )
        for size in (N, 6)
    ]
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first.model[0].weight, second.model[0].weight, rtol=1e-10, atol=1e-12)


def test_the_regularizers_are_applied_to_each_student():
    """The gradient of s Σ|w| is s sign(w)."""
    students = [linear(0), linear(1)]
    plain = distill_mutually(students, one_batch(), training=ONE_STEP)
    found = distill_mutually(students, one_batch(), training=ONE_STEP, regularizers=(L1(0.01), L1(0.02)))
    for index, student in enumerate(students):
        assert set(found[index].history[0]["terms"]) == {"label", "kd", "L1", "L1#2"}
        moved = found[index].model[0].weight - plain[index].model[0].weight
        torch.testing.assert_close(moved, -0.19 * 0.03 * student[0].weight.sign(), rtol=1e-9, atol=1e-12)


def test_gradients_are_balanced_within_each_student():
    objective = Objective((Term("kd", 1.0, temperature=4.0),), balance="gradient")
    slow = Training(epochs=4, learning_rate=1e-6)
    for trained in distill_mutually([linear(0), linear(1)], one_batch(), objective=objective, training=slow):
        for record in trained.history:
            assert record["gradient_shares"] == pytest.approx({"label": 0.5, "kd": 0.5}, abs=0.01)


def test_mutual_learning_runs_in_bf16_with_an_average_of_the_weights():
    training = Training(epochs=2, precision="bf16", ema_decay=0.5)
    students = [deep(0).float(), deep(1).float()]
    data = ArrayData(samples(N)[0].astype(np.float32), samples(N)[1], batch_size=12)
    found = distill_mutually(students, data, training=training)
    assert np.isfinite([record["loss"] for trained in found for record in trained.history]).all()


def test_without_labels_the_only_term_compares_the_peers():
    found = distill_mutually([linear(0), linear(1)], ArrayData(samples(N)[0], None), training=ONE_STEP)
    assert [set(trained.history[0]["terms"]) for trained in found] == [{"kd"}, {"kd"}]


@pytest.mark.parametrize("stop_at", [3, 4, 9])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_run(stop_at):
    """Dropout, batch statistics, averaged weights, balanced gradients and accumulation all have state to restore."""
    objective = Objective((Term("kd", Ramp(0.1, 1.0, 2), temperature=2.0), Term("dist", 0.5)), balance="gradient")
    training = Training(epochs=3, ema_decay=0.9, gradient_accumulation_steps=2)
    states, calls = [], []

    def run(**hooks):
        hooks = TrainingHooks(event=lambda event: None, **hooks)
        return distill_mutually([deep(0), deep(1), linear(2)], batches(3), objective=objective, training=training,
                                hooks=hooks, validation=samples(N))  # fmt: skip

    def stop():
        calls.append(1)
        return Interrupted("stopped") if len(calls) == stop_at else None

    uninterrupted = run()
    with pytest.raises(Interrupted):
        run(save=states.append, stop=stop)
    for expected, result in zip(uninterrupted, run(resume=states[-1]), strict=True):
        assert equal_weights(expected.model, result.model)
        assert result.first_batch == expected.first_batch
        for a, b in zip(expected.history, result.history, strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_terms_that_compare_samples_give_a_warning_if_an_optimizer_step_has_several_batches():
    events = []
    objective = Objective((Term("dist", 1.0),))
    hooks = TrainingHooks(event=events.append)
    distill_mutually([linear(0), linear(1)], batches(), objective=objective, hooks=hooks,
                     training=Training(epochs=1, gradient_accumulation_steps=2))  # fmt: skip
    assert any("depends on all samples of a batch together" in event.get("text", "") for event in events)


def with_a_shared_parameter():
    one, other = linear(0), nn.Sequential(nn.Identity(), nn.Linear(D, K, bias=False)).double()
    other[1].weight = one[0].weight
    return [one, other]


@pytest.mark.parametrize(
    ("students", "sentence"),
    [
        (list, "at least two students; found 0"),
        (lambda: [linear(0)], r"at least two students; found 1\. Give more students, or use kirsch.distill"),
        (lambda: [linear(0)] * 2, "Students 0 and 1 are the same object"),
        (
            lambda: [linear(1), linear(0), linear(0)],
            r"Students 1 and 2 have the same initial weights\. .*a different seed",
        ),
        (
            with_a_shared_parameter,
            r"Students 0 and 1 share a parameter: `0\.weight` of the first is `1\.weight` of the second",
        ),
    ],
)
def test_students_that_cannot_learn_from_each_other_are_refused(students, sentence):
    with pytest.raises(UsageError, match=sentence):
        distill_mutually(students(), one_batch())


@pytest.mark.parametrize(
    ("terms", "count", "sentence"),
    [
        ((), 2, "The objective has no terms"),
        (
            (Term("l2-normalized", student_layer="0"),),
            2,
            "The term 'l2-normalized' compares '0' with '0'.*compares the logits of the students",
        ),
        (
            (Term("ofa", student_layer="auto", teacher_layer="logits", adapter="ofa"),),
            2,
            "The term 'ofa' compares 'auto'",
        ),
        ((Term("kd", adapter="linear"),), 2, "The term 'kd' has the adapter 'linear'.*Leave out `adapter`"),
        ((Term("kd", teacher=0),), 2, "The term 'kd' has teacher=0, and mutual learning has no teachers"),
        ((Term("fitnet"),), 3, "'fitnet' cannot combine the outputs of several peers, and there are 3"),
    ],
)
def test_terms_that_cannot_compare_peers_are_refused(terms, count, sentence):
    with pytest.raises(UsageError, match=sentence):
        distill_mutually([linear(seed) for seed in range(count)], one_batch(), objective=Objective(terms))


def test_different_classes_and_invalid_labels_are_refused_before_training():
    with pytest.raises(ShapeError, match="The student returns 3 classes; the teacher returns 5 classes"):
        distill_mutually([linear(0), linear(1, classes=5)], one_batch())
    inputs, targets = samples(N)
    with pytest.raises(DataError, match="Sample 0 has the label 7"):
        distill_mutually([linear(0), linear(1)], ArrayData(inputs, targets + 7))
