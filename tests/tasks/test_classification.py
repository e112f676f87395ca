"""Quality of classifiers, compared with closed forms and published values."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_sets import data_set, split
from kirsch.errors import DataError, NumericError, ShapeError
from kirsch.measurement.outputs import are_probabilities
from kirsch.measurement.statistics import Paired, rate
from kirsch.tasks import TASKS, Classification
from kirsch.tasks.classification import (
    PredictionSummary,
    accuracy,
    calibration,
    compare_paired,
    confusion,
    lost_classes,
)
from kirsch.tasks.label_losses import LABEL_LOSSES


def logits_of(predicted, classes=3):
    """Return logits whose largest is that of the predicted class."""
    return np.eye(classes, dtype=np.float32)[list(predicted)]


def test_accuracy_is_the_fraction_of_samples_whose_label_has_the_largest_logit():
    logits = np.array([[-3.0, -1.0], [2.0, 1.0], [0.0, 5.0], [1e9, -1e9]])
    result = accuracy(logits, np.array([1, 0, 0, 0]))
    assert (result.value, result.n) == (0.75, 4)
    assert result == rate(3, 4)


def test_rows_of_the_confusion_matrix_are_true_classes_and_columns_predicted_ones():
    result = confusion(logits_of([0, 1, 1, 2, 0]), np.array([0, 0, 1, 2, 0]))
    assert result.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_labels_of_a_small_integer_type_do_not_overflow_in_the_confusion_matrix():
    """The index into the flattened matrix is 100 · 101 + 100, too large for uint8."""
    result = confusion(logits_of([100], 101), np.array([100], dtype=np.uint8))
    assert result.shape == (101, 101)
    assert result[100, 100] == result.sum() == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=50))
def test_the_trace_of_the_confusion_matrix_is_the_number_of_correct_predictions(pairs):
    labels, predicted = np.array(pairs).T
    table = confusion(logits_of(predicted, 4), labels)
    assert table.trace() == pytest.approx(accuracy(logits_of(predicted, 4), labels).value * len(labels))
    assert table.sum(1).tolist() == np.bincount(labels, minlength=4).tolist()


def test_lost_classes_are_sorted_by_loss_of_accuracy_and_leave_out_classes_without_samples():
    before = np.array([[4, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 10]])
    after = np.array([[3, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [5, 0, 0, 5]])
    assert lost_classes(before, after, ["cat", "dog", "none", "eel"]) == [
        {"name": "eel", "before": 1.0, "after": 0.5, "n": 10},
        {"name": "cat", "before": 1.0, "after": 0.75, "n": 4},
        {"name": "dog", "before": 0.5, "after": 1.0, "n": 2},
    ]


def test_balanced_and_chance_accuracy_equal_their_closed_form():
    """The recall is 2/3 for class 0 and 1 for class 1. Half of the predictions are 0, half are 1."""
    result = PredictionSummary.of(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]))
    assert (result.n, result.classes, result.first, result.most_frequent) == (4, 2, 0, 3)
    assert (result.accuracy, result.balanced, result.chance) == pytest.approx((3 / 4, 5 / 6, 1 / 2))
    assert (result.majority, result.uneven, result.constant) == (0.75, True, False)


def test_the_chance_accuracy_of_constant_predictions_is_their_accuracy():
    result = PredictionSummary.of(np.array([1, 1, 1, 1, 1]), np.array([0, 1, 1, 2, 2]))
    assert result.constant
    assert result.chance == result.accuracy == pytest.approx(0.4)
    assert not result.uneven  # the largest class has 1.2 times the mean number of samples


def test_two_models_are_compared_by_the_samples_that_only_one_predicts_correctly():
    result = compare_paired(logits_of([0, 1, 0, 2]), logits_of([0, 0, 1, 2]), np.array([0, 0, 0, 0]))
    assert result == Paired(1, 1, 4, 1.0)
    assert compare_paired(logits_of([1, 1]), logits_of([0, 1]), np.array([0, 0])) == Paired(0, 1, 2, 1.0)


def test_the_calibration_error_equals_its_closed_form():
    """Four samples with confidence 90 %, three correct; two with 65 %, one correct: (4 · 0.15 + 2 · 0.15) / 6."""
    confidence = np.array([0.9] * 4 + [0.65] * 2)
    logits = np.log(np.stack([confidence, 1 - confidence], axis=1))
    result = calibration(logits, np.array([0, 0, 0, 1, 0, 1]))
    assert result["ece"] == pytest.approx(0.15, abs=1e-12)
    assert result["bins"] == [
        {"confidence": pytest.approx(0.65), "accuracy": 0.5, "n": 2},
        {"confidence": pytest.approx(0.9), "accuracy": 0.75, "n": 4},
    ]


def test_calibration_errors_of_opposite_sign_cancel_within_a_bin_and_not_across_bins():
    """Three of four samples with confidence 75 % are correct, so the error is 0 in a single bin."""
    logits = np.log(np.array([[0.75, 0.25]] * 4))
    assert calibration(logits, np.array([0, 0, 0, 1]))["ece"] == pytest.approx(0, abs=1e-12)
    mixed = np.log(np.array([[0.75, 0.25]] * 2 + [[0.95, 0.05]] * 2))
    assert calibration(mixed, np.array([0, 0, 0, 1]))["ece"] == pytest.approx((2 * 0.25 + 2 * 0.45) / 4, abs=1e-12)
    assert calibration(mixed, np.array([0, 0, 0, 1]), bins=1)["ece"] == pytest.approx(0.85 - 0.75, abs=1e-12)


def test_confidence_1_is_in_the_last_bin_and_large_logits_do_not_overflow():
    result = calibration(np.array([[1e4, -1e4], [3e38, 0]], dtype=np.float32), np.array([0, 1]))
    assert result == {"ece": 0.5, "bins": [{"confidence": 1.0, "accuracy": 0.5, "n": 2}]}


def test_a_constant_added_to_all_logits_does_not_change_the_calibration_error():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(40, 5)), random.integers(0, 5, 40)
    shifted = calibration(logits + 1000, labels)
    assert shifted["ece"] == pytest.approx(calibration(logits, labels)["ece"], abs=1e-9)  # 1000 + x loses three digits


METRICS = [accuracy, confusion, calibration, lambda logits, labels: compare_paired(logits, logits, labels)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("logits", "labels", "error", "sentence"),
    [
        (
            np.zeros((3, 2)),
            np.zeros(2, int),
            ShapeError,
            r"shape \(3, 2\) do not match labels of shape \(2,\)",
        ),
        (np.zeros(3), np.zeros(3, int), ShapeError, r"Logits of shape \(3,\) do not match labels of shape \(3,\)"),
        (np.zeros((0, 2)), np.zeros(0, int), DataError, r"There are no samples to evaluate"),
        (np.zeros((3, 2)), np.array([0, 2, 5]), DataError, r"Sample 1 has the label 2\. .* the classes 0 to 1\."),
        (np.zeros((3, 2)), np.array([0, 1, -1]), DataError, r"Sample 2 has the label -1\."),
    ],
)
def test_logits_and_labels_that_do_not_match_raise(metric, logits, labels, error, sentence):
    with pytest.raises(error, match=sentence):
        metric(logits, labels)


def test_the_logits_of_both_classifiers_of_a_pair_are_checked():
    with pytest.raises(ShapeError, match=r"Logits of shape \(2, 2\)"):
        compare_paired(np.zeros((3, 2)), np.zeros((2, 2)), np.zeros(3, int))


@pytest.mark.parametrize("invalid", [np.nan, np.inf])
@pytest.mark.parametrize(
    "metric",
    [accuracy, confusion, calibration, lambda logits, labels: compare_paired(logits_of([0, 1, 2]), logits, labels)],
    ids=["accuracy", "confusion", "calibration", "paired"],
)
def test_logits_with_nan_or_infinity_raise(metric, invalid):
    """argmax returns the index of a NaN, which would count as a prediction."""
    logits = logits_of([0, 1, 2])
    logits[1:, 1] = invalid
    with pytest.raises(NumericError, match=r"returns NaN or infinity for 2 of 3 samples, first for sample 1\."):
        metric(logits, np.array([0, 1, 2]))


def test_a_logit_of_minus_infinity_is_allowed_if_other_logits_of_the_sample_are_finite():
    logits = logits_of([0, 1, 2])
    logits[0, 2] = -np.inf
    labels = np.array([0, 1, 2])
    assert accuracy(logits, labels).value == 1
    assert 0 <= calibration(logits, labels)["ece"] < 1
    logits[0] = -np.inf
    with pytest.raises(NumericError, match="sample 0"):
        accuracy(logits, labels)


def test_the_calibration_error_of_probabilities_equals_that_of_their_logits():
    logits = np.random.default_rng(0).standard_normal((40, 3)) * 3
    labels = np.arange(40) % 3
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert calibration(probabilities, labels)["ece"] == pytest.approx(calibration(logits, labels)["ece"], rel=1e-12)
    assert are_probabilities(probabilities)
    assert not are_probabilities(logits)
    assert not are_probabilities(np.ones((5, 1)))  # K = 1 is not a distribution over classes


# ------------------------------------------------------------------------------------------------ the task


def test_class_without_training_samples_is_refused():
    with pytest.raises(DataError, match=r"The class 'b' of d has no training sample\."):
        Classification().check_data(data_set(train=split((0, 2, 2))))
    Classification().check_data(data_set(test=split((0, 0))))


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.array([0.0, 1.0, 2.0]), r"type float64, values 0 to 2.* whole numbers: labels\.astype\(numpy\.int64\)"),
        (np.array([0.5, 1.0, 2.0]), 'values 0.5 to 2.* label_loss="squared-error"'),
        (np.eye(3), r"shape \(3, 3\).* one-hot: give labels\.argmax\(-1\)"),
        (np.array([[0], [1], [2]]), r"shape \(3, 1\) .* labels\[:, 0\]"),
        (
            np.array([[0.5], [1.0], [2.0]]),
            r'shape \(3, 1\) .*values 0.5 .* kirsch.distill .*label_loss="squared-error"',
        ),
        (np.array([True, False, True]), "type bool.* Give whole numbers"),
        (np.full((3, 4, 4), 255, np.uint8), r"\(3, 4, 4\) and type uint8, values 255 to 255.* kirsch\.distill with"),
        (
            np.array([0, 1, 3]),
            r"Sample 2 of .* has the label 3\. There are 3 classes, so labels go from 0 to 2\. Leave",
        ),
        (np.array([0, 1, -1]), r"Sample 2 of the \w+ part of d has the label -1\."),
        (np.array([1, 2, 3]), r"has the label 3.* labels go from 0 to 2\. Give labels - 1"),
    ],
)
def test_labels_that_are_not_class_numbers_are_refused_with_a_fix(part, labels, sentence):
    with pytest.raises(DataError, match=rf"of the {part} part of d") as caught:
        Classification().check_data(data_set(**{part: split(labels)}))
    assert re.search(sentence, str(caught.value))


def test_labels_that_are_not_class_numbers_are_refused_without_names_of_classes():
    targets = split(np.zeros((3, 4, 4), np.int64))
    data = data_set(classes=(), train=targets, validation=targets, test=targets)
    with pytest.raises(
        DataError, match=r"shape \(N,\)\. For labels of pixels .*, use kirsch\.distill with ArrayData\."
    ):
        Classification().check_data(data)


def test_the_label_loss_of_the_task_is_a_registered_label_loss():
    assert TASKS["classification"].label_loss in LABEL_LOSSES


def test_outputs_must_be_one_logit_for_each_class():
    Classification().check_outputs(np.zeros((5, 3)), data_set())
    for shape, found in (((5, 4), r"\(4,\)"), ((5, 3, 2), r"\(3, 2\)")):
        with pytest.raises(ShapeError, match=rf"returns logits of shape {found}; the data d has 3 classes"):
            Classification().check_outputs(np.zeros(shape), data_set())


def test_a_model_better_than_chance_has_no_weakness_and_a_model_that_predicts_one_class_has_one():
    task, data = Classification(), data_set(test=split((0, 0, 1, 1, 2, 2)))
    good = task.evaluate(logits_of([0, 0, 1, 1, 2, 0]), data)
    assert (good["accuracy"]["value"], good["chance"], good["one_class"]) == (5 / 6, pytest.approx(1 / 3), False)
    assert task.weakness(good) == ("", "")
    constant = task.evaluate(logits_of([1] * 6), data)
    assert task.weakness(constant) == (
        "33.3% of 6 correct, chance is 33.3%",
        "It predicts one class for every sample.",
    )
    shuffled = task.evaluate(logits_of([1, 2, 2, 0, 0, 1]), data)
    assert task.weakness(shuffled) == ("0.0% of 6 correct, chance is 33.3%", "It is not better than chance.")


def test_the_comparison_of_two_models_counts_samples_by_class():
    data = data_set(test=split((0, 0, 1, 2)))
    result = Classification().compare(logits_of([0, 0, 1, 2]), logits_of([0, 1, 1, 2]), data)
    assert result["before"]["confusion"] == [[2, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert result["after"]["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert result["lost"][0] == {"name": "a", "before": 1.0, "after": 0.5, "n": 2}
    assert result["paired"]["text"] == "1 sample lost, 0 gained of 4; not significant (p = 1)"
