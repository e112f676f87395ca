"""Confidence intervals and the test of paired samples, compared with closed forms and published values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.errors import DataError
from kirsch.measurement.statistics import (
    Paired,
    Rate,
    bootstrap_difference,
    mcnemar,
    paired_difference,
    rate,
)


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


def test_the_difference_of_paired_accuracies_has_the_closed_form_of_its_source():
    """Agresti, Min 2005: 1/2 is added to each cell. Here 5 samples are lost and 2 gained of 100."""
    before, after = np.ones(100, bool), np.ones(100, bool)
    after[:5], before[5:7] = False, False
    found = paired_difference(before, after)
    center = (5.5 - 2.5) / 102
    half = 1.959964 * math.sqrt((5.5 + 2.5 - (5.5 - 2.5) ** 2 / 102) / 102**2)
    assert (found.value, found.n) == (0.03, 100)
    assert (found.low, found.high) == pytest.approx((center - half, center + half), abs=1e-12)


def test_equal_predictions_have_a_difference_of_0_and_an_interval_that_narrows():
    few, many = (paired_difference(np.ones(n, bool), np.ones(n, bool)) for n in (20, 2000))
    assert few.value == many.value == 0
    assert few.low < many.low < 0 < many.high < few.high


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_of_paired_accuracies_covers_the_true_difference(seed):
    """80 % are correct; the second model loses 10 % of the samples and gains 4 %, so the difference is 6 points."""
    random, n, covered = np.random.default_rng(seed), 200, 0
    for _ in range(400):
        kind = random.choice(4, n, p=[0.7, 0.1, 0.04, 0.16])
        found = paired_difference(kind <= 1, (kind == 0) | (kind == 2))
        covered += found.low <= 0.06 <= found.high
    assert 0.92 <= covered / 400 <= 0.98  # 95 % of 400 has a standard deviation of 1.1 points


def test_the_bootstrap_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(2, 3, 1000)
    found = bootstrap_difference(lambda samples: float(values[samples].mean()), 1000)
    assert found.value == pytest.approx(values.mean())
    error = values.std() / math.sqrt(1000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.2)  # 5 % for 200 bootstrap samples
    assert bootstrap_difference(lambda samples: float(values[samples].mean()), 1000) == found


def test_bootstrap_samples_for_which_the_difference_is_not_defined_are_left_out():
    values = np.arange(6.0)
    # The difference is not defined without the first sample: for (5/6)^6 = 33 % of the bootstrap samples.
    some = bootstrap_difference(lambda index: float(values[index].mean()) if 0 in index else math.nan, 6)
    assert some.value == 2.5
    assert some.low < 2.5 < some.high
    most = bootstrap_difference(lambda index: 1.0 if len(set(index.tolist())) == 6 else math.nan, 6)
    assert most.value == 1.0
    assert math.isnan(most.low)
    assert math.isnan(most.high)


def test_differences_without_samples_are_refused():
    with pytest.raises(DataError, match="no samples"):
        paired_difference(np.zeros(0, bool), np.zeros(0, bool))
    with pytest.raises(DataError, match="no samples"):
        bootstrap_difference(lambda _: 0.0, 0)
