"""Fractions with confidence intervals, and a significance test for paired samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from scipy.stats import binomtest

from kirsch.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
