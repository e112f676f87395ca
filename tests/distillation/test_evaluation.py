"""A teacher, or a student, that does not look at its inputs is recognized, however uneven the labels are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import Dense, TopK, build
from kirsch.distillation.term import Term
from kirsch.errors import DataError, NumericError
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.tasks.classification import Answers

N, D = 100, 4
RARE = np.arange(N) % 33 == 32  # 3 of 100
X = np.random.default_rng(0).standard_normal((N, D))
X[:, 0] = np.where(RARE, 3.0, -1.0)
ONCE = Training(epochs=1, learning_rate=1e-3)


class Says(nn.Module):
    """Logits by a function of the inputs; a weight that training may change."""

    def __init__(self, function, outputs=2):
        super().__init__()
        self.function, self.shift = function, nn.Parameter(torch.zeros(outputs, dtype=torch.float64))

    def forward(self, x):
        return self.function(x) + self.shift


def rows(*logits):
    """The same logits for each sample."""
    return lambda x: torch.tensor(logits, dtype=torch.float64).expand(len(x), len(logits))


ALWAYS_COMMON = Says(rows(3.0, 0.0))
KNOWS = Says(lambda x: torch.stack([-x[:, 0], x[:, 0]], 1))
EAGER = Says(lambda x: torch.stack([-x[:, 0], x[:, 0] + 3 * (x[:, 1] > 1.2)], 1))
"""Finds all of the rare class, at the price of others: less accurate than a constant answer, and more useful."""


def taught(teacher, data, objective=None, **options):
    """The events of a run in which a student learns from this teacher."""
    told = []
    hooks = TrainingHooks(event=told.append)
    outputs = 1 if not isinstance(teacher, Says) else len(teacher.shift)
    student = Says(lambda x: x[:, :outputs], outputs)
    distill(student, teacher, data, objective=objective, training=ONCE, hooks=hooks, **options)
    return told


def warnings_of(told):
    return [event["text"] for event in told if event["event"] == "warning"]


# ------------------------------------------------------------------------------------------------ classes


def test_a_teacher_that_always_answers_the_common_class_is_refused_at_97_percent():
    sentence = (
        r"no better than chance: 97\.0% of 100 samples are correct, chance is 97\.0% \(the most frequent class has "
        r"97\.0%\); balanced accuracy 50\.0%\. It predicts class 0 for every sample"
    )
    labels = RARE.astype(int)
    loader = [(X[at : at + 20], labels[at : at + 20]) for at in range(0, N, 20)]
    for data, options in ((ArrayData(X, labels), {}), (loader, {}), (ArrayData(X, None), {"validation": (X, labels)})):
        with pytest.raises(NumericError, match=sentence):
            taught(ALWAYS_COMMON, data, **options)
    taught(ALWAYS_COMMON, ArrayData(X, labels), check_teacher=False)


@pytest.mark.parametrize("keep", [Dense(), TopK(1)])
def test_a_store_of_a_constant_answer_is_refused(tmp_path, keep):
    data = ArrayData(X, RARE.astype(int))
    store = build(tmp_path / "store", ALWAYS_COMMON, data, keep=keep)
    objective = Objective((Term("kd", 0.9, temperature=1.0),), 0.1)
    with pytest.raises(NumericError, match="It predicts class 0 for every sample"):
        distill(Says(lambda x: x[:, :2]), store, data, objective=objective, training=ONCE)


def test_a_teacher_that_finds_the_rare_class_is_taken_and_its_balanced_accuracy_is_told():
    (event,) = (event for event in taught(KNOWS, ArrayData(X, RARE.astype(int))) if event["event"] == "teacher")
    assert event == {"event": "teacher", "accuracy": 1.0, "classes": 2, "balanced_accuracy": 1.0, "majority": 0.97}


def test_a_teacher_below_the_common_class_that_knows_more_is_taken():
    told = taught(EAGER, ArrayData(X, RARE.astype(int)))
    (event,) = (event for event in told if event["event"] == "teacher")
    assert event["accuracy"] < event["majority"]
    assert event["balanced_accuracy"] > 0.9


def test_a_constant_answer_is_only_warned_of_where_few_samples_speak():
    labels = RARE.astype(int)
    few = slice(20, 45)  # 25 samples, of which one is of the rare class
    sentences = warnings_of(taught(ALWAYS_COMMON, ArrayData(X[few], labels[few])))
    assert any(
        "It predicts class 0 for every sample. Give more labeled samples, of all classes" in s for s in sentences
    )
    same = warnings_of(taught(ALWAYS_COMMON, ArrayData(X, np.zeros(N, int))))
    assert any("It predicts class 0 for every sample" in sentence for sentence in same)


def test_a_loader_is_read_until_a_rare_class_has_been_seen():
    """Sorted by class: the first 32 samples are of one class, and tell nothing."""
    labels = np.sort(RARE.astype(int))
    inputs = np.where(labels[:, None] == 1, 3.0, -1.0) * np.ones((N, D))
    loader = [(inputs[at : at + 20], labels[at : at + 20]) for at in range(0, N, 20)]
    (event,) = (event for event in taught(KNOWS, loader) if event["event"] == "teacher")
    assert event["balanced_accuracy"] == 1.0


def test_a_teacher_of_many_classes_is_not_refused_for_few_hits():
    """2 of 40 different classes are right, which is little, and more than answers by chance."""
    labels = np.arange(40)

    def logits(x):
        found = torch.zeros(len(x), 200, dtype=torch.float64)
        found[torch.arange(len(x)), torch.as_tensor(np.where(np.arange(len(x)) < 2, np.arange(len(x)), 100))] = 5.0
        return found

    student, hooks = (
        Says(lambda x: x[:, :1] * torch.ones(200, dtype=torch.float64), 200),
        TrainingHooks(event=lambda event: None),
    )
    inputs = np.random.default_rng(0).standard_normal((40, D))
    distill(student, Says(logits, 200), ArrayData(inputs, labels), training=ONCE, hooks=hooks)


def test_a_teacher_that_answers_background_for_every_pixel_is_refused():
    random = np.random.default_rng(0)
    masks = (random.random((8, 6, 6)) < 0.1).astype(int)
    masks[0, 0] = -100  # of which nothing is asked
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


# ------------------------------------------------------------------------------------------------ yes or no, numbers

BINARY = Objective((Term("binary-kd", 0.5),), 0.5, label_loss="binary")
RARELY = np.random.default_rng(1).random((N, 3)) < np.array([0.1, 0.2, 0.05])


def test_a_teacher_that_says_no_to_every_label_is_refused_where_it_says_nothing_else():
    no = Says(rows(-2.0, -1.0, -3.0), 3)
    with pytest.raises(NumericError, match=r"binary labels are predicted correctly, chance .* It predicts 0"):
        taught(no, ArrayData(X, RARELY.astype(float)), BINARY)
    rare = Says(rows(-2.0), 1)
    with pytest.raises(NumericError, match=r"97\.0% of 100 binary labels .* chance is 97\.0%"):
        taught(rare, ArrayData(X, RARE[:, None].astype(float)), BINARY)


def test_a_teacher_that_never_says_yes_and_differs_is_warned_of():
    """Its logits order the samples, as those of rare labels often do without ever passing 0."""
    differs = Says(lambda x: torch.from_numpy(RARELY.astype(float))[: len(x)] - 4.0, 3)
    told = taught(differs, ArrayData(X, RARELY.astype(float)), BINARY)
    assert any("It predicts 0 for every sample" in sentence for sentence in warnings_of(told))


def test_a_teacher_of_several_labels_is_told_with_its_accuracy():
    knows = Says(lambda x: 4.0 * torch.from_numpy(RARELY.astype(float))[: len(x)] - 2.0, 3)
    told = taught(knows, ArrayData(X, np.where(RARE[:, None], -100.0, RARELY)), BINARY)
    assert told[0]["accuracy"] == 1.0
    assert not [s for s in warnings_of(told) if "teacher" in s]


NUMBERS = Objective((Term("logit-l2", 0.5),), 0.5, label_loss="squared-error")


def test_a_teacher_that_answers_the_mean_is_refused_and_one_that_knows_is_told_by_its_r_squared():
    targets = 2 * X[:, :1] + 5
    mean = Says(lambda x: torch.full((len(x), 1), float(targets.mean()), dtype=torch.float64), 1)
    for teacher in (mean, Says(lambda x: -x[:, :1], 1)):
        with pytest.raises(NumericError, match=r"The teacher is no better than the mean of the targets: its R² is"):
            taught(teacher, ArrayData(X, targets), NUMBERS)
    told = taught(Says(lambda x: 2 * x[:, :1] + 5, 1), ArrayData(X, targets[:, 0]), NUMBERS)
    assert told[0] == {"event": "teacher", "r2": 1.0}


# ------------------------------------------------------------------------------------------------ students


def test_a_student_that_ends_in_one_answer_is_warned_of():
    labels = RARE.astype(int)
    data, told = ArrayData(X[:, 1:], labels), []
    hooks = TrainingHooks(event=told.append)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D - 1, 2)).double()
    found = fit(model, data, training=Training(epochs=3, learning_rate=0.5), validation=(X[:, 1:], labels), hooks=hooks)
    assert found.history[-1]["accuracy"] == pytest.approx(0.97)
    assert found.history[-1]["balanced_accuracy"] == pytest.approx(0.5)
    assert any(
        "The trained model predicts class 0 for all 100 samples of the validation" in s for s in warnings_of(told)
    )
    even = np.arange(N) % 2
    found = fit(Says(lambda x: x[:, :2]), ArrayData(X, even), training=ONCE, validation=(X, even), hooks=hooks)
    assert "balanced_accuracy" not in found.history[-1]


def test_validation_of_answers_and_of_numbers_has_metrics_of_its_own():
    targets = RARELY.astype(float)
    model = Says(lambda x: 4.0 * torch.from_numpy(targets)[: len(x)] - 2.0, 3)
    found = fit(
        model, ArrayData(X, targets), objective=Objective(label_loss="binary"), training=ONCE, validation=(X, targets)
    )
    assert found.history[-1]["accuracy"] == 1.0
    single = Says(lambda x: x[:, :1], 1)  # of one output the largest is always the first
    labels = (X[:, :1] > 0).astype(float)
    found = fit(
        single, ArrayData(X, labels), objective=Objective(label_loss="binary"), training=ONCE, validation=(X, labels)
    )
    assert found.history[-1]["accuracy"] == 1.0
    numbers = Objective(label_loss="squared-error")
    found = fit(single, ArrayData(X, X[:, :1] + 0.1), objective=numbers, training=ONCE, validation=(X, X[:, :1]))
    assert found.history[-1]["r2"] > 0.9


def test_a_validation_of_another_kind_is_refused_before_training():
    told = []
    hooks = TrainingHooks(event=told.append)
    labels = np.arange(N) % 2
    for wrong in (labels[:, None] * 1.0, np.full(N, 2), labels + 0.5):
        with pytest.raises(DataError, match=r"of the validation does not fit\. .* Or give validation as a callable"):
            fit(KNOWS, ArrayData(X, labels), validation=(X, wrong), training=ONCE, hooks=hooks)
    assert not told


# ------------------------------------------------------------------------------------------------ the numbers


def test_answers_are_counted_in_closed_form():
    """Of 6 of class 0 four are right, of 2 of class 1 one is; answers are 5 times 0 and 3 times 1."""
    found = Answers.of(np.array([0, 0, 0, 0, 1, 1, 0, 1]), np.array([0, 0, 0, 0, 0, 0, 1, 1]))
    assert (found.n, found.accuracy, found.classes, found.most_frequent) == (8, 5 / 8, 2, 6)
    assert found.balanced == pytest.approx((4 / 6 + 1 / 2) / 2)
    assert found.chance == pytest.approx(6 / 8 * 5 / 8 + 2 / 8 * 3 / 8)
    assert found.majority == 6 / 8
    assert found.uneven
    assert not found.constant


def test_the_chance_of_a_constant_answer_is_its_accuracy_and_of_even_classes_that_of_guessing():
    labels = np.array([0, 0, 0, 1, 2])
    constant = Answers.of(np.zeros(5, int), labels)
    assert constant.constant
    assert constant.chance == pytest.approx(constant.accuracy)
    assert constant.balanced == pytest.approx(1 / 3)
    even = Answers.of(np.array([1, 2, 0]), np.array([0, 1, 2]))
    assert even.chance == pytest.approx(1 / 3)
    assert not even.uneven
    assert Answers.of(np.zeros(0, int), np.zeros(0, int)).n == 0
