"""Confidence intervals and the test of paired samples, compared with closed forms and published values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.errors import DataError
from kirsch.measurement.statistics import Paired, Rate, mcnemar, rate


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_wilson_interval_has_the_published_values(hits, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3; four decimal places are printed."""
    assert rate(hits, n) == Rate(hits / n, pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5), n)


@given(st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_has_its_closed_form(case):
    hits, n = case
    result, z = rate(hits, n), 1.959963984540054  # 97.5 % point of the normal distribution
    center = (hits + z**2 / 2) / (n + z**2)
    half_width = z / (n + z**2) * math.sqrt(hits * (n - hits) / n + z**2 / 4)
    assert (result.low, result.high) == pytest.approx((center - half_width, center + half_width), abs=1e-12)
    # Without hits, low and value are 0; if all are hits, value and high are 1, up to rounding.
    assert 0 <= result.low <= result.value + 1e-15
    assert result.value - 1e-15 <= result.high <= 1


@pytest.mark.parametrize("n", [1, 10, 359])
def test_the_interval_of_zero_or_all_hits_equals_its_closed_form(n):
    """The width is z² / (n + z²) with z² = 3.8414588."""
    width = 3.841458820694124 / (n + 3.841458820694124)
    assert (rate(0, n).low, rate(0, n).high) == pytest.approx((0, width), abs=1e-15)
    assert (rate(n, n).low, rate(n, n).high) == pytest.approx((1 - width, 1), abs=1e-15)


def test_the_rate_of_no_samples_raises():
    with pytest.raises(DataError, match=r"There are no samples to evaluate\. Pass at least one sample\."):
        rate(0, 0)


def two_models(lost, gained, both=3, neither=2):
    """Return which samples two models predict correctly, for these numbers of samples."""
    first = [True] * lost + [False] * gained + [True] * both + [False] * neither
    second = [False] * lost + [True] * gained + [True] * both + [False] * neither
    return np.array(first), np.array(second)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 · (1/2)
        (5, 0, 2 / 2**5),
        (0, 6, 2 / 2**6),
        (1, 9, 2 * (1 + 10) / 2**10),
        (9, 1, 2 * (1 + 10) / 2**10),
        (2, 10, 2 * (1 + 12 + 66) / 2**12),
        (7, 7, 1.0),
    ],
)
def test_mcnemars_p_is_twice_the_binomial_tail(lost, gained, p):
    result = mcnemar(*two_models(lost, gained))
    assert result == Paired(lost, gained, lost + gained + 5, pytest.approx(p, rel=1e-12))
    assert result.significant is (p < 0.05)


def test_the_text_of_a_paired_comparison_has_the_counts_and_the_significance():
    assert mcnemar(*two_models(1, 0)).text == "1 sample lost, 0 gained of 6; not significant (p = 1)"
    result = mcnemar(*two_models(0, 6))
    assert result.text == "0 samples lost, 6 gained of 11; significant (p = 0.031)"
    assert result.to_dict() == {"text": result.text, "p": result.p, "lost": 0, "gained": 6}
