"""Soft targets of binary outputs, and the bounded loss of regressions."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

from distillation.golden import y, z_s, z_t
from kirsch.distillation.distill import distill
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.losses import LOSSES, soft_target
from kirsch.distillation.mutual import distill_mutually
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import ShapeError, UsageError
from kirsch.frameworks.training import Training

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


SOFTMAX = Objective.preset("kd", label_loss="binary", label_weight=0.0)
SHORT = {"training": Training(epochs=1, learning_rate=0.01)}


def heads(*seeds, outputs=3):
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(nn.Linear(4, outputs))
    return models


def labeled(outputs=3):
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    return [(inputs, (inputs[:, :outputs] > 0).float())]


@pytest.mark.parametrize(
    "call",
    [
        lambda objective: distill(*heads(0, 1), labeled(), objective=objective, check_teacher=False, **SHORT),
        lambda objective: distill_mutually(heads(0, 1), labeled(), objective=objective, **SHORT),
        lambda objective: Distiller(*heads(0, 1), objective, labeled()[0]),
    ],
    ids=["distill", "mutual", "distiller"],
)
def test_a_softmax_over_binary_labels_gives_a_warning_that_names_the_loss_for_them(call, recwarn):
    call(Objective((Term("binary-kd", 0.9),), label_loss="binary"))
    call(Objective((Term("logit-l2", 0.9),), label_loss="binary"))
    assert not recwarn.list
    call(SOFTMAX)
    (warning,) = recwarn.list
    assert "'kd' applies a softmax" in str(warning.message)
    assert "Use \"binary-kd\" instead of 'kd'" in str(warning.message)


def test_a_softmax_over_binary_labels_of_pixels_gives_a_warning(recwarn):
    torch.manual_seed(0)
    images = torch.randn(4, 1, 3, 3)
    objective = Objective((Term("pixel-kd", 0.9),), label_loss="binary")
    Distiller(nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), objective, (images, (images > 0).float().repeat(1, 2, 1, 1)))
    (warning,) = recwarn.list
    assert 'Use Term("fitnet", student_layer="logits") instead of' in str(warning.message)


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
