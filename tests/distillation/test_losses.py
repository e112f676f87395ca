"""Losses against values of other code bases, closed forms, and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from kirsch.distillation.losses import hard_label, soft_target
from kirsch.errors import ShapeError, UsageError

FRAMEWORKS = [lambda array: array, torch.from_numpy]
NAMES = ["numpy", "torch"]


def waves(shape, a, b, scale):
    """scale (sin(i a + b) + cos(0.37 i² a + 1.3 b) / 2) for i = 0, 1, ... in C order, float64."""
    i = np.arange(math.prod(shape), dtype=np.float64)
    return (scale * (np.sin(i * a + b) + 0.5 * np.cos(i * i * 0.37 * a + 1.3 * b))).reshape(shape)


N, K = 8, 10
STUDENT, TEACHER = waves((N, K), 1.7, 0.3, 3), waves((N, K), 2.3, 1.1, 3)

# Σ KL · T² / N on these inputs in float64, as RepDistiller (`DistillKL`), mdistiller (`kd_loss`) and mmrazor
# (`KLDivergence`, batchmean) were run to give it; they agree to 15 digits.
SOFT_TARGET = {1.0: 2.804285532170525, 4.0: 5.01938952017588}

# The same inputs where the convention is another one, so that weights cannot be taken over as they are.
MEAN_OVER_ELEMENTS = {1.0: 0.2804285532170525, 4.0: 0.501938952017588}  # ModelOpt (default), DeiT, Neural Compressor
WITHOUT_T_SQUARED = {1.0: 2.804285532170525, 4.0: 0.3137118450109925}  # torchdistill (alpha=0), TRL (beta=0)
SOFT_CROSS_ENTROPY = {1.0: 4.022431893377923, 4.0: 2.4647652158540776}  # TextBrewer: entropy stays in, no T²
BOTH_WAYS_ROUND = 3.32322673434754  # TRL (beta=1): KL from the student to the teacher, T = 1


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=NAMES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_are_those_of_the_reference_code(framework, temperature):
    found = float(soft_target(framework(STUDENT), framework(TEACHER), temperature=temperature))
    assert found == pytest.approx(SOFT_TARGET[temperature], abs=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_of_other_conventions_are_related_as_documented(temperature):
    ours = float(soft_target(STUDENT, TEACHER, temperature=temperature))
    soft = np.exp(TEACHER / temperature) / np.exp(TEACHER / temperature).sum(-1, keepdims=True)
    entropy = -(soft * np.log(soft)).sum(-1).mean()
    assert ours / K == pytest.approx(MEAN_OVER_ELEMENTS[temperature], abs=1e-9)
    assert ours / temperature**2 == pytest.approx(WITHOUT_T_SQUARED[temperature], abs=1e-9)
    assert ours / temperature**2 + entropy == pytest.approx(SOFT_CROSS_ENTROPY[temperature], abs=1e-9)


def test_the_divergence_runs_from_the_teacher_to_the_student():
    """It is no symmetric number: exchanged, the same scores give another published value."""
    assert float(soft_target(TEACHER, STUDENT, temperature=1.0)) == pytest.approx(BOTH_WAYS_ROUND, abs=1e-9)


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=NAMES)
def test_soft_targets_in_closed_form(framework):
    """p = (1/2, 1/2) of the teacher, (1/4, 3/4) of the student: KL = log(4/3) / 2."""
    student, teacher = framework(np.array([[0.0, 2 * math.log(3)]])), framework(np.zeros((1, 2)))
    found = float(soft_target(student, teacher, temperature=2.0))
    assert found == pytest.approx(4 * math.log(4 / 3) / 2, rel=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_targets_are_those_of_pytorch(temperature):
    student, teacher = torch.from_numpy(STUDENT), torch.from_numpy(TEACHER)
    log_s, log_t = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    other = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2
    assert float(soft_target(student, teacher, temperature=temperature)) == pytest.approx(float(other), rel=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_is_temperature_times_the_difference_of_the_softened_outputs(temperature):
    student, teacher = (torch.from_numpy(scores.copy()).requires_grad_() for scores in (STUDENT, TEACHER))
    soft_target(student, teacher, temperature=temperature).backward()
    assert teacher.grad is None
    p_s, p_t = (F.softmax(torch.from_numpy(scores) / temperature, -1) for scores in (STUDENT, TEACHER))
    np.testing.assert_allclose(student.grad, temperature * (p_s - p_t) / N, rtol=1e-12, atol=1e-16)


def test_the_gradient_of_hot_soft_targets_is_that_of_squared_scores():
    """Hinton et al. 2015, section 2.1: for T → ∞ the gradient is (z_s - z_t) / (N K), of scores with a mean of zero."""
    centred = [scores - scores.mean(-1, keepdims=True) for scores in (STUDENT, TEACHER)]
    student = torch.from_numpy(centred[0]).requires_grad_()
    soft_target(student, torch.from_numpy(centred[1]), temperature=1e5).backward()
    # The next term is smaller by a factor of scores / T, here 1e-4.
    np.testing.assert_allclose(student.grad, (centred[0] - centred[1]) / (N * K), rtol=0, atol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=NAMES)
def test_a_student_that_equals_its_teacher_is_charged_exactly_nothing(framework):
    assert float(soft_target(framework(TEACHER), framework(TEACHER.copy()), temperature=4.0)) == 0.0


@given(
    arrays(np.float64, (3, 4), elements=st.floats(-1e4, 1e4)),
    arrays(np.float64, (3, 4), elements=st.floats(-1e4, 1e4)),
    st.floats(0.1, 100),
)
@settings(deadline=None, derandomize=True)
def test_soft_targets_are_never_below_zero_and_know_no_shift(student, teacher, temperature):
    found = float(soft_target(student, teacher, temperature=temperature))
    # Each of 4 terms p (log p - log q) is rounded at the size of the softened scores, and T² comes on top.
    rounding = 1e-15 * 4 * max(np.abs(student).max(), np.abs(teacher).max(), 1.0) * temperature * max(1, temperature)
    assert found >= -rounding
    shifted = float(soft_target(student + 1.0, teacher - 2.0, temperature=temperature))
    assert shifted == pytest.approx(found, rel=1e-9, abs=100 * rounding)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(UsageError, match=rf"The temperature is {temperature}; a number above 0 is needed"):
        soft_target(STUDENT, TEACHER, temperature=temperature)


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=NAMES)
def test_scores_that_numpy_would_broadcast_are_refused(framework):
    with pytest.raises(ShapeError, match=r"shape \(8, 10\), the teacher's \(1, 10\)"):
        soft_target(framework(STUDENT), framework(TEACHER[:1]), temperature=1.0)


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=NAMES)
def test_hard_labels_in_closed_form(framework):
    """Softmax of (0, log 3) is (1/4, 3/4): the labels 0 and 1 cost log 4 and log 4/3."""
    scores = framework(np.array([[0.0, math.log(3)], [0.0, math.log(3)]]))
    found = float(hard_label(scores, framework(np.array([0, 1]))))
    assert found == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, rel=1e-15)


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=NAMES)
def test_smoothed_labels_in_closed_form(framework):
    """A share of 0.2 over two classes makes the label 1 into (0.1, 0.9): 0.1 log 4 + 0.9 log 4/3."""
    scores, targets = framework(np.array([[0.0, math.log(3)]])), framework(np.array([1]))
    found = float(hard_label(scores, targets, label_smoothing=0.2))
    assert found == pytest.approx(0.1 * math.log(4) + 0.9 * math.log(4 / 3), rel=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_hard_labels_are_those_of_pytorch(smoothing):
    scores, targets = torch.from_numpy(STUDENT), torch.arange(N) * 3 % K
    other = F.cross_entropy(scores, targets, label_smoothing=smoothing)
    assert float(hard_label(scores, targets, label_smoothing=smoothing)) == pytest.approx(float(other), rel=1e-14)
    found = hard_label(STUDENT, targets.numpy(), label_smoothing=smoothing)
    assert found == pytest.approx(float(other), rel=1e-14)


def test_the_gradient_of_smoothed_labels_is_output_minus_label():
    student, targets = torch.from_numpy(STUDENT.copy()).requires_grad_(), torch.arange(N) * 3 % K
    hard_label(student, targets, label_smoothing=0.3).backward()
    wanted = F.softmax(torch.from_numpy(STUDENT), -1) - 0.7 * F.one_hot(targets, K) - 0.03
    np.testing.assert_allclose(student.grad, wanted / N, atol=1e-15)
