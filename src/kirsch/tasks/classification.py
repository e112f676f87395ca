"""Classification with one class per sample: checks of labels and outputs, and metrics with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import DataError, ShapeError
from kirsch.measurement.outputs import are_probabilities, check_outputs
from kirsch.measurement.statistics import Paired, Rate, mcnemar, rate
from kirsch.tasks.class_numbers import check_class_numbers, fix_of_labels
from kirsch.tasks.task import TASKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.data.dataset import DataSet

UNEVEN = 1.5
"""Classes are imbalanced if the most frequent has at least this many times the mean number of samples per class."""


@dataclass(frozen=True)
class PredictionSummary:
    """Comparison of the predicted classes of a classifier with the labels.

    Args:
        n: number of samples.
        accuracy: fraction of correct predictions, 0 to 1.
        balanced: balanced accuracy, the mean recall over the classes that occur among the labels.
        chance: expected accuracy of random predictions that have the class frequencies of the classifier's predictions,
            but ignore the inputs. For a constant classifier it equals the accuracy. Cohen's kappa is
            (accuracy - chance) / (1 - chance).
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
    def of(cls, predictions: NDArray[Any], labels: NDArray[Any]) -> PredictionSummary:
        """Compare predicted classes with labels, both of shape (n,).

        Source: Cohen 1960, Educ. Psychol. Meas. 20, 37-46; Brodersen et al. 2010, ICPR, 3121-3124.
        """
        n = len(labels)
        if not n:
            return cls(0, 0.0, 0.0, 0.0, 0, 0, 0, constant=False)
        values, indices = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
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
            first=int(predictions[0]),
            constant=bool((n_predicted == n).any()),
        )


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


def compare_paired(before: NDArray[Any], after: NDArray[Any], labels: NDArray[Any]) -> Paired:
    """Compare two classifiers on the same samples by McNemar's exact test.

    Args:
        before, after: logits of the two classifiers, shape (N, K).
        labels: shape (N,), 0 <= label < K.

    Errors as in `accuracy`.
    """
    _check(before, labels)
    _check(after, labels)
    return mcnemar(before.argmax(-1) == labels, after.argmax(-1) == labels)


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


def _check(logits: NDArray[Any], labels: NDArray[Any]) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise DataError(
            f"The labels have shape {labels.shape} and type {labels.dtype}; expected class numbers, shape (N,).",
            fix="Give integers: labels.astype(int)."
            if labels.ndim == 1
            else fix_of_labels(labels, "The accuracy is that of one class per sample: give one class number for each."),
        )
    if logits.ndim != 2 or len(logits) != len(labels):  # noqa: PLR2004 - (N, K)
        raise ShapeError(
            f"Logits of shape {logits.shape} do not match labels of shape {labels.shape}.",
            fix="Pass logits of shape (N, K) and labels of shape (N,).",
        )
    if not len(labels):
        raise DataError("There are no samples to evaluate.", fix="Pass at least one sample.")
    check_outputs(logits)
    wrong = (labels < 0) | (labels >= logits.shape[1])
    if wrong.any():
        raise DataError(
            f"Sample {int(wrong.argmax())} has the label {int(labels[wrong.argmax()])}.",
            f"The model has the classes 0 to {logits.shape[1] - 1}.",
            "Correct the label, or use a model with more classes.",
        )


FEW_OTHERS = 3
"""Smallest number of samples outside the most frequent class for which `PredictionSummary.chance` is used. With fewer
such samples, chance is 1 / number of classes; otherwise, it is the larger of the two."""


@TASKS.register("classification")
class Classification:
    """One class per sample: logits (N, K), and class numbers (N,) as labels; see `kirsch.tasks.task.Task`."""

    label_loss = "cross-entropy"

    def check_data(self, data: DataSet) -> None:
        """Check that the labels in memory are one class number per sample, and that each class has training samples.

        Raises:
            DataError: labels have another shape or type or are out of range, or a class has no training sample.
        """
        for part, split in data.in_memory.items():
            check_class_numbers(split.labels, len(data.classes), f"of the {part} part of {data.name}")
        if data.is_stream:  # its labels are checked batch by batch in training
            return
        missing = sorted(set(range(len(data.classes))) - set(np.unique(data.train.labels).tolist()))
        if missing:
            raise DataError(
                f"The class {data.classes[missing[0]]!r} of {data.name} has no training sample.",
                f"No label of the train part is {missing[0]}.",
                "Add samples of this class, or remove the class and renumber the others.",
            )

    def check_outputs(self, outputs: NDArray[Any], data: DataSet) -> None:
        """Check that a model returns one logit for each class of the data."""
        if outputs.ndim != 2 or outputs.shape[1] != len(data.classes):  # noqa: PLR2004 - (N, K)
            raise ShapeError(
                f"The model returns logits of shape {outputs.shape[1:]}; the data {data.name} has "
                f"{len(data.classes)} classes.",
                fix="Give the model one output per class, or list its classes in kirsch.DataSet(classes=...).",
            )

    def decode(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Return the class with the largest logit of each sample, shape (N,)."""
        classes: NDArray[Any] = outputs.argmax(-1)
        return classes

    def evaluate(self, outputs: NDArray[Any], data: DataSet) -> dict[str, Any]:
        """Return the accuracy with its interval, the accuracy of chance, and whether all predictions are one class.

        The balanced accuracy is included if the classes are imbalanced.
        """
        labels = data.test.labels
        summary = PredictionSummary.of(self.decode(outputs), labels)
        others = summary.n - summary.most_frequent
        quality = {
            "accuracy": accuracy(outputs, labels).to_dict(),
            "chance": max(1 / len(data.classes), summary.chance if others >= FEW_OTHERS else 0.0),
            "one_class": summary.constant and others > 0,
        }
        return quality | ({"balanced_accuracy": summary.balanced} if summary.uneven else {})

    def weakness(self, quality: dict[str, Any]) -> tuple[str, str]:
        """Return numbers and a reason if a model predicts one class for all samples or is not better than chance.

        Otherwise, both texts are empty.
        """
        chance, value, n = quality["chance"], quality["accuracy"]["value"], quality["accuracy"]["n"]
        if not quality["one_class"] and value > chance:
            return "", ""
        balanced = quality.get("balanced_accuracy")
        more = "" if balanced is None else f", balanced accuracy {balanced:.1%}"
        reason = "It predicts one class for every sample." if quality["one_class"] else "It is not better than chance."
        return f"{value:.1%} of {n} correct, chance is {chance:.1%}{more}", reason

    def compare(self, before: NDArray[Any], after: NDArray[Any], data: DataSet) -> dict[str, Any]:
        """Return confusion matrices, lost classes, calibration, and the significance of the change of accuracy."""
        labels, names = data.test.labels, list(data.classes)
        tables = confusion(before, labels), confusion(after, labels)
        return {
            "classes": names,
            "before": {"confusion": tables[0].tolist()},
            "after": {"confusion": tables[1].tolist()},
            "lost": lost_classes(*tables, names),
            "calibration": {"before": calibration(before, labels), "after": calibration(after, labels)},
            "paired": compare_paired(before, after, labels).to_dict(),
        }
