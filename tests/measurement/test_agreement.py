"""Agreement of two sets of outputs."""

from __future__ import annotations

import numpy as np
import pytest

from kirsch.errors import DataError, NumericError, ShapeError
from kirsch.measurement.agreement import Agreement, agreement

REFERENCE = np.array([[3.0, 0.0], [0.0, 1.0], [3.0, 2.0], [0.0, 3.0]])


def test_outputs_agree_with_themselves():
    assert agreement(REFERENCE, REFERENCE.copy()) == Agreement(same_labels=4, n=4, max_error=0, relative=0, centered=0)


def test_the_differences_equal_their_closed_form():
    """One output differs by 1.5; the squares of the reference sum to 9 + 1 + 13 + 9 = 32."""
    outputs = REFERENCE.copy()
    outputs[3, 1] = 1.5
    result = agreement(REFERENCE, outputs)
    assert (result.same_labels, result.max_error) == (4, 1.5)
    assert result.relative == pytest.approx(1.5 / np.sqrt(32), rel=1e-12)
    # Around the means 1.5 and 1.5 the squares sum to 4 · 2.25 + (2.25 + 0.25 + 0.25 + 2.25) = 14. A difference d in one
    # of four samples has the squared norm d² · ¾ after subtracting its mean.
    assert result.centered == pytest.approx(1.5 * np.sqrt(0.75) / np.sqrt(14), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_relative_differences_do_not_depend_on_the_scale(scale):
    other = REFERENCE + np.array([[0.3, 0.0], [0.0, 0.3], [-0.3, 0.0], [0.0, -0.3]])
    plain, scaled = agreement(REFERENCE, other), agreement(scale * REFERENCE, scale * other)
    assert (scaled.relative, scaled.centered) == pytest.approx((plain.relative, plain.centered), rel=1e-12)


def test_the_centered_difference_does_not_depend_on_a_constant_added_to_both_sets():
    """A large constant in both sets makes the relative difference small."""
    other = REFERENCE + np.array([[0.3, 0.0], [0.0, 0.3], [-0.3, 0.0], [0.0, -0.3]])
    plain, shifted = agreement(REFERENCE, other), agreement(REFERENCE + 100, other + 100)
    assert plain.relative > 0.1
    assert shifted.relative < 0.005
    assert shifted.centered == pytest.approx(plain.centered, rel=1e-9)  # 100 + x loses two of fifteen digits


def test_a_constant_shift_changes_the_relative_and_not_the_centered_difference():
    result = agreement(REFERENCE, REFERENCE + 1)
    assert result.centered == pytest.approx(0, abs=1e-15)
    assert result.relative == pytest.approx(np.sqrt(8 / 32), rel=1e-12)


def test_labels_are_the_classes_with_the_largest_output():
    assert agreement(REFERENCE, REFERENCE[:, ::-1]).same_labels == 0


def test_float32_outputs_are_compared_in_float64():
    """16777216 and 16777217 are equal in float32, and the mean of 16777216 and 1 is not representable."""
    reference, outputs = np.array([[2.0**24], [0.0]], np.float32), np.array([[2.0**24 + 1], [0.0]])
    assert agreement(reference, outputs).max_error == 1
    narrow = np.array([[2.0**24], [1.0]], np.float32)
    assert agreement(narrow.astype(np.float64), narrow).centered == 0


@pytest.mark.parametrize("constant", [np.zeros((3, 2)), np.full((3, 2), 7.0), np.array([[1.0, 5.0]] * 3)])
def test_a_reference_that_is_constant_over_the_samples_raises(constant):
    with pytest.raises(DataError, match=r"hardly depend on its inputs\. .* seem to agree\. Compare a trained model"):
        agreement(constant, constant)


@pytest.mark.parametrize(("variation", "raises"), [(0.9e-6, True), (1.1e-6, False)])
def test_outputs_whose_variance_is_below_a_millionth_of_their_square_are_refused(variation, raises):
    """The outputs 1 ± s have the mean square 1 + s² and the variance s²."""
    step = np.sqrt(variation / (1 - variation))
    reference = np.array([[1 - step], [1 + step]])
    if raises:
        with pytest.raises(DataError, match="seem to agree"):
            agreement(reference, reference)
    else:
        assert agreement(reference, reference).max_error == 0


def test_a_single_sample_can_be_compared_although_it_cannot_vary():
    assert agreement(np.array([[2.0, 1.0]]), np.array([[2.0, 1.5]])).max_error == 0.5


def test_comparing_no_samples_raises():
    with pytest.raises(DataError, match=r"There are no outputs to compare\."):
        agreement(np.zeros((0, 2)), np.zeros((0, 2)))


def test_outputs_of_different_shapes_raise():
    with pytest.raises(ShapeError, match=r"shape \(4, 3\) cannot be compared with a reference of \(4, 2\)\."):
        agreement(REFERENCE, np.zeros((4, 3)))


@pytest.mark.parametrize("invalid", [np.nan, np.inf])
@pytest.mark.parametrize("source", ["reference", "file"])
def test_nan_or_infinity_in_either_set_of_outputs_raises(invalid, source):
    """argmax returns the index of a NaN, so NaN would count as the same predicted class."""
    outputs = REFERENCE.copy()
    outputs[1, 0] = invalid
    pair = (outputs, REFERENCE) if source == "reference" else (REFERENCE, outputs)
    message = rf"The {source} returns NaN or infinity for 1 of 4 samples, first for sample 1\."
    with pytest.raises(NumericError, match=message):
        agreement(*pair)
    with pytest.raises(NumericError, match=message.replace(source, "reference")):
        agreement(outputs, outputs)


def test_an_output_that_is_minus_infinity_in_both_sets_is_left_out():
    reference = np.c_[REFERENCE, np.full(4, -np.inf)]
    outputs = reference.copy()
    outputs[3, 1] = 1.5
    assert agreement(reference, outputs) == agreement(REFERENCE, outputs[:, :2])


def test_an_output_that_is_infinite_in_one_set_only_raises():
    outputs = REFERENCE.copy()
    outputs[2, 1] = -np.inf
    with pytest.raises(NumericError, match=r"An output of sample 2 is infinite in only one of reference and file\."):
        agreement(REFERENCE, outputs)
    with pytest.raises(NumericError, match="undefined"):
        agreement(np.full((2, 2), -np.inf), np.full((2, 2), -np.inf))
