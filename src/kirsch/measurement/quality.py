"""Quality of classifiers, with confidence intervals and significance tests."""

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
        raise _no_samples()
    fraction = hits / n
    center = (fraction + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half_width = Z / (1 + Z**2 / n) * math.sqrt(fraction * (1 - fraction) / n + Z**2 / (4 * n**2))
    return Rate(fraction, max(0.0, center - half_width), min(1.0, center + half_width), n)


def _no_samples() -> DataError:
    return DataError("There are no samples to evaluate.", fix="Pass at least one sample.")


UNEVEN = 1.5
"""Classes are imbalanced if the most frequent has at least this many times the mean number of samples per class."""


@dataclass(frozen=True)
class Answers:
    """Comparison of the predicted classes of a classifier with the labels.

    Args:
        n: number of samples.
        accuracy: fraction of correct predictions, 0 to 1.
        balanced: balanced accuracy, the mean recall over the classes that occur among the labels.
        chance: expected accuracy of predictions with the same class frequencies that do not depend on the sample. For
            constant predictions it equals the accuracy. Cohen's kappa is (accuracy - chance) / (1 - chance).
        most_frequent: number of samples of the most frequent class.
        classes: number of classes that occur among the labels.
        first: the first prediction.
        constant: whether all predictions are the same.
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
        """Accuracy of always predicting the most frequent class."""
        return self.most_frequent / self.n if self.n else 0.0

    @property
    def uneven(self) -> bool:
        """Whether the classes are imbalanced, so that accuracy alone can mislead."""
        return self.classes > 1 and self.majority * self.classes >= UNEVEN

    @classmethod
    def of(cls, answers: NDArray[Any], labels: NDArray[Any]) -> Answers:
        """Compare predicted classes with labels, both of shape (n,).

        Source: Cohen 1960, Educ. Psychol. Meas. 20, 37-46; Brodersen et al. 2010, ICPR, 3121-3124.
        """
        n = len(labels)
        if not n:
            return cls(0, 0.0, 0.0, 0.0, 0, 0, 0, constant=False)
        values, indices = np.unique(np.concatenate([labels, answers]), return_inverse=True)
        true, predicted = indices[:n], indices[n:]
        n_true, n_predicted, n_correct = (
            np.bincount(classes, minlength=len(values)) for classes in (true, predicted, true[true == predicted])
        )
        occurs = n_true > 0
        return cls(
            n=n,
            accuracy=float(n_correct.sum() / n),
            balanced=float((n_correct[occurs] / n_true[occurs]).mean()),
            chance=float((n_true / n) @ (n_predicted / n)),
            most_frequent=int(n_true.max()),
            classes=int(occurs.sum()),
            first=int(answers[0]),
            constant=bool((n_predicted == n).any()),
        )


FEW_ROWS = 4
TIGHT, LOOSE = 1e-5, 5e-3
"""Tolerance of the sum of a row of probabilities, for fewer than `FEW_ROWS` rows and for more (16-bit rounding)."""


def are_probabilities(outputs: NDArray[Any]) -> bool:
    """Return whether outputs of shape (..., K) are probabilities: each row is non-negative and sums to 1.

    False for K = 1.
    """
    if outputs.ndim < 2 or outputs.shape[-1] < 2 or not outputs.size:  # noqa: PLR2004 - (N, K), and two classes
        return False
    rows = outputs.reshape(-1, outputs.shape[-1])
    tolerance = LOOSE if len(rows) >= FEW_ROWS else TIGHT
    return bool(rows.min() >= 0 and (abs(rows.sum(-1, dtype=np.float64) - 1) < tolerance).all())


def are_scaled_probabilities(outputs: NDArray[Any]) -> bool:
    """Return whether outputs of shape (..., K) are non-negative and all rows have the same sum, such as 100.

    False for fewer than `FEW_ROWS` rows, which may have the same sum by chance.
    """
    rows = outputs.reshape(-1, outputs.shape[-1])
    total = rows.sum(-1, dtype=np.float64).mean()
    return len(rows) >= FEW_ROWS and total > 0 and are_probabilities(rows / total)


def accuracy(logits: NDArray[Any], labels: NDArray[Any]) -> Rate:
    """Return the fraction of samples whose largest logit is that of their label.

    Args:
        logits: shape (N, K), K classes.
        labels: shape (N,), 0 <= label < K.

    Raises:
        ShapeError: the shapes do not match.
        DataError: there are no samples, or a label is out of range.
        NumericError: see `check_outputs`.
    """
    _check(logits, labels)
    return rate(int((logits.argmax(-1) == labels).sum()), len(labels))


def confusion(logits: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.int64]:
    """Return the confusion matrix of shape (K, K); rows are true classes, columns predicted classes.

    Arguments and errors as in `accuracy`.
    """
    _check(logits, labels)
    classes = logits.shape[1]
    cells = labels.astype(np.int64) * classes + logits.argmax(-1)  # int64, since small label types would overflow
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def lost_classes(before: NDArray[Any], after: NDArray[Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the accuracy (recall) of each class before and after, the largest loss first.

    Args:
        before, after: confusion matrices of shape (K, K) over the same samples.
        names: names of the K classes.

    Returns:
        Dicts with "name", "before", "after" and "n", for the classes that have samples.
    """
    rows = [
        {"name": name, "before": float(before[k, k] / n), "after": float(after[k, k] / n), "n": n}
        for k, name in enumerate(names)
        if (n := int(before[k].sum()))
    ]
    return sorted(rows, key=lambda row: row["after"] - row["before"])


@dataclass(frozen=True)
class Paired:
    """Comparison of two classifiers on the same samples.

    Args:
        lost: number of samples that only the first classifies correctly.
        gained: number of samples that only the second classifies correctly.
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


def paired(before: NDArray[Any], after: NDArray[Any], labels: NDArray[Any]) -> Paired:
    """Compare two classifiers on the same samples by McNemar's exact test.

    Args:
        before, after: logits of the two classifiers, shape (N, K).
        labels: shape (N,), 0 <= label < K.

    Source: McNemar 1947, Psychometrika 12, 153-157; exact by the binomial distribution.
    """
    _check(before, labels)
    _check(after, labels)
    first, second = before.argmax(-1) == labels, after.argmax(-1) == labels
    lost, gained = int((first & ~second).sum()), int((~first & second).sum())
    p = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return Paired(lost, gained, len(labels), p)


def calibration(logits: NDArray[Any], labels: NDArray[Any], bins: int = 10) -> dict[str, Any]:
    """Return the expected calibration error and the bins of a reliability diagram.

    Args:
        logits: logits or probabilities, shape (N, K).
        labels: shape (N,), 0 <= label < K.
        bins: number of bins of equal width in the confidence.

    Returns:
        "ece": expected calibration error, 0 to 1; "bins": mean confidence, accuracy and n of each bin with samples.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    _check(logits, labels)
    weights = logits.astype(np.float64)
    if not are_probabilities(logits):
        weights = np.exp(weights - weights.max(-1, keepdims=True))
    confidence = (weights / weights.sum(-1, keepdims=True)).max(-1)
    correct = logits.argmax(-1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = [
        {"confidence": float(confidence[mask].mean()), "accuracy": float(correct[mask].mean()), "n": int(mask.sum())}
        for mask in (index == number for number in range(bins))
        if mask.any()
    ]
    ece = sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(labels)
    return {"ece": float(ece), "bins": rows}


def check_outputs(outputs: NDArray[Any], source: str = "model") -> None:
    """Check that every sample has a predicted class.

    A logit of -inf is allowed beside finite ones, since it excludes a class.

    Args:
        outputs: logits or probabilities, shape (N, K).
        source: "model", "reference" or "file", for the message.

    Raises:
        NumericError: a sample has NaN, +inf or no finite output.
    """
    invalid = np.isnan(outputs).any(-1) | np.isposinf(outputs).any(-1) | ~np.isfinite(outputs).any(-1)
    if invalid.any():
        raise NumericError(
            f"The {source} returns NaN or infinity for {int(invalid.sum())} of {len(outputs)} samples, first for "
            f"sample {int(invalid.argmax())}.",
            "The predicted class of these samples is undefined.",
            "Check the weights for NaN, and that the inputs are preprocessed as the model expects.",
        )


def _check(logits: NDArray[Any], labels: NDArray[Any]) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise DataError(
            f"The labels have shape {labels.shape} and type {labels.dtype}; expected class numbers, shape (N,).",
            fix="Give integers: labels.astype(int)."
            if labels.ndim == 1
            else "Give labels[:, 0] for a column, labels.argmax(-1) for one-hot rows, as integers.",
        )
    if logits.ndim != 2 or len(logits) != len(labels):  # noqa: PLR2004 - (N, K)
        raise ShapeError(
            f"Logits of shape {logits.shape} do not match labels of shape {labels.shape}.",
            fix="Pass logits of shape (N, K) and labels of shape (N,).",
        )
    if not len(labels):
        raise _no_samples()
    check_outputs(logits)
    wrong = (labels < 0) | (labels >= logits.shape[1])
    if wrong.any():
        raise DataError(
            f"Sample {int(wrong.argmax())} has the label {int(labels[wrong.argmax()])}.",
            f"The model has the classes 0 to {logits.shape[1] - 1}.",
            "Correct the label, or use a model with more classes.",
        )
