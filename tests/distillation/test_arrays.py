"""Array operations that are the same in numpy and PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kirsch.distillation.arrays import (
    as_numpy,
    blank,
    constant,
    log_sigmoid,
    log_softmax,
    namespace,
    pick,
    same_shape,
    weighted_mean,
)
from kirsch.errors import DataError, ShapeError, UsageError

FRAMEWORKS = [np.array, lambda values: torch.from_numpy(np.array(values))]


@pytest.mark.parametrize("array", FRAMEWORKS)
def test_log_softmax_in_closed_form(array):
    scores = array([[0.0, math.log(3.0)], [5.0, 5.0]])
    np.testing.assert_allclose(log_softmax(scores), np.log([[0.25, 0.75], [0.5, 0.5]]), rtol=1e-15)


@pytest.mark.parametrize("array", FRAMEWORKS)
def test_log_softmax_of_huge_scores_is_their_distance(array):
    np.testing.assert_array_equal(log_softmax(array([[1e4, -1e4], [-1e4, -1e4 - 700]])), [[0, -2e4], [0, -700]])


def test_the_gradient_of_log_softmax_goes_through_the_whole_formula():
    """Shifting by the largest score is held constant; that must not show in the gradient."""
    scores = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    log_softmax(scores)[0, 0].backward()
    softmax = np.exp(scores.detach().numpy()) / np.exp(scores.detach().numpy()).sum()
    np.testing.assert_allclose(scores.grad, np.array([[1.0, 0, 0]]) - softmax, atol=1e-15)


@pytest.mark.parametrize("array", FRAMEWORKS)
def test_pick_takes_one_column_of_each_row(array):
    rows = array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    np.testing.assert_array_equal(pick(rows, array([2, 0])), [3, 4])


def test_pick_takes_whole_numbers_of_any_width():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert pick(rows, torch.tensor([1, 0], dtype=dtype)).tolist() == [2, 3]


def test_a_constant_takes_no_gradient_and_an_array_stays_itself():
    scores = torch.ones(2, requires_grad=True)
    (constant(scores) * scores).sum().backward()
    assert scores.grad.tolist() == [1, 1]  # 2 · scores if the constant had a way back
    plain = np.ones(2)
    assert constant(plain) is plain


def test_a_list_is_no_array_and_the_sentence_says_so():
    with pytest.raises(UsageError, match=r"A list is no array that losses know\. Give numpy arrays or tensors\."):
        namespace([1.0])


def test_unequal_shapes_are_both_named():
    sentence = r"student's scores have shape \(2, 3\), the teacher's \(2, 4\)\. They must be scores of the same samples"
    with pytest.raises(ShapeError, match=sentence):
        same_shape(np.zeros((2, 3)), torch.zeros(2, 4))


@pytest.mark.parametrize("array", FRAMEWORKS)
def test_log_sigmoid_in_closed_form(array):
    found = log_sigmoid(array([0.0, math.log(3), 1e4, -1e4]))
    np.testing.assert_allclose(found, [-math.log(2), math.log(0.75), 0, -1e4], rtol=1e-15)


def test_the_slope_of_log_sigmoid_is_one_half_at_zero():
    """Where heads that start at zero are: there a formula by |x| has the slope 1."""
    scores = torch.tensor([0.0, math.log(3), -1e4], dtype=torch.float64, requires_grad=True)
    log_sigmoid(scores).sum().backward()
    np.testing.assert_allclose(scores.grad, [0.5, 0.25, 1], rtol=1e-15)


@pytest.mark.parametrize("array", FRAMEWORKS)
def test_a_weighted_mean_in_closed_form(array):
    values, weights = array([[1.0, 5.0, 100.0]]), array([[1.0, 3.0, 2.0]])
    assert float(weighted_mean(values, weights)) == pytest.approx((1 + 15 + 200) / 6, rel=1e-15)
    mask = array([[True, True, False]])
    assert float(weighted_mean(values, weights, mask)) == pytest.approx(4, rel=1e-15)
    assert float(weighted_mean(values, 0.0 * weights)) == 0
    with pytest.raises(DataError, match="All targets are masked"):
        weighted_mean(values, weights, array([[False, False, False]]))


@pytest.mark.parametrize("array", FRAMEWORKS)
def test_a_mask_of_another_shape_covers_nothing(array):
    with pytest.raises(ShapeError, match=r"The mask has shape \(3,\); \(2,\) is needed"):
        blank(array(np.ones((2, 3))), array([True, True, False]))


def test_a_tensor_with_a_gradient_becomes_numpy():
    assert as_numpy(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
    plain = np.ones(2)
    assert as_numpy(plain) is plain
