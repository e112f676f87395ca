"""Metrics of a teacher or a student on labeled samples, compared with predictions that ignore the inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.data.arrays import host, map_arrays
from kirsch.data.batches import ArrayData, Batch, batches_of, naming
from kirsch.data.inputs import named_arrays
from kirsch.distillation.checks import first_samples
from kirsch.distillation.probabilities import declared_outputs, to_logits
from kirsch.distillation.store import TeacherStore
from kirsch.distillation.targets import check_evaluable, uses_labels
from kirsch.errors import DataError, NumericError
from kirsch.tasks.classification import PredictionSummary
from kirsch.tasks.label_losses import IGNORED
from kirsch.tasks.metrics import r_squared
from kirsch.tasks.next_token import next_labels, shift_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from kirsch.distillation.objective import Objective
    from kirsch.frameworks.protocols import Framework

ENOUGH = 32
"""Smallest number of samples for which a teacher that is no better than chance raises an error, not a warning."""

FEW_OTHERS = 3
"""Smallest number of samples outside the most frequent class for the comparison with chance.

A useful teacher is expected to predict at least one of them correctly.
"""

MOST_SAMPLES = 1024
"""Largest number of samples that are evaluated, of data in memory or of one batch of a loader.

The batches of a loader are read until the teacher is better than chance on at least `ENOUGH` samples, or until there
are this many samples. If no batch has targets, reading ends after `ENOUGH` samples.
"""

NOT_EVALUATED = (
    "{teacher} was not evaluated, since no sample has a label to compare with. Give validation=(inputs, labels), or "
    "check_teacher=False."
)
"""Warning for a teacher without labeled samples, to be formatted with the name of the teacher."""

CHECKED = ("cross-entropy", "binary", "squared-error")
"""Label losses with a metric."""

LEAST_SPREAD = 1e-9
"""Differences up to this number count as rounding errors."""


def evaluate_teacher(
    framework: Framework,
    teacher: Any,
    data: Any,
    validation: Any,
    objective: Objective,
    warn: Callable[[str], None],
    index: int = 0,
    name: str = "The teacher",
) -> dict[str, Any]:
    """Return the metrics of a teacher on some labeled samples; empty if no sample has a label.

    A `TeacherStore` is evaluated on the first view of the data from which it was built. A classifier that is at most
    two standard deviations better than chance, or that predicts one class for all samples, gives a warning.

    Args:
        framework: the framework of the teacher.
        teacher: a model or a store.
        data, validation: see `distill`; the data is used only if there are no validation batches.
        objective: its label loss determines the metric: accuracy of classes, accuracy of binary labels, or R².
        warn: called with each warning.
        index: index of the teacher among several.
        name: the teacher as the subject of a sentence, for errors and warnings.

    Raises:
        NumericError: the teacher is no better than a model that ignores its inputs, or its outputs are not finite.
    """
    try:
        if isinstance(teacher, TeacherStore):
            found = _stored_predictions(teacher, data, objective)
        else:
            found = _live_predictions(framework, teacher, data, validation, objective, index, name)
    except DataError:
        if uses_labels(objective) or (validation is not None and not callable(validation)):
            raise
        return {}  # the objective does not use the targets, so they may have any form
    return _checked_metrics(found, objective, warn, name)


@dataclass(frozen=True)
class EvaluatedBatch:
    """Predictions and targets of the labeled samples or positions of a batch.

    Args:
        outputs: predicted class numbers; for binary labels, logits (..., K); for regression, predicted values (..., K).
        targets: targets of the same samples or positions.
        classes: number of classes.
    """

    outputs: NDArray[Any]
    targets: NDArray[Any]
    classes: int


def _checked_metrics(
    found: Sequence[EvaluatedBatch], objective: Objective, warn: Callable[[str], None], name: str
) -> dict[str, Any]:
    """Return the metrics of predictions, after the comparison with chance; empty without labels."""
    if not found:
        return {}
    if objective.label_loss == "squared-error":
        return _check_regression(found, name)
    if objective.label_loss == "binary":
        return _check_binary(found, warn, name)
    return _check_classes(found, warn, name)


def _is_better_than_chance(found: Sequence[EvaluatedBatch], objective: Objective) -> bool:
    """Return whether the comparison with chance gives neither an error nor a warning."""
    warnings: list[str] = []
    try:
        return bool(_checked_metrics(found, objective, warnings.append, "")) and not warnings
    except NumericError:
        return False


# ------------------------------------------------------------------------------------------------ classes


def _check_classes(found: Sequence[EvaluatedBatch], warn: Callable[[str], None], name: str) -> dict[str, Any]:
    summary = PredictionSummary.of(
        np.concatenate([batch.outputs for batch in found]), np.concatenate([batch.targets for batch in found])
    )
    if not summary.n:
        return {}
    classes = max(found[0].classes, 1)
    others = summary.n - summary.most_frequent
    text = f"{summary.accuracy:.1%} of {summary.n} samples are correct, chance is {summary.chance:.1%}"
    if summary.uneven:
        text += f" (the most frequent class has {summary.majority:.1%}); balanced accuracy {summary.balanced:.1%}"
    constant = summary.constant and summary.n > 1
    if constant:
        text += f". It predicts class {summary.first} for every sample"
    guessing = summary.accuracy <= 1 / classes or (others >= FEW_OTHERS and summary.accuracy <= summary.chance)
    if summary.n >= ENOUGH and guessing and not (others == 0 and summary.accuracy == 1):
        raise NumericError(
            f"{name} is no better than chance: {text}.",
            "A student would learn noise from it.",
            "Check the teacher's weights, the order of its classes, and that the inputs are prepared as it expects; "
            "check_teacher=False skips this check.",
        )
    margin = 2 * math.sqrt(summary.chance * (1 - summary.chance) / summary.n)
    if summary.accuracy <= summary.chance + margin or constant:
        warn(
            f"{name} is not measurably better than chance: {text}. Give more labeled samples, of all classes, as "
            "validation=(inputs, labels)."
        )
    known = {"accuracy": summary.accuracy, "classes": classes}
    return known | ({"balanced_accuracy": summary.balanced, "majority": summary.majority} if summary.uneven else {})


def _check_binary(found: Sequence[EvaluatedBatch], warn: Callable[[str], None], name: str) -> dict[str, Any]:
    """Evaluate predictions of binary labels, and compare their accuracy with chance."""
    outputs, _ = _rows_of(found)
    labels = _summaries_by_label(found)
    if not labels:
        return {}
    count = sum(label.n for label in labels)
    right, chance = (_mean(labels, name) for name in ("accuracy", "chance"))
    others = sum(label.n - label.most_frequent for label in labels)
    text = f"{right:.1%} of {count} binary labels are predicted correctly, chance is {chance:.1%}"
    constant = all(label.constant for label in labels) and len(outputs) > 1
    if constant:
        first = {label.first for label in labels}
        text += f". It predicts {first.pop() if len(first) == 1 else 'the same'} for every sample"
    flat = bool((np.ptp(outputs, axis=0) <= LEAST_SPREAD * (1 + abs(outputs).max())).all())
    # With several rare labels a useful teacher may predict none of them; its logits still differ between samples.
    hopeless = right <= chance + LEAST_SPREAD and (flat or len(labels) == 1 or not constant)
    if len(outputs) >= ENOUGH and others >= FEW_OTHERS and hopeless:
        raise NumericError(
            f"{name} is no better than chance: {text}.",
            "A student would learn noise from it.",
            "Check the teacher's weights, the order of its labels, and that the inputs are prepared as it expects; "
            "check_teacher=False skips this check.",
        )
    if right <= chance + 2 * math.sqrt(chance * (1 - chance) / count) or constant:
        warn(
            f"{name} is not measurably better than chance: {text}. Give more labeled samples as "
            "validation=(inputs, labels)."
        )
    return {"accuracy": right, "chance": chance, "labels": len(labels)}


def _rows_of(found: Sequence[EvaluatedBatch]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return outputs and targets of all samples and positions as rows, shape (n, K)."""
    outputs = np.concatenate([batch.outputs.reshape(-1, batch.outputs.shape[-1]) for batch in found])
    return outputs, np.concatenate([batch.targets.reshape(-1, outputs.shape[-1]) for batch in found])


def _summaries_by_label(found: Sequence[EvaluatedBatch]) -> list[PredictionSummary]:
    """Return a summary of the predictions of each binary label, without labels that have no target in any sample."""
    outputs, targets = _rows_of(found)
    return [
        PredictionSummary.of((outputs[known, label] > 0).astype(int), (targets[known, label] > 1 / 2).astype(int))
        for label in range(outputs.shape[-1])
        if (known := targets[:, label] != IGNORED).any()
    ]


def _mean(labels: Sequence[PredictionSummary], name: str) -> float:
    """Return a metric, averaged over the predictions of all labels."""
    return float(sum(getattr(label, name) * label.n for label in labels) / sum(label.n for label in labels))


# ------------------------------------------------------------------------------------------------ regression


def _r_squared(found: Sequence[EvaluatedBatch]) -> float | None:
    """Return R² over all samples and positions; None if the targets do not differ."""
    return r_squared(*_rows_of(found))


def _check_regression(found: Sequence[EvaluatedBatch], name: str) -> dict[str, Any]:
    fit, count = _r_squared(found), sum(len(batch.outputs) for batch in found)
    if fit is None:
        return {}
    if count >= ENOUGH and fit <= LEAST_SPREAD:
        raise NumericError(
            f"{name} is no better than the mean of the targets: its R² is {fit:.3g} on {count} samples.",
            "A student would learn noise from it.",
            "Check the teacher's weights, the scale of the targets, and that the inputs are prepared as it expects; "
            "check_teacher=False skips this check.",
        )
    return {"r2": fit}


# ------------------------------------------------------------------------------------------------ predictions


def _evenly_spaced(samples: int) -> NDArray[np.int64]:
    """Return the indices of the samples to evaluate: evenly spread, since data may be sorted by label."""
    return np.unique(np.linspace(0, samples - 1, min(samples, MOST_SAMPLES)).round().astype(np.int64))


def _stored_predictions(store: TeacherStore, data: ArrayData, objective: Objective) -> list[EvaluatedBatch]:
    """Return the stored predictions of some samples, with their labels."""
    if data.targets is None or store.specification.keep is None:
        return []
    samples = _evenly_spaced(data.samples)
    found = store.read(data.sample_ids[samples])
    batch = Batch(data.rows(samples), data.targets[samples])
    classes = store.specification.classes or 0
    if "indices" not in found:
        return [evaluated_batch(found["scores"] + found["maximum"][..., None], batch, objective)]
    if objective.label_loss != "cross-entropy":
        return []
    return [EvaluatedBatch(*_select_labeled(found["indices"][..., 0], batch, objective), classes)]


def _live_predictions(
    framework: Framework, teacher: Any, data: Any, validation: Any, objective: Objective, index: int, name: str
) -> list[EvaluatedBatch]:
    """Return the predictions of a teacher for some labeled samples."""
    source = validation if validation is not None and not callable(validation) else data
    if isinstance(source, ArrayData):
        source = [Batch(source.inputs, source.targets)]

    def evaluate() -> list[EvaluatedBatch]:
        found: list[EvaluatedBatch] = []
        samples = 0
        for number, batch in enumerate(batches_of(source), 1):
            with naming(f"Batch {number} of the {'validation' if source is validation else 'data'}"):
                found += _evaluated(framework, teacher, batch, objective, index, name)
            samples += len(batch)
            if samples >= MOST_SAMPLES:
                break
            if samples >= ENOUGH and (not found or _is_better_than_chance(found, objective)):
                break
        return found

    return framework.training.seeded(evaluate, 0)  # type: ignore[no-any-return]


def _evaluated(
    framework: Framework, teacher: Any, batch: Batch, objective: Objective, index: int, name: str
) -> list[EvaluatedBatch]:
    """Return the predictions of a teacher for the samples of a batch; empty if the batch has no targets."""
    indices = _evenly_spaced(len(batch))
    inputs = map_arrays(lambda part: part[indices] if hasattr(part, "shape") else part, batch.inputs)
    outputs = framework.inference.predict(teacher, inputs)
    if not np.isfinite(outputs).all():
        if _contain_nan(inputs):
            raise NumericError("The inputs contain NaN.", fix="Repair the data.")
        raise NumericError(
            f"{name} returns outputs that are not finite.",
            "A student cannot learn from NaN or infinity.",
            "Check the teacher's weights, and that the inputs are prepared as it expects.",
        )
    if batch.targets is None:
        return []
    labeled = Batch(inputs, host(batch.targets)[indices])
    return [evaluated_batch(outputs, labeled, objective, declared_outputs(objective, index))]


def _contain_nan(inputs: Any) -> bool:
    """Return whether an array of the inputs has a NaN."""
    return any(bool(np.isnan(host(part)).any()) for part in named_arrays(inputs).values())


def evaluated_batch(
    outputs: NDArray[Any], batch: Batch, objective: Objective, declared: str | None = None
) -> EvaluatedBatch:
    """Return the predictions and targets of the labeled samples or positions of one batch.

    Args:
        outputs: outputs of the model, a numpy array.
        batch: inputs, and targets in the form that the label loss of the objective takes.
        objective: supplies the label loss, the index of ignored labels (`ignore_index`), and `causal`.
        declared: kind of the model's outputs that the objective declares: "logits", "probabilities" or None.

    Raises:
        DataError: the label loss does not take the targets.
    """
    targets = host(batch.targets)
    check_evaluable(targets, outputs.shape[1:], objective)
    if objective.label_loss == "cross-entropy":
        rows = ops.classes_last(outputs)
        return EvaluatedBatch(*_select_labeled(rows.argmax(-1), batch, objective), rows.shape[-1])
    if declared == "probabilities" and objective.label_loss == "binary":
        outputs = to_logits(outputs, "sigmoid")
    rows = ops.classes_last(outputs[:, None] if outputs.ndim == 1 else outputs)
    if targets.ndim == outputs.ndim:
        targets = ops.classes_last(targets)
    return EvaluatedBatch(rows, targets.reshape(rows.shape), rows.shape[-1])


def _select_labeled(predicted: Any, batch: Batch, objective: Objective) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return predicted and true class numbers of the samples or positions that have a label."""
    targets = host(batch.targets).astype(np.int64)
    if predicted.shape != targets.shape:
        raise DataError(
            f"The targets have shape {targets.shape}, and the predictions have shape {predicted.shape}.",
            fix="Give one class number for each of these predictions.",
        )
    if objective.causal:
        inputs = map_arrays(host, batch.inputs)
        predicted, targets = shift_logits(predicted), next_labels(targets, inputs, objective.ignore_index)
    counts = targets != objective.ignore_index
    return predicted[counts], targets[counts]


class Validation:
    """Computes metrics of a model on labeled batches, for `TrainingHooks.validate`.

    The metric follows from the label loss: accuracy of classes, with the balanced accuracy if classes are uneven;
    accuracy of binary labels; R² of a regression.

    Args:
        framework: the framework of the model.
        batches: an iterable of labeled batches that can be iterated more than once.
        objective: supplies the label loss, the index of ignored labels (`ignore_index`), and `causal`.
    """

    def __init__(self, framework: Framework, batches: Any, objective: Objective) -> None:
        self._framework, self._batches, self._objective = framework, batches, objective
        self._last: PredictionSummary | None = None

    def __call__(self, model: Any) -> dict[str, float]:
        """Return the metrics of a model by name.

        Raises:
            DataError: no sample of the validation has a label.
        """
        # `seeded` protects the random state of the run, from which a shuffling loader would draw.
        found = self._framework.training.seeded(
            lambda: [self._evaluate(model, batch, n) for n, batch in self._labeled()], 0
        )
        kind = self._objective.label_loss
        labels = _summaries_by_label(found) if found and kind == "binary" else []
        if not sum(len(batch.targets) for batch in found) or (kind == "binary" and not labels):
            raise DataError(
                "No sample of the validation has a label.",
                f"All its targets are {self._objective.ignore_index}, or there are none.",
                "Give labeled samples, or a callable: model → metrics by name.",
            )
        if kind == "binary":
            return {"accuracy": _mean(labels, "accuracy")}
        if kind == "squared-error":
            fit = _r_squared(found)
            return {} if fit is None else {"r2": fit}
        outputs, targets = ([getattr(batch, name) for batch in found] for name in ("outputs", "targets"))
        self._last = PredictionSummary.of(np.concatenate(outputs), np.concatenate(targets))
        metrics = {"accuracy": self._last.accuracy}
        return metrics | ({"balanced_accuracy": self._last.balanced} if self._last.uneven else {})

    def _labeled(self) -> Iterator[tuple[int, Batch]]:
        """Return pairs (number of the batch, batch) of the batches with targets; the first batch has the number 1."""
        batches = enumerate(batches_of(self._batches, "the validation"), 1)
        return ((number, batch) for number, batch in batches if batch.targets is not None)

    def _evaluate(self, model: Any, batch: Batch, number: int, part: str = "") -> EvaluatedBatch:
        name = f"Batch {number} of the validation{part}"
        with naming(name):
            outputs = self._framework.inference.predict(model, batch.inputs)
        try:
            return evaluated_batch(outputs, batch, self._objective, self._objective.student_outputs)
        except DataError as error:
            raise DataError(
                f"{name} does not fit. {error.what}",
                error.why,
                f"{error.fix} Or give validation as a callable: model → metrics by name.",
            ) from error

    def check(self, model: Any) -> None:
        """Check the targets of the first batch before training.

        Raises:
            DataError: the label loss does not take the targets.
        """
        number, first = self._framework.training.seeded(lambda: next(self._labeled(), (0, None)), 0)
        if first is not None and self._objective.label_loss in CHECKED:
            samples = first_samples(first)
            part = f" (its first {len(samples)} samples)" if len(samples) < len(first) else ""
            self._evaluate(model, samples, number, part)

    def warning(self) -> str:
        """Return a warning if the model predicted one class for all samples in the last validation; else ""."""
        last = self._last
        if last is None or not last.constant or last.most_frequent == last.n:
            return ""
        return (
            f"The trained model predicts class {last.first} for all {last.n} samples of the validation, although they "
            f"have different labels: accuracy {last.accuracy:.1%}, balanced accuracy {last.balanced:.1%}. The model "
            "has not learned to tell the classes apart; lower the learning rate, train longer, or balance the classes."
        )
