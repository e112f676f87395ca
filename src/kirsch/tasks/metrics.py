"""Metrics of a model's outputs by name: compared with labels, or with the outputs of the original model.

A larger value is better for each metric, so that the drop of a pruned model is the value of the original minus its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kirsch import ops
from kirsch.data.arrays import host
from kirsch.errors import DataError, NumericError, UnknownNameError, UsageError, error_text
from kirsch.measurement.outputs import are_probabilities
from kirsch.registry import Registry
from kirsch.tasks.classification import PredictionSummary
from kirsch.tasks.label_losses import IGNORED
from kirsch.tasks.next_token import next_labels, shift_logits, tokens_in
from kirsch.tasks.padding import MASK, counted_tokens, token_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

Reference = Literal["labels", "tokens", "original"]
"""What outputs are compared with: labels; input tokens if there are no labels; or outputs of the original."""

GIVEN = "given function"
"""Name of a metric that is a function of the user."""


@dataclass(frozen=True)
class Items:
    """The labeled samples or positions of a batch, reduced to what a metric needs.

    Args:
        values: arrays with one row for each item, the arguments of the metric's `value`.
        sample: index in the batch of the sample of each item, int64 of shape (items,).
    """

    values: tuple[NDArray[Any], ...]
    sample: NDArray[np.int64]


@dataclass(frozen=True)
class Metric:
    """A metric, computed batch by batch: `items` reduces the outputs of a batch, `value` uses the items of all batches.

    Args:
        name: name of the metric.
        reference: what the outputs are compared with.
        items: function (outputs, reference, inputs) → `Items`. `outputs` is a numpy array of logits or predicted values
            (N, ...); `reference` holds the labels, the tokens or the outputs of the original model.
        value: function of the arrays in `Items.values` → number, larger for better outputs.
        fraction: whether the value is a fraction up to 1, which is shown as percent.
        correct: function of the same arrays that returns which items are correct, if the value is their fraction.
    """

    name: str
    reference: Reference
    items: Callable[[NDArray[Any], NDArray[Any], Any], Items]
    value: Callable[..., float]
    fraction: bool = True
    correct: Callable[..., NDArray[np.bool_]] | None = None


ENOUGH = 32
"""Smallest number of outputs of which all lie between 0 and 1 that are taken for probabilities."""

METRICS: Registry[Metric] = Registry("metric")


def _register(metric: Metric) -> Metric:
    return METRICS.register(metric.name)(metric)


# ------------------------------------------------------------------------------------------------ classes


def _predicted_classes(outputs: NDArray[Any], labels: NDArray[Any], inputs: Any) -> Items:
    """Return predicted and true class numbers of the items that have a label."""
    del inputs
    rows = _rows_with_classes(outputs, labels)
    known = labels != IGNORED
    return Items((rows[known].argmax(-1), labels[known].astype(np.int64)), _samples(known))


def _rows_with_classes(outputs: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    """Return logits with the classes on the last axis, after a check that the labels are their class numbers."""
    rows: NDArray[Any] = ops.classes_last(outputs)
    if labels.dtype.kind not in "iu" or labels.shape != rows.shape[:-1]:
        raise DataError(
            f"The labels have shape {labels.shape} and type {labels.dtype}; the outputs have shape {outputs.shape}.",
            f"The metric needs one class number for each prediction, integers of shape {rows.shape[:-1]}.",
            "Give class numbers as labels, or another `metric`: 'r2' for numbers, 'binary_accuracy' for binary labels.",
        )
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= rows.shape[-1]))
    if wrong.any():
        raise DataError(
            f"A label is {int(labels[wrong][0])}.",
            f"The model has the classes 0 to {rows.shape[-1] - 1}.",
            f"Correct the labels. Use {IGNORED} for samples without a label.",
        )
    return rows


def _samples(known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the sample of each item, for a mask of items with the samples on its first axis."""
    return np.nonzero(known)[0].astype(np.int64)


def _are_equal(predicted: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(predicted == labels)


def _accuracy(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    return float((predicted == labels).mean())


def _balanced_accuracy(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    return PredictionSummary.of(predicted, labels).balanced


def weighted_accuracy(weights: Mapping[int, float]) -> Callable[[NDArray[Any], NDArray[Any]], float]:
    """Return a function of predicted and true class numbers: the mean recall of the classes, weighted by class.

    Args:
        weights: class number → weight; the weight of other classes is 1. Classes without a label do not count.
    """

    def value(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
        classes, index = np.unique(labels, return_inverse=True)
        recall = np.bincount(index, predicted == labels) / np.bincount(index)
        weight = np.array([weights.get(int(number), 1.0) for number in classes])
        if weight.sum() == 0:
            raise DataError(
                "Every class among the labels has the weight 0.",
                fix="Give a class that occurs in the data a weight above 0 in `class_weights`.",
            )
        return float((weight * recall).sum() / weight.sum())

    return value


ACCURACY = _register(Metric("accuracy", "labels", _predicted_classes, _accuracy, correct=_are_equal))
_register(Metric("balanced_accuracy", "labels", _predicted_classes, _balanced_accuracy))


def _log_probabilities(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Return the logarithm of the probabilities of the classes on the last axis, from logits or probabilities."""
    rows = rows.astype(np.float64)
    if are_probabilities(rows):
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(rows))
    return np.asarray(ops.log_softmax(rows))


def _log_likelihoods(outputs: NDArray[Any], labels: NDArray[Any], inputs: Any) -> Items:
    """Return the logarithm of the probability of the label of each item that has one."""
    del inputs
    log_p = _log_probabilities(_rows_with_classes(outputs, labels))
    known = labels != IGNORED
    chosen = np.take_along_axis(log_p, np.where(known, labels, 0)[..., None].astype(np.int64), -1)[..., 0]
    return Items((chosen[known],), _samples(known))


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean())


_register(Metric("log_likelihood", "labels", _log_likelihoods, _mean, fraction=False))


def _of_next_tokens(
    items: Callable[[NDArray[Any], NDArray[Any], Any], Items],
) -> Callable[[NDArray[Any], NDArray[Any], Any], Items]:
    """Return the items of a causal language model, whose position i predicts the token at position i + 1."""

    def shifted(outputs: NDArray[Any], labels: NDArray[Any], inputs: Any) -> Items:
        if outputs.ndim != len("NLK") or labels.shape != outputs.shape[:-1]:
            raise DataError(
                f"The labels have shape {labels.shape}; the outputs have shape {outputs.shape}.",
                "A metric of next tokens needs outputs (samples, tokens, vocabulary), and a label for each token.",
                "Give the tokens of the inputs as labels, or another `metric`.",
            )
        mask = token_mask(inputs, labels.shape)
        known = {} if mask is None else {MASK: host(mask)}
        return items(shift_logits(outputs), next_labels(labels, known, IGNORED), inputs)

    return shifted


_register(Metric("next_token_accuracy", "tokens", _of_next_tokens(_predicted_classes), _accuracy, correct=_are_equal))
_register(Metric("next_token_log_likelihood", "tokens", _of_next_tokens(_log_likelihoods), _mean, fraction=False))


# ------------------------------------------------------------------------------------------------ other labels


def _with_targets(outputs: NDArray[Any], targets: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return outputs and targets of the same shape (N, ..., K)."""
    outputs = outputs[:, None] if outputs.ndim == 1 else outputs
    if targets.shape == outputs.shape[:-1] and outputs.shape[-1] == 1:
        targets = targets[..., None]
    if targets.shape != outputs.shape:
        raise DataError(
            f"The labels have shape {targets.shape}; the outputs have shape {outputs.shape}.",
            "The metric needs a label for each output.",
            "Give labels of the shape of the outputs, or another `metric`: 'accuracy' for class numbers.",
        )
    return outputs, targets


def _binary_predictions(outputs: NDArray[Any], labels: NDArray[Any], inputs: Any) -> Items:
    """Return for each output with a binary label whether its logit has the sign of the label."""
    del inputs
    outputs, labels = _with_targets(outputs, labels)
    if outputs.size >= ENOUGH and ((outputs >= 0) & (outputs <= 1)).all():
        raise DataError(
            "All outputs are between 0 and 1, as probabilities are.",
            "The metric 'binary_accuracy' needs logits, which are above 0 for the label 1.",
            "Give a function: metric=lambda outputs, labels: ((outputs > 0.5) == labels).mean().",
        )
    known = labels != IGNORED
    return Items((((outputs > 0) == (labels > 1 / 2))[known],), _samples(known))


_register(Metric("binary_accuracy", "labels", _binary_predictions, _mean, correct=lambda correct: correct))


def r_squared(outputs: NDArray[Any], targets: NDArray[Any]) -> float | None:
    """Return R²: 1 for exact predictions, 0 for the mean of the targets; None if the targets do not differ.

    Args:
        outputs, targets: shape (n, K).
    """
    outputs, targets = outputs.astype(np.float64), targets.astype(np.float64)
    spread = ((targets - targets.mean(0)) ** 2).sum()
    return float(1 - ((outputs - targets) ** 2).sum() / spread) if spread > 0 else None


def _required_r_squared(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
    value = r_squared(outputs, targets)
    if value is None:
        raise DataError(
            "R² is not defined: the numbers to predict do not differ between the samples.",
            fix="Give more samples, or another `metric`.",
        )
    return value


def _predicted_numbers(outputs: NDArray[Any], targets: NDArray[Any], inputs: Any) -> Items:
    """Return predicted and true numbers of each sample or position that is not padding as rows, shape (items, K)."""
    outputs, targets = _with_targets(outputs, targets)
    counted = _counted(outputs, inputs, outputs.shape[:-1])
    return Items((outputs[counted], targets[counted]), _samples(counted))


_register(Metric("r2", "labels", _predicted_numbers, _required_r_squared))


# ------------------------------------------------------------------------------------------------ the original


def _same_classes(outputs: NDArray[Any], original: NDArray[Any], inputs: Any) -> Items:
    """Return for each sample or position that is not padding whether both models predict the same class."""
    same = ops.classes_last(outputs).argmax(-1) == ops.classes_last(original).argmax(-1)
    counted = _counted(outputs, inputs, same.shape)
    return Items((same[counted],), _samples(counted))


def _negative_divergences(outputs: NDArray[Any], original: NDArray[Any], inputs: Any) -> Items:
    """Return minus the KL divergence from the softmax of the original to that of the outputs, per item, in nats.

    Padding does not count.
    """
    log_q, log_p = (_log_probabilities(ops.classes_last(side)) for side in (outputs, original))
    p = np.exp(log_p)
    terms = np.where(p > 0, p * (np.where(p > 0, log_p, 0) - np.where(p > 0, log_q, 0)), 0)
    divergence = terms.sum(-1)
    counted = _counted(outputs, inputs, divergence.shape)
    return Items((-divergence[counted],), _samples(counted))


def _counted(outputs: NDArray[Any], inputs: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return whether each item counts, an array of this shape; padding does not."""
    tokens = counted_tokens(inputs, outputs.shape)
    return np.ones(shape, bool) if tokens is None else tokens


_register(Metric("agreement", "original", _same_classes, _mean, correct=lambda same: same))
_register(Metric("kl", "original", _negative_divergences, _mean, fraction=False))
_register(Metric("output_r2", "original", _predicted_numbers, _required_r_squared))


# ------------------------------------------------------------------------------------------------ choice

METRIC_OF_LOSS = {"cross-entropy": "accuracy", "binary": "binary_accuracy", "squared-error": "r2"}
"""Label loss of a task → the metric of its outputs."""


def metric_of(choice: str | Callable[..., Any], class_weights: Mapping[str | int, float] | None = None) -> Metric:
    """Return the metric of a name, or of a function (outputs, labels) → number, larger for better outputs.

    Args:
        choice: the name or the function. The function gets the outputs and the labels of all samples as numpy arrays.
        class_weights: class number → weight; accuracy becomes the weighted mean recall. None: no weights.

    Raises:
        UnknownNameError: there is no metric of this name.
        UsageError: class weights are given for another metric than accuracy, or for something else than class numbers.
    """
    if class_weights and choice not in ("accuracy", "balanced_accuracy"):
        raise UsageError(
            f"`class_weights` has no effect with the metric {choice if isinstance(choice, str) else GIVEN!r}.",
            "It weights the recall of classes.",
            "Remove it, or give metric='accuracy'.",
        )
    if callable(choice):
        return Metric(GIVEN, "labels", _unchanged, lambda *sides: _given_value(choice, *sides), fraction=False)
    found = METRICS[choice]
    if not class_weights:
        return found
    numbers = {class_number(key): weight for key, weight in class_weights.items()}
    return replace(ACCURACY, name="weighted accuracy", value=weighted_accuracy(numbers), correct=None)


def _unchanged(outputs: NDArray[Any], labels: NDArray[Any], inputs: Any) -> Items:
    del inputs
    return Items((outputs, labels), np.arange(len(outputs)))


def _given_value(metric: Callable[..., Any], outputs: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the result of a user's metric as a number."""
    try:
        result = metric(outputs, labels)
    except Exception as error:  # the code of the user may raise anything
        raise UsageError(
            f"The function `metric` fails on outputs of shape {outputs.shape} and labels of shape {labels.shape}.",
            error_text(error),
            "Give a function (outputs, labels) → number of two numpy arrays.",
        ) from error
    try:
        number = float(result)
    except (TypeError, ValueError):
        raise UsageError(
            f"The function `metric` returns a {type(result).__name__}.",
            fix="Return a number, larger for better outputs.",
        ) from None
    if not np.isfinite(number):
        raise NumericError(f"The function `metric` returns {number}.", fix="Return a finite number for all outputs.")
    return number


def class_number(key: str | int) -> int:
    """Return the class number of a key of class weights, such as "3" of a JSON file.

    Raises:
        UsageError: the key is the name of a class.
    """
    if isinstance(key, str) and not (key.isascii() and key.isdigit()):
        raise UsageError(
            f"`class_weights` names the class {key!r}.",
            "Without names of classes in the data, classes are numbers from 0 on.",
            "Give class numbers, such as {3: 2.0}.",
        )
    return int(key)


def class_numbers(weights: Mapping[str | int, float] | None, names: Any) -> dict[str | int, float] | None:
    """Return class weights with the names of classes replaced by class numbers.

    Args:
        weights: class name or number → weight, or None.
        names: names of the classes, in the order of the outputs.

    Raises:
        UnknownNameError: the data have names of classes, and this is none of them.
    """
    if weights is None:
        return None
    numbers = {name: number for number, name in enumerate(names)}
    for key in weights if numbers else ():
        if isinstance(key, str) and key not in numbers and not key.isdigit():
            raise UnknownNameError("class", key, numbers, argument="class_weights")
    return {numbers.get(key, key) if isinstance(key, str) else key: weight for key, weight in weights.items()}


def default_metric(outputs: NDArray[Any], labels: NDArray[Any] | None, inputs: Any) -> str:
    """Return the name of the metric that fits the form of the labels of a batch.

    Args:
        outputs: outputs of the model for the batch.
        labels: labels of the batch; None if there are none.
        inputs: inputs of the batch; if they contain the labels as `input_ids`, the model predicts next tokens.

    Returns:
        With integers for each prediction, "accuracy", or "next_token_accuracy" for tokens; with integers for each
        output, "binary_accuracy"; with other labels, "r2". Without labels, "kl" for several outputs, else "output_r2".
    """
    several = outputs.ndim > 1 and outputs.shape[-1] > 1
    if labels is None:
        return "kl" if several else "output_r2"
    tokens = tokens_in(inputs)
    if tokens is not None and tuple(tokens.shape) == labels.shape and outputs.ndim == len("NLK"):
        same = (labels == host(tokens)) | (labels == IGNORED)
        return "next_token_accuracy" if same.all() else "accuracy"
    if labels.dtype.kind not in "iub":
        return "r2"
    return "accuracy" if several and labels.shape == ops.classes_last(outputs).shape[:-1] else "binary_accuracy"
