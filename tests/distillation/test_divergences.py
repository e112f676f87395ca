"""Reverse KL and Jensen-Shannon divergence: closed forms, limits, and both directions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distillation.golden import z_s, z_t
from kirsch.distillation.losses import LOSSES, soft_target
from kirsch.errors import UsageError

N, K = z_s.shape


def test_reverse_kl_is_soft_targets_with_student_and_teacher_exchanged():
    value = LOSSES["reverse-kl"](z_s, z_t, temperature=2.0)
    assert float(value) == pytest.approx(float(soft_target(z_t, z_s, temperature=2.0)), rel=1e-14)


def test_jsd_equals_its_closed_form(framework):
    """p_s = (1/4, 3/4), p_t = (3/4, 1/4), β = 1/2: M is uniform, each KL is 3/4 log 3 - log 2, 1 / (β (1 - β)) = 4."""
    student, teacher = np.array([[0.0, math.log(3)]]), np.array([[math.log(3), 0.0]])
    value = float(LOSSES["jsd"](framework(student), framework(teacher)))
    assert value == pytest.approx(4 * (0.75 * math.log(3) - math.log(2)), rel=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_jsd_with_beta_0_and_1_is_kl_in_both_directions(temperature, framework):
    sides = framework(z_s), framework(z_t)
    for beta, end in ((0.0, "kd"), (1.0, "reverse-kl")):
        expected = float(LOSSES[end](*sides, temperature=temperature))
        value = float(LOSSES["jsd"](*sides, beta=beta, temperature=temperature))
        assert value == pytest.approx(expected, rel=1e-13)
        for step in (1e-300, 1e-15, 1e-9):  # the difference from the limit is about the slope at the end times step
            near = float(LOSSES["jsd"](*sides, beta=abs(beta - step), temperature=temperature))
            assert near == pytest.approx(expected, rel=1e-12 + 1e3 * step)


def test_jsd_is_continuous_at_beta_0_and_1_unlike_the_jsd_of_trl():
    betas = np.array([0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6, 1.0])
    smooth, trl = (
        np.array([float(LOSSES["jsd"](z_s, z_t, beta=beta, convention=convention)) for beta in betas])
        for convention in ("kirsch", "trl")
    )
    assert smooth.min() > 1
    assert smooth[1] == pytest.approx(smooth[0], rel=1e-4)
    assert trl[0] > 2
    assert trl[1] < 1e-5
    np.testing.assert_allclose(trl[1:-1], smooth[1:-1] * betas[1:-1] * (1 - betas[1:-1]), rtol=1e-12)


@given(
    arrays(np.float64, (2, 4), elements=st.floats(-1e3, 1e3)),
    arrays(np.float64, (2, 4), elements=st.floats(-1e3, 1e3)),
    st.floats(0, 1),
)
@settings(deadline=None, derandomize=True)
def test_jsd_is_nonnegative_and_does_not_change_if_models_and_beta_are_both_exchanged(student, teacher, beta):
    beta = 1 - (1 - beta)  # so that 1 - beta is exact
    value = float(LOSSES["jsd"](student, teacher, beta=beta))
    assert value >= -1e-12
    assert float(LOSSES["jsd"](teacher, student, beta=1 - beta)) == pytest.approx(value, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("beta", [0.0, 1e-40, 1e-20, 1e-7, 0.5, 1.0])
def test_jsd_in_32_bits_is_accurate(beta):
    sides = [torch.from_numpy(logits) for logits in (z_s, z_t)]
    exact = float(LOSSES["jsd"](*sides, beta=beta))
    assert float(LOSSES["jsd"](*(side.float() for side in sides), beta=beta)) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_out_of_range_is_refused(beta):
    with pytest.raises(UsageError, match=rf"`beta` is {beta}; a number from 0 to 1 is needed"):
        LOSSES["jsd"](z_s, z_t, beta=beta)
