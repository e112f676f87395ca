"""Losses that treat the labeled class and the other classes differently: closed forms and gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distillation.golden import y, z_s, z_t
from kirsch import ops
from kirsch.distillation.losses import LOSSES, soft_target
from kirsch.errors import ShapeError, UsageError

N, K = z_s.shape


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_equals_soft_targets_if_beta_is_1_minus_the_teachers_probability_of_the_label(temperature, framework):
    """Zhao et al. 2022, equation 5: KD = TCKD + (1 - p_label of the teacher) NCKD, of each sample."""
    p_t = np.exp(ops.log_softmax(z_t / temperature))
    for i in range(N):
        student, teacher, label = (framework(part[i : i + 1]) for part in (z_s, z_t, y))
        value = LOSSES["dkd"](student, teacher, labels=label, beta=1 - p_t[i, y[i]], temperature=temperature)
        expected = soft_target(student, teacher, temperature=temperature)
        assert float(value) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dkd_of_large_logits_is_accurate_in_low_precision(dtype):
    """Masking a class by subtracting 1000 would fail for logits of thousands.

    The logits are small integers times 512, which bfloat16 represents exactly.
    """
    student, teacher = (torch.from_numpy(np.round(logits) * 512) for logits in (z_s, z_t))
    labels = teacher.argmax(-1)
    expected = float(LOSSES["dkd"](student, teacher, labels=labels))
    value = float(LOSSES["dkd"](student.to(dtype), teacher.to(dtype), labels=labels))
    assert value == pytest.approx(expected, rel=1e-5)
    others = torch.ones(N, K, dtype=torch.bool).scatter(1, labels[:, None], value=False)
    rest = [logits[others].reshape(N, K - 1) for logits in (student, teacher)]
    assert float(LOSSES["dkd"](student, teacher, labels=labels, alpha=0.0, beta=1.0)) == pytest.approx(
        float(soft_target(*rest, temperature=4.0)), rel=1e-12
    )


def test_dkd_refuses_a_single_class_and_negative_weights():
    with pytest.raises(ShapeError, match="only one class"):
        LOSSES["dkd"](z_s[:, :1], z_t[:, :1], labels=0 * y)
    for name in ("alpha", "beta"):
        with pytest.raises(UsageError, match=rf"`{name}` is -1\.0; a number of at least 0"):
            LOSSES["dkd"](z_s, z_t, labels=y, **{name: -1.0})


def test_ofa_equals_its_closed_form(framework):
    """p_t = (1/4, 3/4), label 1, power 2: targets 1/16 and (7/4)² - 1 = 33/16; -log p_s is log 2."""
    student, teacher = np.zeros((1, 2)), np.array([[0.0, math.log(3)]])
    value = LOSSES["ofa"](framework(student), framework(teacher), labels=framework(np.array([1])), power=2.0)
    assert float(value) == pytest.approx(34 / 16 * math.log(2), rel=1e-14)


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_an_invalid_power_is_refused(power):
    with pytest.raises(UsageError, match=rf"`power` is {power}; a number above 0 is needed"):
        LOSSES["ofa"](z_s, z_t, labels=y, power=power)


def test_weighted_soft_labels_equal_their_closed_form(framework):
    """The label is 1; the student has the probabilities (1/2, 1/2), the teacher (1/4, 3/4).

    The cross-entropy with the label is log 2 for the student and log 4/3 for the teacher. The cross-entropy of the
    student with the teacher is log 2.
    """
    student, teacher = np.zeros((1, 2)), np.array([[0.0, math.log(3)]])
    weight = 1 - math.exp(-math.log(2) / (math.log(4 / 3) + 1e-7))
    value = LOSSES["wsld"](framework(student), framework(teacher), labels=framework(np.array([1])))
    assert float(value) == pytest.approx(weight * math.log(2), rel=1e-14)


def test_no_gradient_flows_through_the_weight_of_soft_labels():
    student, targets = torch.from_numpy(z_s.copy()).requires_grad_(), torch.from_numpy(y)
    LOSSES["wsld"](student, torch.from_numpy(z_t), labels=targets, temperature=2.0).backward()
    loss_s, loss_t = (F.cross_entropy(torch.from_numpy(z), targets, reduction="none") for z in (z_s, z_t))
    weight = 1 - torch.exp(-loss_s / (loss_t + 1e-7))
    p_s, p_t = (F.softmax(torch.from_numpy(logits) / 2, -1) for logits in (z_s, z_t))
    np.testing.assert_allclose(student.grad, weight[:, None] * 2 * (p_s - p_t) / N, rtol=1e-9, atol=1e-15)
