"""How good a classifier is, with the doubt that the number of samples leaves."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binomtest

from kirsch.errors import DataError, NumericError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Z = 1.959963984540054
"""97.5 % point of the normal distribution."""


@dataclass(frozen=True)
class Rate:
    """A share of samples with its 95 % interval.

    Args:
        value: share, 0 to 1.
        low, high: ends of the interval.
        n: samples.
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def rate(hits: int, n: int) -> Rate:
    """The share of hits with its Wilson interval.

    Raises:
        DataError: there are no samples.

    Source: Wilson 1927, J. Amer. Statist. Assoc. 22, 209-212.
    """
    if n < 1:
        raise DataError("There are no samples to judge by.", fix="Give at least one.")
    share = hits / n
    center = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Rate(share, max(0.0, center - half), min(1.0, center + half), n)


UNEVEN = 1.5
"""Classes are uneven where the most frequent has so many times the samples that it would have if all had as many."""


@dataclass(frozen=True)
class Answers:
    """What a classifier answered, beside what is right.

    Args:
        n: samples.
        accuracy: share that is right, 0 to 1.
        balanced: mean over the classes that occur of the share that is right of each (balanced accuracy).
        chance: accuracy expected of answers that are given as often but do not depend on the sample; for a constant
            answer it is the accuracy itself. Cohen's kappa is (accuracy - chance) / (1 - chance).
        most_frequent: samples of the most frequent class.
        classes: that occur among the labels.
        first: the first answer.
        constant: all answers are the same.
    """

    n: int
    accuracy: float
    balanced: float
    chance: float
    most_frequent: int
    classes: int
    first: int
    constant: bool

    @property
    def majority(self) -> float:
        """Accuracy of always answering the most frequent class."""
        return self.most_frequent / self.n if self.n else 0.0

    @property
    def uneven(self) -> bool:
        """Whether accuracy alone says little, since one class has far more samples than others."""
        return self.classes > 1 and self.majority * self.classes >= UNEVEN

    @classmethod
    def of(cls, answers: NDArray[Any], labels: NDArray[Any]) -> Answers:
        """Compare class numbers, both of shape (n,).

        Source: Cohen 1960, Educ. Psychol. Meas. 20, 37-46; Brodersen et al. 2010, ICPR, 3121-3124.
        """
        n = len(labels)
        if not n:
            return cls(0, 0.0, 0.0, 0.0, 0, 0, 0, constant=False)
        values, found = np.unique(np.concatenate([labels, answers]), return_inverse=True)
        true, said = np.bincount(found[:n], minlength=len(values)), np.bincount(found[n:], minlength=len(values))
        right = np.bincount(found[:n][found[:n] == found[n:]], minlength=len(values))
        occurs = true > 0
        return cls(
            n=n,
            accuracy=float(right.sum() / n),
            balanced=float((right[occurs] / true[occurs]).mean()),
            chance=float((true / n) @ (said / n)),
            most_frequent=int(true.max()),
            classes=int(occurs.sum()),
            first=int(answers[0]),
            constant=bool((said == n).any()),
        )


FEW_ROWS = 4
TIGHT, LOOSE = 1e-5, 5e-3
"""By how much the sums of few rows, and of more, may miss 1: 16 bits round that much."""


def are_probabilities(scores: NDArray[Any]) -> bool:
    """Whether each row of scores (..., K) is at least 0 and sums to 1, as a softmax makes it; never for K = 1."""
    if scores.ndim < 2 or scores.shape[-1] < 2 or not scores.size:  # noqa: PLR2004 - (N, K), and two classes
        return False
    rows = scores.reshape(-1, scores.shape[-1])
    within = LOOSE if len(rows) >= FEW_ROWS else TIGHT
    return bool(rows.min() >= 0 and (abs(rows.sum(-1, dtype=np.float64) - 1) < within).all())


def are_scaled_probabilities(outputs: NDArray[Any]) -> bool:
    """Return whether each row of outputs (..., K) is at least 0 and all rows have the same sum, such as 100.

    False for fewer than `FEW_ROWS` rows, which may have the same sum by chance.
    """
    rows = outputs.reshape(-1, outputs.shape[-1])
    total = rows.sum(-1, dtype=np.float64).mean()
    return len(rows) >= FEW_ROWS and total > 0 and are_probabilities(rows / total)


def accuracy(logits: NDArray[Any], labels: NDArray[Any]) -> Rate:
    """The share of samples whose largest score is that of their label.

    Args:
        logits: shape (N, K).
        labels: shape (N,), 0 <= label < K.
    """
    _check(logits, labels)
    return rate(int((logits.argmax(-1) == labels).sum()), len(labels))


def confusion(logits: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.int64]:
    """Counts of shape (K, K): rows are true classes, columns predicted ones."""
    _check(logits, labels)
    classes = logits.shape[1]
    cells = labels.astype(np.int64) * classes + logits.argmax(-1)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def lost_classes(before: NDArray[Any], after: NDArray[Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy of each class in two confusion matrices, the greatest loss first.

    Args:
        before, after: counts of shape (K, K) over the same samples.
        names: of the K classes.
    """
    rows = []
    for place, name in enumerate(names):
        n = int(before[place].sum())
        if n:
            rows.append(
                {
                    "name": name,
                    "before": float(before[place, place] / n),
                    "after": float(after[place, place] / n),
                    "n": n,
                }
            )
    return sorted(rows, key=lambda row: row["after"] - row["before"])


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same samples.

    Args:
        lost: samples that only the first had right.
        gained: samples that only the second has right.
        n: all samples.
        p: two-sided exact p-value of McNemar's test that both are equally good.
    """

    lost: int
    gained: int
    n: int
    p: float

    @property
    def significant(self) -> bool:
        """Whether p < 0.05."""
        return self.p < 0.05  # noqa: PLR2004 - the usual level

    @property
    def text(self) -> str:
        """One sentence."""
        verdict = "significant" if self.significant else "not significant"
        plural = "" if self.lost == 1 else "s"
        return f"{self.lost} sample{plural} lost, {self.gained} gained of {self.n}; {verdict} (p = {self.p:.2g})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"text": self.text, "p": self.p, "lost": self.lost, "gained": self.gained}


def paired(before: NDArray[Any], after: NDArray[Any], labels: NDArray[Any]) -> Paired:
    """McNemar's exact test between two classifiers on the same samples.

    Args:
        before, after: scores, shape (N, K).
        labels: shape (N,).

    Source: McNemar 1947, Psychometrika 12, 153-157; exact by the binomial distribution.
    """
    _check(before, labels)
    _check(after, labels)
    first, second = before.argmax(-1) == labels, after.argmax(-1) == labels
    lost, gained = int((first & ~second).sum()), int((~first & second).sum())
    p = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return Paired(lost, gained, len(labels), p)


def calibration(logits: NDArray[Any], labels: NDArray[Any], bins: int = 10) -> dict[str, Any]:
    """Whether a classifier is as often right as it is sure.

    Args:
        logits: shape (N, K); or probabilities, which are taken as they are.
        labels: shape (N,).
        bins: of confidence.

    Returns:
        "ece": expected calibration error, 0 to 1; "bins": confidence, accuracy and n of each bin that has samples.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    _check(logits, labels)
    shares = logits.astype(np.float64)
    if not are_probabilities(logits):
        shares = np.exp(shares - shares.max(-1, keepdims=True))
    sure = (shares / shares.sum(-1, keepdims=True)).max(-1)
    right = logits.argmax(-1) == labels
    place = np.minimum((sure * bins).astype(int), bins - 1)
    rows = [
        {"confidence": float(sure[at].mean()), "accuracy": float(right[at].mean()), "n": int(at.sum())}
        for at in (place == number for number in range(bins))
        if at.any()
    ]
    ece = sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(labels)
    return {"ece": float(ece), "bins": rows}


def check_scores(scores: NDArray[Any], whose: str = "model") -> None:
    """Refuse scores of shape (N, K) from which no label follows.

    A score of -inf beside finite ones is taken: that of a class that must not come.

    Raises:
        NumericError: a sample has NaN, +inf or no finite number.
    """
    broken = np.isnan(scores).any(-1) | np.isposinf(scores).any(-1) | ~np.isfinite(scores).any(-1)
    if broken.any():
        raise NumericError(
            f"The {whose} gives NaN or infinity as scores of {int(broken.sum())} of {len(scores)} samples, first of "
            f"sample {int(broken.argmax())}.",
            "Such scores have no largest one, so that any label would be made up.",
            "Check the weights for NaN, and that the inputs are prepared as the model expects.",
        )


def _check(logits: NDArray[Any], labels: NDArray[Any]) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise DataError(
            f"The labels have shape {labels.shape} and type {labels.dtype}; expected class numbers, shape (N,).",
            fix="Give integers: labels[:, 0] for a column, labels.argmax(-1) for one-hot rows.",
        )
    if logits.ndim != 2 or len(logits) != len(labels):  # noqa: PLR2004 - (N, K)
        raise ShapeError(f"Scores of shape {logits.shape} and labels of shape {labels.shape} do not fit together.")
    if not len(labels):
        raise DataError("There are no samples to judge by.", fix="Give at least one.")
    check_scores(logits)
    wrong = (labels < 0) | (labels >= logits.shape[1])
    if wrong.any():
        raise DataError(
            f"Sample {int(wrong.argmax())} has the label {int(labels[wrong.argmax()])}.",
            f"There are scores for the classes 0 to {logits.shape[1] - 1}.",
        )
