"""Metrics by name, compared with closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from kirsch.errors import DataError, NumericError, UnknownNameError, UsageError
from kirsch.tasks.metrics import METRICS, class_numbers, default_metric, metric_of, r_squared

LOGITS = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 1.0, 0.0], [5.0, 0.0, 0.0]])
LABELS = np.array([0, 1, 2, 2])


def value(name, outputs, reference, inputs=None, **options):
    metric = metric_of(name, **options)
    return metric.value(*metric.items(np.asarray(outputs), np.asarray(reference), inputs).values)


def test_accuracy_is_the_fraction_of_correct_labels_and_ignored_labels_do_not_count():
    assert value("accuracy", LOGITS, LABELS) == 2 / 4
    assert value("accuracy", LOGITS, [0, 1, 2, -100]) == pytest.approx(2 / 3)
    assert value("balanced_accuracy", LOGITS, LABELS) == pytest.approx((1 + 1 + 0) / 3)


def test_class_weights_weight_the_recalls_of_the_classes():
    """The recalls of the classes 0, 1 and 2 are 1, 1 and 0."""
    assert value("accuracy", LOGITS, LABELS, class_weights={2: 2.0}) == pytest.approx(2 / 4)
    assert value("accuracy", LOGITS, LABELS, class_weights={"0": 6, 1: 0}) == pytest.approx(6 / 7)
    with pytest.raises(DataError, match="Every class among the labels has the weight 0"):
        value("accuracy", LOGITS, LABELS, class_weights={0: 0, 1: 0, 2: 0})


def test_log_likelihood_is_minus_the_cross_entropy_also_for_probabilities():
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    expected = np.log(p[np.arange(4), LABELS]).mean()
    assert value("log_likelihood", LOGITS, LABELS) == pytest.approx(expected)
    assert value("log_likelihood", p, LABELS) == pytest.approx(expected)


def test_the_logits_of_a_position_belong_to_the_next_token():
    tokens = np.array([[0, 2, 1, 1]])
    logits = 2 * np.eye(3)[[[2, 1, 0, 0]]]  # predicts 2, 1, 0 for the tokens at the positions 1, 2 and 3
    assert value("next_token_accuracy", logits, tokens) == pytest.approx(2 / 3)
    mask = {"attention_mask": np.array([[1, 1, 1, 0]])}
    assert value("next_token_accuracy", logits, tokens, mask) == 1
    right, wrong = 2 - np.log(np.e**2 + 2), -np.log(np.e**2 + 2)
    assert value("next_token_log_likelihood", logits, tokens) == pytest.approx((2 * right + wrong) / 3)


def test_binary_accuracy_counts_the_signs_and_refuses_probabilities():
    assert value("binary_accuracy", [[1.0, -1.0], [2.0, 3.0]], [[1, 0], [0, -100]]) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="All outputs are between 0 and 1"):
        value("binary_accuracy", np.full((20, 2), 0.7), np.ones((20, 2), int))


def test_r2_is_1_for_the_targets_and_0_for_their_mean():
    targets = np.array([1.0, 2.0, 6.0])
    assert value("r2", targets[:, None], targets) == 1
    assert value("r2", np.full((3, 1), 3.0), targets) == 0
    assert value("output_r2", targets[:, None] + 1, targets[:, None]) == pytest.approx(1 - 3 / 14)
    assert r_squared(np.zeros((2, 1)), np.ones((2, 1))) is None
    with pytest.raises(DataError, match="R² is not defined"):
        value("r2", np.zeros((2, 1)), np.ones(2))


def test_agreement_and_divergence_compare_with_the_outputs_of_the_original():
    other = np.array([[2.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    assert value("agreement", other, LOGITS) == 2 / 4
    assert value("kl", LOGITS, LOGITS) == 0
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (LOGITS, other))
    assert value("kl", other, LOGITS) == pytest.approx(-(p * np.log(p / q)).sum(1).mean())


def test_a_class_that_the_original_excludes_does_not_count_in_the_divergence():
    excluded = np.array([[0.0, 1.0, -np.inf]])
    assert value("kl", excluded, excluded) == 0
    assert np.isfinite(value("kl", [[0.0, 1.0, 2.0]], excluded))


def test_each_item_has_the_number_of_its_sample():
    outputs, labels = np.zeros((3, 2, 4)), np.array([[0, -100], [-100, -100], [1, 2]])
    assert METRICS["accuracy"].items(outputs, labels, None).sample.tolist() == [0, 2, 2]
    assert METRICS["kl"].items(outputs, outputs, None).sample.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("outputs", "labels", "inputs", "name"),
    [
        (LOGITS, LABELS, None, "accuracy"),
        (np.zeros((2, 5, 3)), np.zeros((2, 5), int), {"input_ids": np.ones((2, 5), int)}, "accuracy"),
        (np.zeros((2, 5, 3)), np.ones((2, 5), int), {"input_ids": np.ones((2, 5), int)}, "next_token_accuracy"),
        (np.zeros((2, 3, 4, 4)), np.zeros((2, 4, 4), int), None, "accuracy"),
        (np.zeros((2, 3)), np.zeros((2, 3), int), None, "binary_accuracy"),
        (np.zeros((2, 1)), np.zeros(2, int), None, "binary_accuracy"),
        (np.zeros((2, 3)), np.zeros((2, 3)), None, "r2"),
        (LOGITS, None, None, "kl"),
        (np.zeros((4, 1)), None, None, "output_r2"),
    ],
)
def test_the_default_metric_fits_the_labels(outputs, labels, inputs, name):
    assert default_metric(outputs, labels, inputs) == name


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"one class number for each prediction, integers of shape \(4,\)"):
        value("accuracy", LOGITS, LABELS.astype(float))
    with pytest.raises(DataError, match=r"A label is 3. The model has the classes 0 to 2"):
        value("accuracy", LOGITS, [0, 1, 2, 3])
    with pytest.raises(DataError, match=r"shape \(4,\); the outputs have shape \(4, 3\)"):
        value("r2", LOGITS, LABELS)


def test_a_metric_may_be_a_function_of_outputs_and_labels():
    assert value(lambda outputs, labels: -np.abs(outputs[:, 0] - labels).mean(), [[1.0], [4.0]], [1.0, 2.0]) == -1
    with pytest.raises(UsageError, match=r"`metric` fails on outputs of shape \(4, 3\).*ZeroDivisionError"):
        value(lambda *_: 1 / 0, LOGITS, LABELS)
    with pytest.raises(UsageError, match="returns a str"):
        value(lambda *_: "good", LOGITS, LABELS)
    with pytest.raises(NumericError, match="returns nan"):
        value(lambda *_: float("nan"), LOGITS, LABELS)


def test_an_unknown_metric_and_unused_class_weights_are_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'accuracy'"):
        metric_of("accurac")
    with pytest.raises(UsageError, match="no effect with the metric 'r2'"):
        metric_of("r2", {0: 2.0})
    with pytest.raises(UsageError, match="names the class 'cat'"):
        metric_of("accuracy", {"cat": 2.0})


def test_names_of_classes_become_numbers():
    assert class_numbers({"cat": 2.0, 0: 1.0, "dog": 3.0}, ("dog", "cat")) == {1: 2.0, 0: 3.0}
    assert class_numbers(None, ("dog",)) is None
