"""Whether two sets of scores agree, and when that would prove nothing."""

from __future__ import annotations

import numpy as np
import pytest

from kirsch.errors import DataError, NumericError, ShapeError
from kirsch.measurement.agreement import Agreement, agreement

REFERENCE = np.array([[3.0, 0.0], [0.0, 1.0], [3.0, 2.0], [0.0, 3.0]])


def test_a_set_of_scores_agrees_with_itself():
    assert agreement(REFERENCE, REFERENCE.copy()) == Agreement(same_labels=4, n=4, max_error=0, relative=0, centered=0)


def test_the_differences_in_closed_form():
    """Half of the last score is gone: 1.5 in one place; squares of the reference sum to 9 + 1 + 13 + 9 = 32."""
    found = REFERENCE.copy()
    found[3, 1] = 1.5
    result = agreement(REFERENCE, found)
    assert (result.same_labels, result.max_error) == (4, 1.5)
    assert result.relative == pytest.approx(1.5 / np.sqrt(32), rel=1e-12)
    # Around the means 1.5 and 1.5 the squares sum to 4 · 2.25 + (2.25 + 0.25 + 0.25 + 2.25) = 14; one place in four
    # that is off by d leaves d² · ¾ after the mean is taken away.
    assert result.centered == pytest.approx(1.5 * np.sqrt(0.75) / np.sqrt(14), rel=1e-12)


def test_a_constant_that_hides_drift_is_taken_away_in_centered():
    """A large constant in both makes any difference look small; around the mean it is what it was."""
    other = REFERENCE + np.array([[0.3, 0.0], [0.0, 0.3], [-0.3, 0.0], [0.0, -0.3]])
    plain, hidden = agreement(REFERENCE, other), agreement(REFERENCE + 100, other + 100)
    assert plain.relative > 0.1
    assert hidden.relative < 0.005
    assert hidden.centered == pytest.approx(plain.centered, rel=1e-9)  # 100 + x loses two of fifteen digits


def test_a_shift_by_a_constant_is_seen_by_relative_and_not_by_centered():
    found = agreement(REFERENCE, REFERENCE + 1)
    assert found.centered == pytest.approx(0, abs=1e-15)
    assert found.relative == pytest.approx(np.sqrt(8 / 32), rel=1e-12)


def test_labels_are_counted_by_the_largest_score():
    assert agreement(REFERENCE, REFERENCE[:, ::-1]).same_labels == 0


def test_float32_scores_are_compared_in_float64():
    """16777216 and 16777217 are one number in float32, and the mean of 16777216 and 1 is none of its numbers."""
    reference, found = np.array([[2.0**24], [0.0]], np.float32), np.array([[2.0**24 + 1], [0.0]])
    assert agreement(reference, found).max_error == 1
    narrow = np.array([[2.0**24], [1.0]], np.float32)
    assert agreement(narrow.astype(np.float64), narrow).centered == 0


@pytest.mark.parametrize("constant", [np.zeros((3, 2)), np.full((3, 2), 7.0), np.array([[1.0, 5.0]] * 3)])
def test_a_reference_that_does_not_depend_on_its_samples_is_refused(constant):
    with pytest.raises(DataError, match=r"hardly depend on its inputs\. .* prove nothing\. Compare on a trained model"):
        agreement(constant, constant)


@pytest.mark.parametrize(("varies", "refused"), [(0.9e-6, True), (1.1e-6, False)])
def test_a_millionth_of_the_energy_must_vary(varies, refused):
    """Scores 1 ± s have the energy 1 + s² each, of which s² varies."""
    step = np.sqrt(varies / (1 - varies))
    reference = np.array([[1 - step], [1 + step]])
    if refused:
        with pytest.raises(DataError, match="prove nothing"):
            agreement(reference, reference)
    else:
        assert agreement(reference, reference).max_error == 0


def test_one_sample_is_compared_though_it_cannot_vary():
    assert agreement(np.array([[2.0, 1.0]]), np.array([[2.0, 1.5]])).max_error == 0.5


def test_nothing_is_not_compared_with_nothing():
    with pytest.raises(DataError, match=r"There are no scores to compare\."):
        agreement(np.zeros((0, 2)), np.zeros((0, 2)))


def test_scores_of_different_shapes_are_refused():
    with pytest.raises(ShapeError, match=r"Scores of shape \(4, 2\) cannot be compared with \(4, 3\)\."):
        agreement(REFERENCE, np.zeros((4, 3)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("whose", ["reference", "file"])
def test_scores_without_a_largest_one_agree_with_nothing(wrong, whose):
    """NaN would be the first label of both, and their difference smaller than nothing."""
    broken = REFERENCE.copy()
    broken[1, 0] = wrong
    pair = (broken, REFERENCE) if whose == "reference" else (REFERENCE, broken)
    sentence = rf"The {whose} gives NaN or infinity as scores of 1 of 4 samples, first of sample 1\."
    with pytest.raises(NumericError, match=sentence):
        agreement(*pair)
    with pytest.raises(NumericError, match=sentence.replace(whose, "reference")):
        agreement(broken, broken)


def test_a_score_that_is_suppressed_in_both_is_left_out():
    both = np.c_[REFERENCE, np.full(4, -np.inf)]
    found = both.copy()
    found[3, 1] = 1.5
    assert agreement(both, found) == agreement(REFERENCE, found[:, :2])


def test_a_score_that_is_suppressed_in_one_alone_is_named():
    found = REFERENCE.copy()
    found[2, 1] = -np.inf
    with pytest.raises(NumericError, match=r"The scores of sample 2 are infinite in one of two that should agree\."):
        agreement(REFERENCE, found)
    with pytest.raises(NumericError, match="no largest one"):
        agreement(np.full((2, 2), -np.inf), np.full((2, 2), -np.inf))
