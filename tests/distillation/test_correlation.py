"""Losses that relate the outputs of a batch: closed forms and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distillation.golden import z_s, z_t
from kirsch.distillation.losses import LOSSES
from kirsch.errors import UsageError

N, K = z_s.shape


@pytest.mark.parametrize("convention", ["kirsch", "torchdistill"])
def test_dist_of_opposite_outputs_is_2_for_samples_and_2_for_classes(convention, framework):
    """The teacher has rows (1/4, 3/4) and (3/4, 1/4), the student the same rows exchanged: every correlation is -1."""
    teacher = np.array([[0.0, math.log(3)], [math.log(3), 0.0]])
    sides = framework(teacher[::-1].copy()), framework(teacher)
    # "torchdistill" clips norms at 1e-8, which changes nothing: the norms here are 0.35.
    for options, expected in (({}, 4.0), ({"inter": 0.0}, 2.0), ({"intra": 0.5}, 3.0)):
        assert float(LOSSES["dist"](*sides, convention=convention, **options)) == pytest.approx(expected, rel=1e-7)


def test_batch_and_class_correlation_equal_their_closed_form(framework):
    """P_s = (1/2, 1/2), P_t = (1/4, 3/4) of one sample.

    P Pᵀ is 1/2 for the student and 5/8 for the teacher. Pᵀ P has the entries 1/4 for the student, and 1/16, 3/16, 3/16,
    9/16 for the teacher.
    """
    student, teacher = framework(np.zeros((1, 2))), framework(np.array([[0.0, math.log(3)]]))
    batch = float(LOSSES["batch-correlation"](student, teacher, temperature=1.0))
    classes = float(LOSSES["class-correlation"](student, teacher, temperature=1.0))
    assert batch == pytest.approx((1 / 8) ** 2, rel=1e-13)
    assert classes == pytest.approx((9 + 2 + 25) / 256 / 2, rel=1e-13)


def test_mlkd_is_the_weighted_sum_over_terms_and_temperatures():
    value = LOSSES["mlkd"](z_s, z_t, temperatures=(2.0, 5.0), instance=1.0, batch=10.0, classes=100.0)
    expected = sum(
        weight * float(LOSSES[name](z_s, z_t, temperature=temperature))
        for temperature in (2.0, 5.0)
        for name, weight in (("kd", 1.0), ("batch-correlation", 10.0), ("class-correlation", 100.0))
    )
    assert float(value) == pytest.approx(expected, rel=1e-14)


def test_mlkd_refuses_missing_and_invalid_temperatures():
    with pytest.raises(UsageError, match=r"`temperatures` is empty\. Pass at least one temperature"):
        LOSSES["mlkd"](z_s, z_t, temperatures=())
    with pytest.raises(UsageError, match=r"The temperature is 0\.0"):
        LOSSES["mlkd"](z_s, z_t, temperatures=(2.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1, 6, 10, 100])
def test_dist_of_a_student_that_equals_its_teacher_is_0_with_many_classes(scale, dtype):
    """Most of 1000 classes have tiny probabilities in every sample, and some have 0."""
    teacher = scale * torch.from_numpy(np.random.default_rng(0).standard_normal((64, 1000))).to(dtype)
    student = teacher.clone().requires_grad_()
    value = LOSSES["dist"](student, teacher)
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-6 if dtype == torch.float32 else 1e-12)
    assert float(student.grad.abs().max()) < 1e-6


def test_the_correlation_counts_as_0_if_one_model_is_constant_and_as_1_if_both_are(framework):
    """A model is constant if its probabilities are equal for both samples. The loss is 1 minus the correlation."""
    varying, constant = framework(np.array([[0.0, 1.0], [0.0, 2.0]])), framework(np.array([[0.3, 1.1], [0.3, 1.1]]))
    assert float(LOSSES["dist"](varying, constant, inter=0.0)) == pytest.approx(1, rel=1e-14)
    assert float(LOSSES["dist"](constant, varying, inter=0.0)) == pytest.approx(1, rel=1e-14)
    assert float(LOSSES["dist"](constant, constant, inter=0.0)) == 0


@pytest.mark.parametrize(
    ("name", "option"),
    [("dist", "inter"), ("dist", "intra"), ("mlkd", "instance"), ("mlkd", "batch"), ("mlkd", "classes")],
)
def test_negative_weights_of_correlations_are_refused(name, option):
    with pytest.raises(UsageError, match=rf"`{option}` is -1; a number of at least 0 is needed"):
        LOSSES[name](z_s, z_t, **{option: -1})
