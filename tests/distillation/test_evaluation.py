"""Models whose predictions do not depend on the inputs are detected, even if the classes have unequal frequencies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import Dense, TopK, build_store
from kirsch.distillation.term import Term
from kirsch.errors import DataError, NumericError
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.tasks.classification import PredictionSummary

N, D = 100, 4
RARE = np.arange(N) % 33 == 32  # 3 of 100
X = np.random.default_rng(0).standard_normal((N, D))
X[:, 0] = np.where(RARE, 3.0, -1.0)
ONCE = Training(epochs=1, learning_rate=1e-3)


class FromFunction(nn.Module):
    """A model whose logits are a function of the inputs plus a trainable bias."""

    def __init__(self, function, outputs=2):
        super().__init__()
        self.function, self.shift = function, nn.Parameter(torch.zeros(outputs, dtype=torch.float64))

    def forward(self, x):
        return self.function(x) + self.shift


def constant(*logits):
    """Return a function with the same logits for each sample."""
    return lambda x: torch.tensor(logits, dtype=torch.float64).expand(len(x), len(logits))


CONSTANT = FromFunction(constant(3.0, 0.0))
CORRECT = FromFunction(lambda x: torch.stack([-x[:, 0], x[:, 0]], 1))
SENSITIVE = FromFunction(lambda x: torch.stack([-x[:, 0], x[:, 0] + 3 * (x[:, 1] > 1.2)], 1))
"""Predicts all samples of the rare class correctly, with lower accuracy than a constant prediction."""


def events_of(teacher, data, objective=None, **options):
    """Return the events of a run with this teacher."""
    events = []
    hooks = TrainingHooks(event=events.append)
    outputs = 1 if not isinstance(teacher, FromFunction) else len(teacher.shift)
    student = FromFunction(lambda x: x[:, :outputs], outputs)
    distill(student, teacher, data, objective=objective, training=ONCE, hooks=hooks, **options)
    return events


def warnings_of(events):
    return [event["text"] for event in events if event["event"] == "warning"]


# ------------------------------------------------------------------------------------------------ classes


def test_a_teacher_that_always_predicts_the_most_frequent_class_is_refused_even_if_97_percent_are_correct():
    sentence = (
        r"no better than chance: 97\.0% of 100 samples are correct, chance is 97\.0% \(the most frequent class has "
        r"97\.0%\); balanced accuracy 50\.0%\. It predicts class 0 for every sample"
    )
    labels = RARE.astype(int)
    loader = [(X[at : at + 20], labels[at : at + 20]) for at in range(0, N, 20)]
    for data, options in ((ArrayData(X, labels), {}), (loader, {}), (ArrayData(X, None), {"validation": (X, labels)})):
        with pytest.raises(NumericError, match=sentence):
            events_of(CONSTANT, data, **options)
    events_of(CONSTANT, ArrayData(X, labels), check_teacher=False)


def test_the_error_names_the_teacher_of_several_that_is_no_better_than_chance():
    data = ArrayData(X, RARE.astype(int))
    student = FromFunction(lambda x: x[:, :2])
    with pytest.raises(NumericError, match=r"Teacher 1 \(of 2, counted from 0\) is no better than chance"):
        distill(student, [CORRECT, CONSTANT], data, training=ONCE)


@pytest.mark.parametrize("of_validation", [False, True])
def test_batches_are_read_until_the_teacher_is_better_than_chance(of_validation):
    labels = np.arange(1024) % 2
    inputs = np.where(np.arange(1024) < 64, labels, 1 - labels)[:, None].astype(float)  # wrong on the first 64 samples
    loader = [(inputs[start : start + 32], labels[start : start + 32]) for start in range(0, 1024, 32)]
    teacher = FromFunction(lambda x: torch.cat([3 * x, 3 - 3 * x], 1))
    data, options = (ArrayData(inputs, None), {"validation": loader}) if of_validation else (loader, {})
    student = FromFunction(lambda x: torch.cat([x, 0 * x], 1))
    events = []
    distill(student, teacher, data, training=ONCE, hooks=TrainingHooks(event=events.append), **options)
    assert events[0]["event"] == "teacher"
    assert 0.5 < events[0]["accuracy"] < 0.8  # of fewer than 1,024 samples, on which it is 0.94
    assert not [text for text in warnings_of(events) if "better than chance" in text]


@pytest.mark.parametrize("keep", [Dense(), TopK(1)])
def test_a_store_of_constant_predictions_is_refused(tmp_path, keep):
    data = ArrayData(X, RARE.astype(int))
    store = build_store(tmp_path / "store", CONSTANT, data, keep=keep)
    objective = Objective((Term("kd", 0.9, temperature=1.0),), label_weight=0.1)
    with pytest.raises(NumericError, match="It predicts class 0 for every sample"):
        distill(FromFunction(lambda x: x[:, :2]), store, data, objective=objective, training=ONCE)


def test_the_event_of_a_teacher_has_the_balanced_accuracy_if_classes_have_unequal_frequencies():
    (event,) = (event for event in events_of(CORRECT, ArrayData(X, RARE.astype(int))) if event["event"] == "teacher")
    assert event == {"event": "teacher", "accuracy": 1.0, "classes": 2, "balanced_accuracy": 1.0, "majority": 0.97}


def test_a_teacher_less_accurate_than_a_constant_prediction_with_high_balanced_accuracy_is_accepted():
    events = events_of(SENSITIVE, ArrayData(X, RARE.astype(int)))
    (event,) = (event for event in events if event["event"] == "teacher")
    assert event["accuracy"] < event["majority"]
    assert event["balanced_accuracy"] > 0.9


def test_a_constant_prediction_on_few_samples_or_one_class_gives_a_warning():
    labels = RARE.astype(int)
    few = slice(20, 45)  # 25 samples, one of them of the rare class
    sentences = warnings_of(events_of(CONSTANT, ArrayData(X[few], labels[few])))
    assert any(
        "It predicts class 0 for every sample. Give more labeled samples, of all classes" in s for s in sentences
    )
    same = warnings_of(events_of(CONSTANT, ArrayData(X, np.zeros(N, int))))
    assert any("It predicts class 0 for every sample" in sentence for sentence in same)


def test_a_loader_is_read_until_there_are_samples_of_a_second_class():
    """The samples are sorted by class, so that the first 97 are of one class."""
    labels = np.sort(RARE.astype(int))
    inputs = np.where(labels[:, None] == 1, 3.0, -1.0) * np.ones((N, D))
    loader = [(inputs[at : at + 20], labels[at : at + 20]) for at in range(0, N, 20)]
    (event,) = (event for event in events_of(CORRECT, loader) if event["event"] == "teacher")
    assert event["balanced_accuracy"] == 1.0


def test_a_teacher_of_many_classes_with_low_accuracy_above_chance_is_accepted():
    """2 of 40 predictions are correct; a random prediction of 200 classes would give 0.2."""
    labels = np.arange(40)

    def logits(x):
        found = torch.zeros(len(x), 200, dtype=torch.float64)
        found[torch.arange(len(x)), torch.as_tensor(np.where(np.arange(len(x)) < 2, np.arange(len(x)), 100))] = 5.0
        return found

    student = FromFunction(lambda x: x[:, :1] * torch.ones(200, dtype=torch.float64), 200)
    events = []
    inputs = np.random.default_rng(0).standard_normal((40, D))
    batches = [(inputs, labels)]  # in order, because the predictions depend on the position in the batch
    hooks = TrainingHooks(event=events.append)
    distill(student, FromFunction(logits, 200), batches, training=ONCE, hooks=hooks)
    assert events[0]["event"] == "teacher"
    assert events[0]["accuracy"] == pytest.approx(2 / 40)
    assert not [text for text in warnings_of(events) if "better than chance" in text]


def test_a_teacher_that_predicts_background_for_every_pixel_is_refused():
    random = np.random.default_rng(0)
    masks = (random.random((8, 6, 6)) < 0.1).astype(int)
    masks[0, 0] = -100  # pixels without a label
    images = random.standard_normal((8, 1, 6, 6))

    def background(x):
        return torch.tensor([2.0, 0.0], dtype=torch.float64)[None, :, None, None].expand(len(x), 2, 6, 6)

    class Dense(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function, self.scale = function, nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return self.function(x) * self.scale

    student = nn.Conv2d(1, 2, 1).double()
    with pytest.raises(NumericError, match=r"of 282 samples are correct.* It predicts class 0 for every sample"):
        distill(nn.Sequential(student), Dense(background), ArrayData(images, masks), objective=Objective.preset("cwd"))


# ------------------------------------------------------------------------------------------------ binary and regression

BINARY = Objective((Term("binary-kd", 0.5),), label_weight=0.5, label_loss="binary")
RARELY = np.random.default_rng(1).random((N, 3)) < np.array([0.1, 0.2, 0.05])


def test_a_teacher_with_constant_negative_logits_is_refused():
    no = FromFunction(constant(-2.0, -1.0, -3.0), 3)
    with pytest.raises(NumericError, match=r"binary labels are predicted correctly, chance .* It predicts 0"):
        events_of(no, ArrayData(X, RARELY.astype(float)), BINARY)
    rare = FromFunction(constant(-2.0), 1)
    with pytest.raises(NumericError, match=r"97\.0% of 100 binary labels .* chance is 97\.0%"):
        events_of(rare, ArrayData(X, RARE[:, None].astype(float)), BINARY)


def test_a_teacher_with_negative_logits_that_depend_on_the_inputs_gives_a_warning():
    """Such a teacher is useful: logits of rare labels often rank the samples correctly although they never exceed 0."""
    differs = FromFunction(lambda x: torch.from_numpy(RARELY.astype(float))[: len(x)] - 4.0, 3)
    events = events_of(differs, ArrayData(X, RARELY.astype(float)), BINARY)
    assert any("It predicts 0 for every sample" in sentence for sentence in warnings_of(events))


def test_the_event_of_a_multi_label_teacher_has_its_accuracy():
    teacher = FromFunction(lambda x: 4.0 * torch.from_numpy(RARELY.astype(float))[: len(x)] - 2.0, 3)
    events = events_of(teacher, ArrayData(X, np.where(RARE[:, None], -100.0, RARELY)), BINARY)
    assert events[0]["accuracy"] == 1.0
    assert not [s for s in warnings_of(events) if "teacher" in s]


NUMBERS = Objective((Term("logit-l2", 0.5),), label_weight=0.5, label_loss="squared-error")


def test_a_regression_teacher_that_predicts_the_mean_is_refused_and_the_event_has_r_squared():
    targets = 2 * X[:, :1] + 5
    mean = FromFunction(lambda x: torch.full((len(x), 1), float(targets.mean()), dtype=torch.float64), 1)
    for teacher in (mean, FromFunction(lambda x: -x[:, :1], 1)):
        with pytest.raises(NumericError, match=r"The teacher is no better than the mean of the targets: its R² is"):
            events_of(teacher, ArrayData(X, targets), NUMBERS)
    events = events_of(FromFunction(lambda x: 2 * x[:, :1] + 5, 1), ArrayData(X, targets[:, 0]), NUMBERS)
    assert events[0] == {"event": "teacher", "r2": 1.0}


# ------------------------------------------------------------------------------------------------ students


def test_a_trained_model_that_predicts_one_class_gives_a_warning():
    labels = RARE.astype(int)
    data, events = ArrayData(X[:, 1:], labels), []
    hooks = TrainingHooks(event=events.append)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D - 1, 2)).double()
    found = fit(model, data, training=Training(epochs=3, learning_rate=0.5), validation=(X[:, 1:], labels), hooks=hooks)
    assert found.history[-1]["accuracy"] == pytest.approx(0.97)
    assert found.history[-1]["balanced_accuracy"] == pytest.approx(0.5)
    assert any(
        "The trained model predicts class 0 for all 100 samples of the validation" in s for s in warnings_of(events)
    )
    even = np.arange(N) % 2
    found = fit(FromFunction(lambda x: x[:, :2]), ArrayData(X, even), training=ONCE, validation=(X, even), hooks=hooks)
    assert "balanced_accuracy" not in found.history[-1]


def test_validation_has_the_metrics_of_binary_labels_and_of_regression():
    targets = RARELY.astype(float)
    model = FromFunction(lambda x: 4.0 * torch.from_numpy(targets)[: len(x)] - 2.0, 3)
    found = fit(
        model, ArrayData(X, targets), objective=Objective(label_loss="binary"), training=ONCE, validation=(X, targets)
    )
    assert found.history[-1]["accuracy"] == 1.0
    single = FromFunction(lambda x: x[:, :1], 1)  # argmax over one output is always 0
    labels = (X[:, :1] > 0).astype(float)
    found = fit(
        single, ArrayData(X, labels), objective=Objective(label_loss="binary"), training=ONCE, validation=(X, labels)
    )
    assert found.history[-1]["accuracy"] == 1.0
    numbers = Objective(label_loss="squared-error")
    found = fit(single, ArrayData(X, X[:, :1] + 0.1), objective=numbers, training=ONCE, validation=(X, X[:, :1]))
    assert found.history[-1]["r2"] > 0.9


def test_a_validation_with_invalid_targets_is_refused_before_training():
    events = []
    hooks = TrainingHooks(event=events.append)
    labels = np.arange(N) % 2
    for wrong in (labels[:, None] * 1.0, np.full(N, 2), labels + 0.5):
        with pytest.raises(DataError, match=r"of the validation .*does not fit\. .* Or give validation as a callable"):
            fit(CORRECT, ArrayData(X, labels), validation=(X, wrong), training=ONCE, hooks=hooks)
    assert not events


def test_a_validation_with_another_number_of_positions_is_refused():
    model = FromFunction(lambda x: torch.stack([-x, x], 2))  # (N, D, 2)
    labels = np.zeros((N, D), np.int64)
    with pytest.raises(DataError, match=r"targets have shape \(8, 5\), and the predictions have shape \(8, 4\)"):
        fit(model, ArrayData(X, labels), validation=(X, np.zeros((N, D + 1), np.int64)), training=ONCE)


# ------------------------------------------------------------------------------------------------ statistics


def test_the_statistics_of_predictions_equal_their_closed_form():
    """4 of 6 samples of class 0 and 1 of 2 of class 1 are correct; 5 predictions are 0 and 3 are 1."""
    found = PredictionSummary.of(np.array([0, 0, 0, 0, 1, 1, 0, 1]), np.array([0, 0, 0, 0, 0, 0, 1, 1]))
    assert (found.n, found.accuracy, found.classes, found.most_frequent) == (8, 5 / 8, 2, 6)
    assert found.balanced == pytest.approx((4 / 6 + 1 / 2) / 2)
    assert found.chance == pytest.approx(6 / 8 * 5 / 8 + 2 / 8 * 3 / 8)
    assert found.majority == 6 / 8
    assert found.uneven
    assert not found.constant


def test_the_chance_level_of_constant_predictions_is_their_accuracy():
    labels = np.array([0, 0, 0, 1, 2])
    constant = PredictionSummary.of(np.zeros(5, int), labels)
    assert constant.constant
    assert constant.chance == pytest.approx(constant.accuracy)
    assert constant.balanced == pytest.approx(1 / 3)
    even = PredictionSummary.of(np.array([1, 2, 0]), np.array([0, 1, 2]))
    assert even.chance == pytest.approx(1 / 3)
    assert not even.uneven
    assert PredictionSummary.of(np.zeros(0, int), np.zeros(0, int)).n == 0
