"""Soft targets of binary outputs, and the bounded loss of regressions."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from distillation.golden import y, z_s, z_t
from kirsch.distillation.losses import LOSSES, soft_target
from kirsch.errors import ShapeError, UsageError

N, K = z_s.shape


def test_binary_kd_equals_kd_of_two_classes_of_which_one_has_the_logit_0(framework):
    first, second = (logits[:, :1] for logits in (z_s, z_t))
    expected = soft_target(*(np.concatenate([0 * part, part], -1) for part in (first, second)), temperature=3.0)
    for sides in ((first, second), (first[:, 0], second[:, 0])):
        value = LOSSES["binary-kd"](*(framework(side.copy()) for side in sides), temperature=3.0)
        assert float(value) == pytest.approx(float(expected), rel=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_of_binary_soft_targets_is_temperature_times_the_difference_of_the_probabilities(temperature):
    """The student has logits of exactly 0, like a head initialized to zero."""
    student = torch.zeros(N, K, dtype=torch.float64, requires_grad=True)
    LOSSES["binary-kd"](student, torch.from_numpy(z_t), temperature=temperature).backward()
    expected = temperature * (0.5 - torch.sigmoid(torch.from_numpy(z_t) / temperature)) / N
    np.testing.assert_allclose(student.grad, expected, rtol=1e-12, atol=1e-16)


def test_bounded_regression_uses_only_samples_whose_error_is_above_that_of_the_teacher(framework):
    """Squared errors: student 4, 1 and 1; teacher 1, 4 and 1.5."""
    student, teacher = np.array([[2.0], [1.0], [1.0]]), np.array([[1.0], [2.0], [1.5**0.5]])
    loss = functools.partial(
        LOSSES["bounded-regression"], framework(student), framework(teacher), labels=framework(np.zeros((3, 1)))
    )
    assert float(loss()) == pytest.approx(4 / 3)
    assert float(loss(margin=1.0)) == pytest.approx((4 + 1) / 3)  # 1 + the margin is above 1.5, not above 4


def test_bounded_regression_refuses_an_invalid_margin_and_labels_of_another_shape():
    with pytest.raises(UsageError, match=r"The margin is -1; a number of at least 0"):
        LOSSES["bounded-regression"](z_s, z_t, labels=z_s, margin=-1)
    with pytest.raises(ShapeError, match=r"The labels have shape \(8,\); the values have shape \(8, 10\)"):
        LOSSES["bounded-regression"](z_s, z_t, labels=y)
