"""Probabilities, probabilities times a number, and outputs without a predicted class are recognized."""

from __future__ import annotations

import numpy as np
import pytest

from kirsch.errors import NumericError
from kirsch.measurement.outputs import are_probabilities, are_scaled_probabilities, check_outputs


def rows(count, *values):
    return np.array([values] * count)


@pytest.mark.parametrize("shape", [(1, 2), (5, 2), (2, 3, 2), (2, 1, 3)])
def test_non_negative_rows_with_the_sum_1_are_probabilities(shape):
    outputs = np.full(shape, 1 / shape[-1])
    assert are_probabilities(outputs)
    assert not are_probabilities(outputs * 2)
    outputs[..., 0], outputs[..., 1] = -0.25, 1.25 if shape[-1] == 2 else 1.25 - 1 / 3
    assert not are_probabilities(outputs)


def test_rows_of_which_one_has_another_sum_are_not_probabilities():
    outputs = rows(4, 0.5, 0.5)
    outputs[2] = 0.25
    assert not are_probabilities(outputs)


@pytest.mark.parametrize("outputs", [np.array([0.5, 0.5]), np.ones((5, 1)), np.zeros((0, 2))])
def test_a_vector_or_a_single_class_or_an_empty_array_is_not_probabilities(outputs):
    assert are_probabilities(outputs) is False


@pytest.mark.parametrize(
    ("count", "error", "expected"),
    [(3, 0.9e-5, True), (3, 1.1e-5, False), (4, 4e-3, True), (4, 6e-3, False), (4, -4e-3, True), (4, -6e-3, False)],
)
def test_the_sum_of_four_rows_or_more_has_the_tolerance_of_16_bit_numbers(count, error, expected):
    assert are_probabilities(rows(count, 0.25, 0.75 + error)) is expected


def test_outputs_that_hardly_differ_between_samples_are_not_scaled_probabilities():
    # Logits of an untrained BERT: their sums agree within half a percent, because the logits hardly differ.
    logits = np.array([0.019, 0.063]) + 8e-5 * np.random.default_rng(0).standard_normal((64, 2))
    sums = logits.sum(-1)
    assert (abs(sums / sums.mean() - 1) < 5e-3).all()
    assert not are_scaled_probabilities(logits)
    # Probabilities of an untrained model, which hardly differ either, have equal sums.
    assert are_scaled_probabilities(100 * np.stack([logits[:, 0], 1 - logits[:, 0]], 1))


def test_rows_of_the_same_sum_are_scaled_probabilities():
    outputs = np.array([[30.0, 70.0], [0.0, 100.0], [50.0, 50.0], [99.0, 1.0]])
    assert are_scaled_probabilities(outputs)
    assert are_scaled_probabilities(outputs.reshape(2, 2, 2))
    assert not are_scaled_probabilities(outputs[:3])  # three sums may agree by chance
    assert not are_scaled_probabilities(-outputs)
    assert not are_scaled_probabilities(outputs * [[1], [1], [1], [2]])
    assert not are_scaled_probabilities(np.zeros((4, 2)))


@pytest.mark.parametrize("sample", [[np.nan, 0.0], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_samples_without_a_predicted_class_are_counted_and_the_first_is_named(sample):
    outputs = np.array([[0.0, 1.0], [-np.inf, 1.0], sample, sample])
    with pytest.raises(NumericError, match="The file returns NaN or infinity for 2 of 4 samples, first for sample 2"):
        check_outputs(outputs, "file")
    check_outputs(outputs[:2])  # a logit of -inf excludes one class
