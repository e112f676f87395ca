"""How good a classifier is, against numbers worked out by hand and published ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from kirsch.errors import DataError, NumericError, ShapeError
from kirsch.measurement.quality import (
    Paired,
    Rate,
    accuracy,
    are_probabilities,
    calibration,
    confusion,
    lost_classes,
    paired,
    rate,
)


def scores(predicted, classes=3):
    """Scores whose largest is that of the predicted class."""
    return np.eye(classes, dtype=np.float32)[list(predicted)]


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_wilson_interval_is_the_published_one(hits, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3; four places are printed."""
    assert rate(hits, n) == Rate(hits / n, pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5), n)


@given(st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_is_that_of_scipy(case):
    hits, n = case
    found, other = rate(hits, n), binomtest(hits, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=1e-12)
    assert 0 <= found.low <= found.value + 1e-15  # at the ends both are 0 or 1 up to rounding
    assert found.value - 1e-15 <= found.high <= 1


@pytest.mark.parametrize("n", [1, 10, 359])
def test_without_a_hit_or_a_miss_the_interval_has_a_closed_form(n):
    """z² / (n + z²) with z² = 3.8414588: one sample says very little, and never that all is right."""
    width = 3.841458820694124 / (n + 3.841458820694124)
    assert (rate(0, n).low, rate(0, n).high) == pytest.approx((0, width), abs=1e-15)
    assert (rate(n, n).low, rate(n, n).high) == pytest.approx((1 - width, 1), abs=1e-15)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(DataError, match=r"There are no samples to judge by\. Give at least one\."):
        rate(0, 0)


def test_accuracy_counts_samples_whose_label_has_the_largest_score():
    logits = np.array([[-3.0, -1.0], [2.0, 1.0], [0.0, 5.0], [1e9, -1e9]])
    found = accuracy(logits, np.array([1, 0, 0, 0]))
    assert (found.value, found.n) == (0.75, 4)
    assert found == rate(3, 4)


def test_rows_of_the_confusion_are_true_classes_and_columns_predicted_ones():
    found = confusion(scores([0, 1, 1, 2, 0]), np.array([0, 0, 1, 2, 0]))
    assert found.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_labels_of_a_small_type_do_not_overflow_the_confusion():
    """Cell 100 · 101 + 100 is far beyond what eight bits hold."""
    found = confusion(scores([100], 101), np.array([100], dtype=np.uint8))
    assert found.shape == (101, 101)
    assert found[100, 100] == found.sum() == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=50))
def test_the_diagonal_of_the_confusion_is_the_accuracy(pairs):
    labels, predicted = np.array(pairs).T
    table = confusion(scores(predicted, 4), labels)
    assert table.trace() == pytest.approx(accuracy(scores(predicted, 4), labels).value * len(labels))
    assert table.sum(1).tolist() == np.bincount(labels, minlength=4).tolist()


def test_classes_that_lost_most_come_first_and_absent_ones_are_left_out():
    before = np.array([[4, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 10]])
    after = np.array([[3, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [5, 0, 0, 5]])
    assert lost_classes(before, after, ["cat", "dog", "none", "eel"]) == [
        {"name": "eel", "before": 1.0, "after": 0.5, "n": 10},
        {"name": "cat", "before": 1.0, "after": 0.75, "n": 4},
        {"name": "dog", "before": 0.5, "after": 1.0, "n": 2},
    ]


def two_classifiers(lost, gained, both=3, neither=2):
    """Scores of two classifiers and labels, so that this many samples are lost, gained, right and wrong in both."""
    first = [0] * lost + [1] * gained + [0] * both + [1] * neither
    second = [1] * lost + [0] * gained + [0] * both + [1] * neither
    return scores(first), scores(second), np.zeros(len(first), dtype=int)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 · (1/2)
        (5, 0, 2 / 2**5),
        (0, 6, 2 / 2**6),
        (1, 9, 2 * (1 + 10) / 2**10),
        (9, 1, 2 * (1 + 10) / 2**10),
        (2, 10, 2 * (1 + 12 + 66) / 2**12),
        (7, 7, 1.0),
    ],
)
def test_mcnemars_p_is_twice_the_tail_of_the_fair_coin(lost, gained, p):
    found = paired(*two_classifiers(lost, gained))
    assert found == Paired(lost, gained, lost + gained + 5, pytest.approx(p, rel=1e-12))
    assert found.significant is (p < 0.05)


def test_a_pair_says_what_it_found():
    assert paired(*two_classifiers(1, 0)).text == "1 sample lost, 0 gained of 6; not significant (p = 1)"
    found = paired(*two_classifiers(0, 6))
    assert found.text == "0 samples lost, 6 gained of 11; significant (p = 0.031)"
    assert found.to_dict() == {"text": found.text, "p": found.p, "lost": 0, "gained": 6}


def test_the_calibration_error_in_closed_form():
    """Four samples 90 % sure, three right; two 65 % sure, one right: (4 · 0.15 + 2 · 0.15) / 6."""
    sure = np.array([0.9] * 4 + [0.65] * 2)
    logits = np.log(np.stack([sure, 1 - sure], axis=1))
    found = calibration(logits, np.array([0, 0, 0, 1, 0, 1]))
    assert found["ece"] == pytest.approx(0.15, abs=1e-12)
    assert found["bins"] == [
        {"confidence": pytest.approx(0.65), "accuracy": 0.5, "n": 2},
        {"confidence": pytest.approx(0.9), "accuracy": 0.75, "n": 4},
    ]


def test_errors_of_opposite_sign_within_a_bin_cancel_and_across_bins_do_not():
    """Three right of four, all 75 % sure: no error in one bin of any width; halves would give |1 - ¾| and |½ - ¾|."""
    logits = np.log(np.array([[0.75, 0.25]] * 4))
    assert calibration(logits, np.array([0, 0, 0, 1]))["ece"] == pytest.approx(0, abs=1e-12)
    mixed = np.log(np.array([[0.75, 0.25]] * 2 + [[0.95, 0.05]] * 2))
    assert calibration(mixed, np.array([0, 0, 0, 1]))["ece"] == pytest.approx((2 * 0.25 + 2 * 0.45) / 4, abs=1e-12)
    assert calibration(mixed, np.array([0, 0, 0, 1]), bins=1)["ece"] == pytest.approx(0.85 - 0.75, abs=1e-12)


def test_complete_confidence_falls_into_the_last_bin_and_large_scores_do_not_overflow():
    found = calibration(np.array([[1e4, -1e4], [3e38, 0]], dtype=np.float32), np.array([0, 1]))
    assert found == {"ece": 0.5, "bins": [{"confidence": 1.0, "accuracy": 0.5, "n": 2}]}


def test_a_constant_added_to_all_scores_changes_no_calibration():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(40, 5)), random.integers(0, 5, 40)
    shifted = calibration(logits + 1000, labels)
    assert shifted["ece"] == pytest.approx(calibration(logits, labels)["ece"], abs=1e-9)  # 1000 + x loses three digits


JUDGES = [accuracy, confusion, calibration, lambda logits, labels: paired(logits, logits, labels)]


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(
    ("logits", "labels", "error", "sentence"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), ShapeError, r"Scores of shape \(3, 2\) and labels of shape \(2,\) do not"),
        (np.zeros(3), np.zeros(3, int), ShapeError, r"Scores of shape \(3,\) and labels of shape \(3,\) do not"),
        (np.zeros((0, 2)), np.zeros(0, int), DataError, r"There are no samples to judge by"),
        (np.zeros((3, 2)), np.array([0, 2, 5]), DataError, r"Sample 1 has the label 2\. .* the classes 0 to 1\."),
        (np.zeros((3, 2)), np.array([0, 1, -1]), DataError, r"Sample 2 has the label -1\."),
    ],
)
def test_scores_and_labels_that_do_not_fit_are_refused(judge, logits, labels, error, sentence):
    with pytest.raises(error, match=sentence):
        judge(logits, labels)


def test_both_classifiers_of_a_pair_are_held_to_the_labels():
    with pytest.raises(ShapeError, match=r"Scores of shape \(2, 2\)"):
        paired(np.zeros((3, 2)), np.zeros((2, 2)), np.zeros(3, int))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize(
    "judge",
    [accuracy, confusion, calibration, lambda found, labels: paired(scores([0, 1, 2]), found, labels)],
    ids=["accuracy", "confusion", "calibration", "paired"],
)
def test_scores_without_a_largest_one_are_not_judged(judge, wrong):
    """The largest of NaN is the first NaN for numpy, which would count as an answer."""
    found = scores([0, 1, 2])
    found[1:, 1] = wrong
    with pytest.raises(NumericError, match=r"NaN or infinity as scores of 2 of 3 samples, first of sample 1\."):
        judge(found, np.array([0, 1, 2]))


def test_a_score_of_a_suppressed_class_is_judged():
    found = scores([0, 1, 2])
    found[0, 2] = -np.inf
    labels = np.array([0, 1, 2])
    assert accuracy(found, labels).value == 1
    assert 0 <= calibration(found, labels)["ece"] < 1
    found[0] = -np.inf
    with pytest.raises(NumericError, match="sample 0"):
        accuracy(found, labels)


def test_the_calibration_of_probabilities_is_that_of_their_logits():
    logits = np.random.default_rng(0).standard_normal((40, 3)) * 3
    labels = np.arange(40) % 3
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert calibration(probabilities, labels)["ece"] == pytest.approx(calibration(logits, labels)["ece"], rel=1e-12)
    assert are_probabilities(probabilities)
    assert not are_probabilities(logits)
    assert not are_probabilities(np.ones((5, 1)))  # the only class of a single number
