"""Fractions with confidence intervals, and a significance test for paired samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binomtest

from kirsch.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

NORMAL_95 = 1.959964
"""97.5 % quantile of the normal distribution, for two-sided 95 % intervals."""

RESAMPLES = 200
"""Number of bootstrap samples. The standard error of a standard deviation from so many is 5 %."""


@dataclass(frozen=True)
class Rate:
    """A fraction of samples with its confidence interval.

    Args:
        value: the fraction, 0 to 1.
        low, high: 95 % confidence interval.
        n: number of samples.
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)


def rate(hits: int, n: int) -> Rate:
    """Return the fraction hits / n with its Wilson interval.

    Raises:
        DataError: n is less than 1.

    Source: Wilson 1927, J. Amer. Statist. Assoc. 22, 209-212.
    """
    if n < 1:
        raise DataError("There are no samples to evaluate.", fix="Pass at least one sample.")
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return Rate(hits / n, float(interval.low), float(interval.high), n)


@dataclass(frozen=True)
class Paired:
    """Comparison of the correct predictions of two models on the same samples.

    Args:
        lost: number of samples that only the first predicts correctly.
        gained: number of samples that only the second predicts correctly.
        n: number of samples.
        p: two-sided exact p-value of McNemar's test; the null hypothesis is equal accuracy.
    """

    lost: int
    gained: int
    n: int
    p: float

    @property
    def significant(self) -> bool:
        """Whether the accuracies differ significantly, p < 0.05."""
        return self.p < 0.05  # noqa: PLR2004 - the usual level

    @property
    def text(self) -> str:
        """The result in one sentence, without a period."""
        verdict = "significant" if self.significant else "not significant"
        plural = "" if self.lost == 1 else "s"
        return f"{self.lost} sample{plural} lost, {self.gained} gained of {self.n}; {verdict} (p = {self.p:.2g})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return {"text": self.text, "p": self.p, "lost": self.lost, "gained": self.gained}


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Paired:
    """Compare two models on the same samples by McNemar's exact test.

    Args:
        before, after: whether the prediction of each model is correct, shape (N,).

    Source: McNemar 1947, Psychometrika 12, 153-157; exact by the binomial distribution.
    """
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    p = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return Paired(lost, gained, len(before), p)


@dataclass(frozen=True)
class Difference:
    """A difference of two models on the same samples, with its confidence interval.

    Args:
        value: the difference.
        low, high: 95 % confidence interval.
        n: number of samples.
    """

    value: float
    low: float
    high: float
    n: int


def paired_difference(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Difference:
    """Return the accuracy of a first model minus that of a second one on the same samples.

    The interval is a Wald interval after 1/2 is added to each cell of the 2×2 table of correct and wrong predictions,
    so that it does not shrink to a point if no prediction changes.

    Args:
        before, after: whether the prediction of each model is correct, shape (N,).

    Raises:
        DataError: there are no samples.

    Source: Agresti, Min 2005, Statistics in Medicine 24, 729-740 (the interval "Wald+2").
    """
    n = len(before)
    if not n:
        raise DataError("There are no samples to evaluate.", fix="Pass at least one sample.")
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    total, changed, center = n + 2, lost + gained + 1, (lost - gained) / (n + 2)
    half = NORMAL_95 * np.sqrt(changed / total - center**2) / np.sqrt(total)
    low, high = float(max(center - half, -1)), float(min(center + half, 1))
    return Difference((lost - gained) / n, low, high, n)


def bootstrap_difference(difference: Callable[[NDArray[np.int64]], float], n: int, seed: int = 0) -> Difference:
    """Return a difference of two models on the same samples; its interval is the value ± 1.96 standard errors.

    The standard error is that of the difference over `RESAMPLES` bootstrap samples. Both models are evaluated on the
    same samples of each.

    Args:
        difference: function of indices of samples, which may repeat → the difference on these samples; NaN if it is not
            defined for them. If it is NaN for more than half of the bootstrap samples, the interval is NaN.
        n: number of samples.
        seed: seed of the bootstrap samples.

    Raises:
        DataError: there are no samples.

    Source: Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 6.
    """
    if not n:
        raise DataError("There are no samples to evaluate.", fix="Pass at least one sample.")
    random = np.random.default_rng(seed)
    value = difference(np.arange(n))
    drawn = np.array([difference(random.integers(0, n, n)) for _ in range(RESAMPLES)])
    defined = drawn[np.isfinite(drawn)]
    error = float(defined.std(ddof=1)) if len(defined) > RESAMPLES / 2 else np.nan
    return Difference(value, value - NORMAL_95 * error, value + NORMAL_95 * error, n)
