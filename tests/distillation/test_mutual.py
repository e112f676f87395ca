"""Students that learn from each other take the steps that the formulas say, and lose nothing of a run's quality."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.losses import hard_label, soft_target
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.distillation.schedule import Ramp
from kirsch.distillation.term import Term
from kirsch.errors import DataError, Interrupted, ShapeError, UsageError
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.pruning.regularizers import L1

N, D, K = 24, 6, 3
ONE_STEP = Training(epochs=1, learning_rate=0.1, schedule="constant", weight_decay=0.0)
QUIET = TrainingHooks(event=lambda _event: None)


def samples(n=N):
    random = np.random.default_rng(0)
    targets = np.arange(n) % K
    return np.eye(D)[targets] * 2 + 0.3 * random.standard_normal((n, D)), targets


def whole():
    return ArrayData(*samples(), batch_size=N)


def parts(size=6):
    return ArrayData(*samples(), batch_size=size)


def linear(seed, classes=K):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, classes, bias=False)).double()


def deep(seed, width=5):
    torch.manual_seed(seed)
    layers = nn.Linear(D, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, K)
    return nn.Sequential(*layers).double()


def same(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(mine, other) for mine, other in pairs)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "lskd"])
def test_a_step_is_that_of_a_student_whose_teachers_are_the_peers_as_they_were(name, count):
    """Linear students put out the same in any mode, so that one step is worked out by `distill`."""
    loss = Objective.preset(name)
    objective = Objective(
        tuple(Term(t.loss, 0.5, temperature=2.0, options=t.options) for t in loss.terms), label_weight=0.7
    )
    students = [linear(seed) for seed in range(count)]
    found = distill_mutually(students, whole(), objective=objective, training=ONE_STEP)
    for place, student in enumerate(students):
        others = students[:place] + students[place + 1 :]
        alone = distill(student, others, whole(), objective=objective, training=ONE_STEP, check_teacher=False)
        torch.testing.assert_close(found[place].model[0].weight, alone.model[0].weight, rtol=1e-12, atol=1e-14)
        assert found[place].history[0]["terms"] == pytest.approx(alone.history[0]["terms"], rel=1e-12)
        assert found[place].history[0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-12)
        for shares, wanted in alone.first_batch.items():
            assert found[place].first_batch[shares] == pytest.approx(wanted, rel=1e-5)  # norms are summed in float32


@pytest.mark.parametrize("way", ["logits", "confidence", "sum"])
def test_peers_are_combined_as_teachers_are(way):
    objective = Objective((Term("kd", 0.5, temperature=2.0),), teachers=way)
    students = [linear(seed) for seed in range(3)]
    found = distill_mutually(students, whole(), objective=objective, training=ONE_STEP, hooks=QUIET)[1].model
    others = [students[0], students[2]]
    options = {"objective": objective, "training": ONE_STEP, "hooks": QUIET, "check_teacher": False}
    alone = distill(students[1], others, whole(), **options).model
    torch.testing.assert_close(found[0].weight, alone[0].weight, rtol=1e-12, atol=1e-14)


def test_what_peers_say_together_has_the_gradient_of_the_mean_divergence():
    """So that the default is the paper's for three students and more."""
    students = [linear(seed) for seed in range(3)]
    inputs = torch.from_numpy(samples()[0])
    scores = [student(inputs) for student in students]
    mean = (soft_target(scores[0], scores[1], temperature=1.0) + soft_target(scores[0], scores[2], temperature=1.0)) / 2
    (wanted,) = torch.autograd.grad(mean, [students[0][0].weight])
    objective = Objective((Term("kd", 1.0, temperature=1.0),), label_weight=0.0)
    found = distill_mutually(students, whole(), objective=objective, training=ONE_STEP)[0].model
    torch.testing.assert_close(students[0][0].weight - found[0].weight, 0.19 * wanted, rtol=1e-10, atol=1e-14)


def test_peers_speak_as_they_are_in_training():
    """By the statistics of the batch, and not by the running ones, which are 0 and 1 yet."""

    def normed(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, K)).double()

    one, other = normed(0), normed(1)
    first, second = distill_mutually([one, other], whole(), training=ONE_STEP)
    inputs, targets = (torch.from_numpy(part) for part in samples())
    with torch.no_grad():
        mine, theirs = one.train()(inputs), other.train()(inputs)
    assert first.history[0]["terms"] == pytest.approx(
        {
            "label": float(hard_label(mine, targets)),
            "kd": float(soft_target(mine, theirs, temperature=1.0)),
        },
        rel=1e-9,
    )
    assert second.history[0]["terms"]["kd"] == pytest.approx(
        float(soft_target(theirs, mine, temperature=1.0)), rel=1e-9
    )


def test_students_of_different_architectures_learn_and_are_given_back_in_order():
    students = [linear(0), deep(1), deep(2, width=9)]
    before = copy.deepcopy(students)
    found = distill_mutually(students, parts(), training=Training(epochs=15), validation=samples())
    assert [type(trained.model) for trained in found] == [nn.Sequential] * 3
    assert [len(trained.model) for trained in found] == [1, 5, 5]
    assert not any(module.training for trained in found for module in trained.model.modules())
    assert all(trained.history[-1]["accuracy"] == 1.0 for trained in found)
    assert all(same(now, then) for now, then in zip(students, before, strict=True))
    assert all(student.training for student in students)
    assert not any(p.grad is not None for student in students for p in student.parameters())


def test_each_student_has_its_own_history_and_events_name_it():
    told = []
    students = [linear(0), linear(1)]
    hooks = TrainingHooks(event=told.append)

    def validation(model):
        return {"norm": model[0].weight.norm().item()}

    found = distill_mutually(students, whole(), training=ONE_STEP, hooks=hooks, validation=validation)
    assert [event["event"] for event in told] == ["first_batch", "epoch"]
    assert set(told[1]["terms"]) == {"0.label", "0.kd", "1.label", "1.kd"}
    assert told[1]["1.norm"] == found[1].history[0]["norm"] == pytest.approx(found[1].model[0].weight.norm().item())
    for trained in found:
        (record,) = trained.history
        assert set(record) == {"epoch", "learning_rate", "seconds", "loss", "terms", "gradient_shares", "norm"}
        assert set(record["terms"]) == {"label", "kd"}
        assert sum(record["gradient_shares"].values()) == pytest.approx(1)
        assert sum(trained.first_batch["loss_shares"].values()) == pytest.approx(1)
    assert told[1]["loss"] == pytest.approx(sum(trained.history[0]["loss"] for trained in found))


def test_without_weight_on_the_peers_each_student_learns_as_alone():
    objective = Objective((Term("kd", Ramp(0.0, 1e-9, 5.0), temperature=1.0),))
    training = Training(epochs=1, learning_rate=0.1)
    found = distill_mutually([linear(0), linear(1)], parts(), objective=objective, training=training,
                             hooks=TrainingHooks(event=lambda event: None))  # fmt: skip
    for place in range(2):
        alone = fit(linear(place), parts(), training=training).model
        torch.testing.assert_close(found[place].model[0].weight, alone[0].weight, rtol=1e-6, atol=1e-9)


def test_accumulated_batches_make_the_step_of_one_batch():
    found = [
        distill_mutually(
            [linear(0), linear(1)], parts(size), training=Training(epochs=1, gradient_accumulation_steps=N // size)
        )
        for size in (N, 6)
    ]
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first.model[0].weight, second.model[0].weight, rtol=1e-10, atol=1e-12)


def test_each_student_is_charged_for_its_regularizers():
    """The slope of s Σ|w| is s sign(w)."""
    students = [linear(0), linear(1)]
    plain = distill_mutually(students, whole(), training=ONE_STEP)
    found = distill_mutually(students, whole(), training=ONE_STEP, regularizers=(L1(0.01), L1(0.02)))
    for place, student in enumerate(students):
        assert set(found[place].history[0]["terms"]) == {"label", "kd", "L1", "L1#2"}
        moved = found[place].model[0].weight - plain[place].model[0].weight
        torch.testing.assert_close(moved, -0.19 * 0.03 * student[0].weight.sign(), rtol=1e-9, atol=1e-12)


def test_gradients_are_balanced_within_each_student():
    objective = Objective((Term("kd", 1.0, temperature=4.0),), balance="gradient")
    slow = Training(epochs=4, learning_rate=1e-6)
    for trained in distill_mutually([linear(0), linear(1)], whole(), objective=objective, training=slow):
        for record in trained.history[1:]:
            assert record["gradient_shares"] == pytest.approx({"label": 0.5, "kd": 0.5}, abs=0.01)


def test_it_runs_in_sixteen_bits_with_a_moving_average():
    training = Training(epochs=2, precision="bf16", ema_decay=0.5)
    students = [deep(0).float(), deep(1).float()]
    data = ArrayData(samples()[0].astype(np.float32), samples()[1], batch_size=12)
    found = distill_mutually(students, data, training=training)
    assert np.isfinite([record["loss"] for trained in found for record in trained.history]).all()


def test_samples_without_labels_are_charged_by_the_peers_alone():
    found = distill_mutually([linear(0), linear(1)], ArrayData(samples()[0], None), training=ONE_STEP)
    assert [set(trained.history[0]["terms"]) for trained in found] == [{"kd"}, {"kd"}]


@pytest.mark.parametrize("stop_at", [3, 4, 9])
def test_a_run_that_is_cut_ends_in_the_same_bits(stop_at):
    """Dropout, batch statistics, moving average, balance and accumulation: all that a run carries along."""
    objective = Objective((Term("kd", Ramp(0.1, 1.0, 2), temperature=2.0), Term("dist", 0.5)), balance="gradient")
    training = Training(epochs=3, ema_decay=0.9, gradient_accumulation_steps=2)
    states, asked = [], []

    def run(**hooks):
        hooks = TrainingHooks(event=lambda event: None, **hooks)
        return distill_mutually([deep(0), deep(1), linear(2)], parts(3), objective=objective, training=training,
                                hooks=hooks, validation=samples())  # fmt: skip

    def stop():
        asked.append(1)
        return Interrupted("enough") if len(asked) == stop_at else None

    complete = run()
    with pytest.raises(Interrupted):
        run(save=states.append, stop=stop)
    for wanted, found in zip(complete, run(resume=states[-1]), strict=True):
        assert same(wanted.model, found.model)
        assert found.first_batch == wanted.first_batch
        for mine, other in zip(wanted.history, found.history, strict=True):
            assert {**mine, "seconds": 0} == {**other, "seconds": 0}


def test_terms_that_relate_samples_are_doubted_where_a_step_has_several_batches():
    told = []
    objective = Objective((Term("dist", 1.0),))
    hooks = TrainingHooks(event=told.append)
    distill_mutually([linear(0), linear(1)], parts(), objective=objective, hooks=hooks,
                     training=Training(epochs=1, gradient_accumulation_steps=2))  # fmt: skip
    assert any("relates the samples of a batch" in event.get("text", "") for event in told)


def shared():
    one, other = linear(0), nn.Sequential(nn.Identity(), nn.Linear(D, K, bias=False)).double()
    other[1].weight = one[0].weight
    return [one, other]


@pytest.mark.parametrize(
    ("students", "sentence"),
    [
        (list, "at least two students; there are none"),
        (lambda: [linear(0)], r"at least two students; there is 1\. Give more of them, or a teacher"),
        (lambda: [linear(0)] * 2, "Students 0 and 1 are the same object"),
        (
            lambda: [linear(1), linear(0), linear(0)],
            r"Students 1 and 2 begin with the same weights\. .*a seed of its own",
        ),
        (shared, r"Students 0 and 1 share a parameter: `0\.weight` of the first is `1\.weight` of the second"),
    ],
)
def test_students_that_cannot_teach_each_other_are_refused(students, sentence):
    with pytest.raises(UsageError, match=sentence):
        distill_mutually(students(), whole())


@pytest.mark.parametrize(
    ("terms", "count", "sentence"),
    [
        ((), 2, "The objective has no terms"),
        (
            (Term("l2-normalized", student_layer="0"),),
            2,
            "The term 'l2-normalized' compares '0' with '0'.*by their scores alone",
        ),
        (
            (Term("ofa", student_layer="auto", teacher_layer="logits", adapter="ofa"),),
            2,
            "The term 'ofa' compares 'auto'",
        ),
        ((Term("kd", adapter="linear"),), 2, "The term 'kd' compares 'logits'"),
        ((Term("kd", teacher=0),), 2, "The term 'kd' is of teacher 0; there are peers instead"),
        ((Term("fitnet"),), 3, "'fitnet' compares what several peers cannot say together, and there are 3"),
    ],
)
def test_terms_that_peers_cannot_be_held_against_are_refused(terms, count, sentence):
    with pytest.raises(UsageError, match=sentence):
        distill_mutually([linear(seed) for seed in range(count)], whole(), objective=Objective(terms))


def test_other_classes_and_wrong_labels_are_refused_before_training():
    with pytest.raises(ShapeError, match="The student puts out 3 classes, the teacher 5 classes"):
        distill_mutually([linear(0), linear(1, classes=5)], whole())
    inputs, targets = samples()
    with pytest.raises(DataError, match="Sample 0 has the label 7"):
        distill_mutually([linear(0), linear(1)], ArrayData(inputs, targets + 7))
