"""`distill` and `fit` refuse unsuitable models, data, targets and terms with an error that names the problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from distillation.examples import samples
from distillation.linear_models import ONE_STEP, D, K, N, linear, one_batch
from kirsch import ops
from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.losses import LOSSES, loss
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import DataError, NumericError, ShapeError, UsageError
from kirsch.frameworks.training import TrainingHooks


def test_a_student_that_is_its_teacher_is_refused(teacher):
    with pytest.raises(UsageError, match=r"same object\. Give the student as a copy: copy\.deepcopy\(teacher\)"):
        distill(teacher, teacher, one_batch())


def test_different_numbers_of_classes_are_refused(student):
    with pytest.raises(ShapeError, match=r"student returns 3 classes; the teacher returns 4 classes\. Soft"):
        distill(student, linear(classes=4), one_batch())


def test_logits_of_different_ranks_are_refused(student):
    per_position = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, K, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"returns 3 classes; the teacher returns logits of shape \(2, 3\) per sample"):
        distill(student, per_position, one_batch())


with_fit_and_distill = pytest.mark.parametrize(
    "train", [fit, lambda model, data: distill(model, linear(), data, check_teacher=False)], ids=["fit", "distill"]
)


@with_fit_and_distill
def test_data_without_batches_is_refused(student, train):
    with pytest.raises(DataError, match=r"The data is empty\. Give at least one batch"):
        train(student, [])


@with_fit_and_distill
def test_data_that_can_be_iterated_once_is_refused(student, train):
    sentence = r"iterated only once\. Each epoch iterates over it again\. Give a list or a DataLoader"
    with pytest.raises(DataError, match=sentence):
        train(student, (samples(N) for _ in range(2)))


@with_fit_and_distill
@pytest.mark.parametrize("label", [K, -1])
def test_a_label_out_of_range_is_refused(student, train, label):
    inputs, targets = samples(N)
    targets[7] = label
    sentence = rf"Sample 7 has the label {label}\. The model returns 3 classes, so labels go from 0 to 2"
    later = [tuple(map(torch.from_numpy, samples(N))), (torch.from_numpy(inputs), torch.from_numpy(targets))]
    for data in (ArrayData(inputs, targets, batch_size=4), [(inputs, targets)], later):
        with pytest.raises(DataError, match=sentence):
            train(student, data)


@with_fit_and_distill
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda y: np.eye(K)[y], r"\(36, 3\) and type float64, values 0 to 1\. .* one-hot: give targets\.argmax\(-1\)"),
        (lambda y: y + 0.5, r"\(36,\) .*values 0\.5 to 2\.5.* regression .* label_loss=\"squared-error\""),
        (lambda y: y[:, None], r"\(36, 1\) and type int64, .* Remove the axis of length 1: targets\[:, 0\]"),
        (lambda y: y.astype(np.float32), r"type float32, .* integers stored as floats: .*targets\.long\(\)"),
        (lambda y: y > 0, r"type bool, .* Give integers: targets\.astype"),
        (lambda y: np.eye(K)[y] * 0.8 + 0.2 / K, "The targets are soft labels.* label_weight=0"),
        (
            lambda y: (y[:, None] >= np.arange(K)).astype(int),
            r"one binary label for each class.* label_loss=\"binary\"",
        ),
        (lambda y: np.where(y, y, np.nan), "and NaN or infinity.* Leave out samples whose target is NaN"),
        (lambda y: y[:, None] + 0.25, r"\(36, 1\) .* label_loss=\"squared-error\""),
    ],
    ids=["one-hot", "halves", "column", "floats", "bool", "soft", "multi-label", "nan", "column of floats"],
)
def test_targets_that_are_not_class_numbers_are_refused_with_a_fix(student, train, change, sentence):
    inputs, targets = samples(N)
    for data in (ArrayData(inputs, change(targets)), [(inputs, change(targets))]):
        with pytest.raises(DataError, match=sentence):
            train(student, data)


def inverted(model):
    """Change the signs of the logits of the model, and return the model."""
    model[0].weight.data.neg_()
    return model


def test_a_teacher_no_better_than_chance_is_refused(student, teacher):
    sentence = r"no better than chance: 0\.0% of 36 samples are correct, chance is 33\.3%"
    with pytest.raises(NumericError, match=sentence) as caught:
        distill(student, inverted(teacher), one_batch())
    assert caught.value.exit_code == 6


def test_a_teacher_that_predicts_one_class_is_no_better_than_chance(student, teacher):
    teacher[0].weight.data.zero_()
    with pytest.raises(NumericError, match=r"33\.3% of 36 samples are correct, chance is 33\.3%"):
        distill(student, teacher, one_batch())


def test_a_teacher_is_evaluated_on_the_validation_data_if_there_is_one(student, teacher):
    inputs, targets = samples(N)
    with pytest.raises(NumericError, match="no better than chance"):
        distill(student, teacher, one_batch(), validation=(inputs, (targets + 1) % K))


@pytest.mark.parametrize("check_teacher", [True, False])
def test_nan_in_the_inputs_is_named_with_and_without_the_check_of_the_teacher(student, teacher, check_teacher):
    inputs, targets = samples(N)
    inputs[3, 0] = np.nan
    with pytest.raises(NumericError, match="The inputs contain NaN"):
        distill(student, teacher, [(inputs, targets)], check_teacher=check_teacher)


def test_nan_in_one_of_several_inputs_is_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, K).double()

        def forward(self, x, y):
            return self.layer(x + y)

    inputs, targets = samples(N)
    broken = inputs.copy()
    broken[3, 0] = np.nan
    for data in ([((inputs, broken), targets)], [({"x": broken, "y": inputs}, targets)]):
        with pytest.raises(NumericError, match="The inputs contain NaN"):
            fit(Two(), data, training=ONE_STEP)


def test_a_plain_function_in_a_term_is_refused_with_the_decorator():
    with pytest.raises(
        UsageError,
        match=r"`loss` of kirsch\.Term is the function .*from kirsch\.distillation\.losses import loss`.*@loss",
    ):
        Term(lambda student, teacher: 0.0)


def test_a_bad_teacher_is_accepted_with_check_teacher_false_or_with_few_samples(student, teacher):
    events = []
    hooks = TrainingHooks(event=events.append)
    distill(student, inverted(teacher), one_batch(), training=ONE_STEP, check_teacher=False, hooks=hooks)
    assert "teacher" not in [event["event"] for event in events]
    distill(student, teacher, ArrayData(*samples(31)), training=ONE_STEP, hooks=hooks)
    assert {"event": "teacher", "accuracy": 0.0, "classes": K} in events
    assert any("0.0% of 31 samples are correct" in event.get("text", "") for event in events)


def test_a_teacher_with_nan_is_refused(student, teacher):
    teacher[0].weight.data[0, 0] = float("nan")
    with pytest.raises(
        NumericError, match=r"The teacher returns outputs that are not finite.*Check the teacher's weights"
    ):
        distill(student, teacher, one_batch())


@pytest.mark.parametrize(
    "formula",
    [
        lambda student, teacher, *, temperature=1.0: ((ops.detach(student) - teacher) ** 2).mean(),
        lambda student, teacher, *, temperature=1.0: (student - student + 1).mean(),
    ],
    ids=["detached", "constant"],
)
def test_a_term_without_gradient_is_refused(student, teacher, formula, monkeypatch):
    monkeypatch.setattr(LOSSES, "_objects", dict(LOSSES._objects))
    loss("flat")(formula)
    sentence = r"No gradient of the loss term 'flat' reaches the model\. Its value on the first batch of the epoch is"
    with pytest.raises(NumericError, match=sentence):
        distill(student, teacher, one_batch(), objective=Objective((Term("flat"),)), training=ONE_STEP)


def test_a_regularizer_of_another_model_is_refused(student):
    other = linear()
    with pytest.raises(NumericError, match="No gradient of the loss term 'function' reaches the model"):
        fit(student, one_batch(), training=ONE_STEP, regularizers=[lambda _model: other[0].weight.abs().sum()])
