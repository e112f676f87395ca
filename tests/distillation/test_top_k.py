"""Soft targets from the k most probable classes: limits and errors."""

from __future__ import annotations

import numpy as np
import pytest

from distillation.golden import z_s, z_t
from kirsch.distillation.losses import LOSSES
from kirsch.distillation.losses.top_k import stored_top_k
from kirsch.errors import DataError, UsageError

N, K = z_s.shape


@pytest.mark.parametrize("k", [0, 2.5])
def test_an_invalid_k_is_refused(k):
    with pytest.raises(UsageError, match=rf"`k` is {k}; an integer of at least 1 is needed"):
        LOSSES["top-k"](z_s, z_t, k=k)


def test_stored_classes_that_repeat_in_an_unmasked_sample_are_refused(framework):
    indices, log_p = framework(np.array([[1, 2], [3, 3]])), framework(np.log([[0.5, 0.3], [0.4, 0.4]]))
    stored = indices, log_p, framework(np.log([0.2, 0.2]))
    with pytest.raises(DataError, match="The store contains class 3 twice for one sample"):
        stored_top_k(framework(z_s[:2]), *stored)
    assert float(stored_top_k(framework(z_s[:2]), *stored, mask=framework(np.array([True, False])))) > 0


def test_the_loss_for_stored_log_probabilities_of_minus_infinity_is_the_limit_of_small_probabilities(framework):
    student, indices = framework(z_s[:2, :4].copy()), framework(np.array([[0, 2, 3], [0, 1, 2]]))
    values = []
    for least in (-1e3, -np.inf):
        stored = np.log([[0.7, 0.3, 1.0], [0.5, 0.5, 1.0]])
        stored[:, 2] = least
        values.append(float(stored_top_k(student, indices, framework(stored), framework(np.full(2, least)))))
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    assert float(stored_top_k(student, indices, framework(stored), framework(np.full(2, -np.inf)), temperature=2.0)) > 0
