"""How good a teacher or a student is on labeled samples, compared with a model that does not look at its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.distillation.arrays import classes_last, map_arrays
from kirsch.distillation.checks import few
from kirsch.distillation.losses.labels import IGNORED
from kirsch.distillation.probabilities import stated_of, to_logits
from kirsch.distillation.store import TeacherStore
from kirsch.distillation.targets import check_batch
from kirsch.errors import DataError, NumericError
from kirsch.frameworks.data import ArrayData, Batch, batches_of, naming
from kirsch.frameworks.port import host
from kirsch.measurement.quality import Answers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from kirsch.distillation.objective import Objective
    from kirsch.frameworks.port import Framework

ENOUGH = 32
"""Samples from which on a teacher is refused that is no better than chance."""

FEW_OTHERS = 3
"""Of so many samples that are not of the most frequent class a teacher that knows anything is expected to find one."""

WANTED_OTHERS = 8
"""So many are looked for before a loader is no longer read."""

MOST_JUDGED = 1024
"""Samples on which a teacher is judged."""

UNJUDGED = (
    "The teacher is not evaluated, since no sample has a label: whether it knows anything of these inputs is not "
    "known. Give validation=(inputs, labels), or check_teacher=False to leave it at that."
)
"""Of a teacher whose accuracy cannot be told."""

CHECKED = ("cross-entropy", "binary", "squared-error")
"""Label losses by which a teacher can be evaluated."""

LEAST_SPREAD = 1e-9


def evaluate_teacher(
    framework: Framework,
    teacher: Any,
    data: Any,
    validation: Any,
    objective: Objective,
    doubt: Callable[[str], None],
    place: int = 0,
) -> dict[str, Any]:
    """How good a teacher is on some labeled samples; empty where none has a label.

    A `TeacherStore` is evaluated by its first view of the data that it was built from, since its teacher is not there.
    What cannot be told from chance, by two standard deviations, is warned of.

    Args:
        framework: of the teacher.
        teacher: a model or a store.
        data, validation: see `distill`; the validation counts where there is one.
        objective: by its label loss: the accuracy of classes, or of answers of yes or no, or R².
        doubt: is told warnings.
        place: of the teacher among several.

    Raises:
        NumericError: it is no better than a model that does not look at its inputs, or its outputs are not finite.
    """
    if isinstance(teacher, TeacherStore):
        found = _stored(teacher, data, objective)
    else:
        found = _live(framework, teacher, data, validation, objective, place)
    if not found:
        return {}
    if objective.label_loss == "squared-error":
        return _check_numbers(found)
    if objective.label_loss == "binary":
        return _check_yes_or_no(found, doubt)
    return _check_classes(found, doubt)


@dataclass(frozen=True)
class EvaluatedBatch:
    """What a model answers, and what is right, of a batch.

    Args:
        outputs: logits or numbers with the classes on the last axis, or class numbers where a store holds no more.
        targets: of the samples or positions.
        classes: how many there are.
    """

    outputs: NDArray[Any]
    targets: NDArray[Any]
    classes: int


# ------------------------------------------------------------------------------------------------ classes


def _check_classes(found: Sequence[EvaluatedBatch], doubt: Callable[[str], None]) -> dict[str, Any]:
    answers = Answers.of(
        np.concatenate([told.outputs for told in found]), np.concatenate([told.targets for told in found])
    )
    if not answers.n:
        return {}
    classes = max(found[0].classes, 1)
    others = answers.n - answers.most_frequent
    text = f"{answers.accuracy:.1%} of {answers.n} samples are right, chance is {answers.chance:.1%}"
    if answers.uneven:
        text += f" (the most frequent class has {answers.majority:.1%}); balanced accuracy {answers.balanced:.1%}"
    constant = answers.constant and answers.n > 1
    if constant:
        text += f". It answers class {answers.first} for every sample"
    guessing = answers.accuracy <= 1 / classes or (others >= FEW_OTHERS and answers.accuracy <= answers.chance)
    if answers.n >= ENOUGH and guessing and not (others == 0 and answers.accuracy == 1):
        raise NumericError(
            f"The teacher is no better than chance: {text}.",
            "A student would learn noise from it.",
            "Check the teacher's weights, the order of its classes, and that the inputs are prepared as it expects; "
            "check_teacher=False trains all the same.",
        )
    margin = 2 * math.sqrt(answers.chance * (1 - answers.chance) / answers.n)
    if answers.accuracy <= answers.chance + margin or constant:
        doubt(
            f"Whether the teacher knows more than chance is not known: {text}. Give more samples with labels, of all "
            "classes, as validation=(inputs, labels)."
        )
    known = {"accuracy": answers.accuracy, "classes": classes}
    return known | ({"balanced_accuracy": answers.balanced, "majority": answers.majority} if answers.uneven else {})


def _check_yes_or_no(found: Sequence[EvaluatedBatch], doubt: Callable[[str], None]) -> dict[str, Any]:
    """Of labels each by itself: how many answers are right, against those of a model that answers alike for all."""
    outputs, _ = rows_of(found)
    labels = answers_of_labels(found)
    if not labels:
        return {}
    count = sum(label.n for label in labels)
    right, chance = (_mean(labels, name) for name in ("accuracy", "chance"))
    others = sum(label.n - label.most_frequent for label in labels)
    text = f"{right:.1%} of {count} answers of yes or no are right, chance is {chance:.1%}"
    constant = all(label.constant for label in labels) and len(outputs) > 1
    if constant:
        said = {label.first for label in labels}
        text += f". It answers {'no' if said == {0} else 'yes' if said == {1} else 'the same'} for every sample"
    flat = bool((np.ptp(outputs, axis=0) <= LEAST_SPREAD * (1 + abs(outputs).max())).all())
    # Of several rare labels a useful teacher may say none: its logits differ all the same.
    hopeless = right <= chance + LEAST_SPREAD and (flat or len(labels) == 1 or not constant)
    if len(outputs) >= ENOUGH and others >= FEW_OTHERS and hopeless:
        raise NumericError(
            f"The teacher is no better than chance: {text}.",
            "A student would learn noise from it.",
            "Check the teacher's weights, the order of its labels, and that the inputs are prepared as it expects; "
            "check_teacher=False trains all the same.",
        )
    if right <= chance + 2 * math.sqrt(chance * (1 - chance) / count) or constant:
        doubt(
            f"Whether the teacher knows more than chance is not known: {text}. Compare its outputs with the labels, or "
            "give more samples with labels as validation=(inputs, labels)."
        )
    return {"accuracy": right, "chance": chance, "labels": len(labels)}


def rows_of(found: Sequence[EvaluatedBatch]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The outputs of all samples and positions as rows (n, K), and the targets beside them."""
    outputs = np.concatenate([told.outputs.reshape(-1, told.outputs.shape[-1]) for told in found])
    return outputs, np.concatenate([told.targets.reshape(-1, outputs.shape[-1]) for told in found])


def answers_of_labels(found: Sequence[EvaluatedBatch]) -> list[Answers]:
    """The answers of yes or no for each label of which any is known."""
    outputs, targets = rows_of(found)
    return [
        Answers.of((outputs[known, label] > 0).astype(int), (targets[known, label] > 1 / 2).astype(int))
        for label in range(outputs.shape[-1])
        if (known := targets[:, label] != IGNORED).any()
    ]


def _mean(labels: Sequence[Answers], name: str) -> float:
    """A property of the answers for several labels, averaged over all answers."""
    return float(sum(getattr(label, name) * label.n for label in labels) / sum(label.n for label in labels))


# ------------------------------------------------------------------------------------------------ numbers


def r_squared(found: Sequence[EvaluatedBatch]) -> float | None:
    """R² of numbers: 1 where they are right, 0 for their mean; None where the targets do not differ."""
    outputs, targets = (side.astype(np.float64) for side in rows_of(found))
    spread = ((targets - targets.mean(0)) ** 2).sum()
    return float(1 - ((outputs - targets) ** 2).sum() / spread) if spread > 0 else None


def _check_numbers(found: Sequence[EvaluatedBatch]) -> dict[str, Any]:
    fit, count = r_squared(found), sum(len(told.outputs) for told in found)
    if fit is None:
        return {}
    if count >= ENOUGH and fit <= LEAST_SPREAD:
        raise NumericError(
            f"The teacher is no better than the mean of the targets: its R² is {fit:.3g} on {count} samples.",
            "A student would learn noise from it.",
            "Check the teacher's weights, the scale of the targets, and that the inputs are prepared as it expects; "
            "check_teacher=False trains all the same.",
        )
    return {"r2": fit}


# ------------------------------------------------------------------------------------------------ answers


def _spread(samples: int) -> NDArray[np.int64]:
    """Places of the samples that a teacher is evaluated on: evenly spread, since data may be sorted by its labels."""
    return np.unique(np.linspace(0, samples - 1, min(samples, MOST_JUDGED)).round().astype(np.int64))


def _stored(store: TeacherStore, data: ArrayData, objective: Objective) -> list[EvaluatedBatch]:
    """What a store holds of some samples, beside their labels."""
    if data.targets is None or store.manifest.keep is None:
        return []
    places = _spread(data.samples)
    found = store.read(data.sample_ids[places])
    classes = store.manifest.classes or 0
    if "indices" not in found:
        scores = found["scores"] + found["maximum"][..., None]
        return [evaluated_batch(scores, data.targets[places], objective)]
    if objective.label_loss != "cross-entropy":
        return []
    return [EvaluatedBatch(*_counted(found["indices"][..., 0], host(data.targets[places]), objective), classes)]


def _live(
    framework: Framework, teacher: Any, data: Any, validation: Any, objective: Objective, place: int
) -> list[EvaluatedBatch]:
    """What a teacher answers for some samples that have labels."""
    source = validation if validation is not None and not callable(validation) else data
    if isinstance(source, ArrayData):
        batches: Iterable[Batch] = [Batch(source.inputs, source.targets)]
    else:
        batches = framework.seeded(lambda: _until_enough(source, objective), 0)
    found = []
    for number, batch in enumerate(batches, 1):
        places = _spread(len(batch))
        with naming(f"Batch {number} of the {'data' if source is data else 'validation'}"):
            outputs = framework.predict(teacher, _rows(batch.inputs, places))
            if not np.isfinite(outputs).all():
                raise NumericError(
                    "The teacher's scores are not finite.",
                    "A student would learn nothing from NaN or infinity.",
                    "Check the teacher's weights, and that the inputs are prepared as it expects.",
                )
            if batch.targets is not None:
                stated = stated_of(objective, place)
                found.append(evaluated_batch(outputs, host(batch.targets)[places], objective, stated))
    return found


def _rows(inputs: Any, places: NDArray[np.int64]) -> Any:
    """The inputs of some samples; what holds no samples stays."""
    return map_arrays(lambda part: part[places] if hasattr(part, "shape") else part, inputs)


def _until_enough(data: Any, objective: Objective) -> list[Batch]:
    """The first batches of a loader, until there are samples enough, and of more than one class."""
    batches: list[Batch] = []
    counts: dict[Any, int] = {}
    for batch in batches_of(data):
        batches.append(batch)
        samples = sum(map(len, batches))
        if batch.targets is None or objective.label_loss != "cross-entropy":
            others = WANTED_OTHERS
        else:
            targets = host(batch.targets)
            values, numbers = np.unique(targets[targets != objective.ignore], return_counts=True)
            for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
                counts[value] = counts.get(value, 0) + number
            others = sum(counts.values()) - max(counts.values(), default=0)
        if samples >= MOST_JUDGED or (samples >= ENOUGH and others >= WANTED_OTHERS):
            break
    return batches


def evaluated_batch(
    outputs: NDArray[Any], targets: Any, objective: Objective, stated: str | None = None
) -> EvaluatedBatch:
    """Answers and targets that count, of one batch.

    Args:
        outputs: of the model, numpy.
        targets: as the label loss of the objective takes them.
        objective: the label loss, what stands for no label, and whether positions predict the next one.
        stated: what the model puts out, as the objective says.

    Raises:
        DataError: the targets are not what the label loss takes.
    """
    targets = host(targets)
    check_batch(targets, outputs.shape[1:], objective)
    if objective.label_loss == "cross-entropy":
        rows = classes_last(outputs)
        return EvaluatedBatch(*_counted(rows.argmax(-1), targets, objective), rows.shape[-1])
    if stated == "probabilities" and objective.label_loss == "binary":
        outputs = to_logits(outputs, "sigmoid")
    rows = classes_last(outputs[:, None] if outputs.ndim == 1 else outputs)
    if targets.ndim == outputs.ndim:
        targets = classes_last(targets)
    return EvaluatedBatch(rows, targets.reshape(rows.shape), rows.shape[-1])


def _counted(likely: Any, targets: NDArray[Any], objective: Objective) -> tuple[NDArray[Any], NDArray[Any]]:
    """The answers and the targets of the samples or positions that have a label."""
    if likely.shape != targets.shape:
        raise DataError(
            f"The targets have shape {targets.shape}, and the teacher of the store answers for {likely.shape}.",
            fix="Give one class number for each place that the teacher answers for.",
        )
    if objective.causal:
        likely, targets = likely[:, :-1], targets[:, 1:]
    counts = targets.astype(np.int64) != objective.ignore
    return likely[counts], targets[counts]


class Validation:
    """Metrics of a model on labeled batches, as `TrainingHooks.validate` wants it.

    They are the accuracy of classes, with the balanced accuracy where classes are uneven; of labels of yes or no the
    accuracy; of numbers R².

    Args:
        framework: of the model.
        batches: that can be gone through again and again.
        objective: its label loss says which; what stands for no label, and whether positions predict the next one.
    """

    def __init__(self, framework: Framework, batches: Any, objective: Objective) -> None:
        self._framework, self._batches, self._objective = framework, batches, objective
        self._last: Answers | None = None

    def __call__(self, model: Any) -> dict[str, float]:
        """See the class.

        Raises:
            DataError: nothing of the validation has a label.
        """
        # A loader that shuffles draws from the random state of the run.
        found = self._framework.seeded(lambda: [self._told(model, batch, n) for n, batch in self._labelled()], 0)
        kind = self._objective.label_loss
        labels = answers_of_labels(found) if found and kind == "binary" else []
        if not sum(len(told.targets) for told in found) or (kind == "binary" and not labels):
            raise DataError(
                "Nothing of the validation has a label.",
                f"All its targets are {self._objective.ignore}, or there are none.",
                "Give some that have, or a callable: model → metrics by name.",
            )
        if kind == "binary":
            return {"accuracy": _mean(labels, "accuracy")}
        if kind == "squared-error":
            fit = r_squared(found)
            return {} if fit is None else {"r2": fit}
        answers, targets = ([getattr(told, name) for told in found] for name in ("outputs", "targets"))
        self._last = Answers.of(np.concatenate(answers), np.concatenate(targets))
        metrics = {"accuracy": self._last.accuracy}
        return metrics | ({"balanced_accuracy": self._last.balanced} if self._last.uneven else {})

    def _labelled(self) -> Iterator[tuple[int, Batch]]:
        """The batches with targets and their numbers, from 1 on."""
        batches = enumerate(batches_of(self._batches, "the validation"), 1)
        return ((number, batch) for number, batch in batches if batch.targets is not None)

    def _told(self, model: Any, batch: Batch, number: int) -> EvaluatedBatch:
        with naming(f"Batch {number} of the validation"):
            outputs = self._framework.predict(model, batch.inputs)
        try:
            return evaluated_batch(outputs, batch.targets, self._objective, self._objective.student_outputs)
        except DataError as error:
            raise DataError(
                f"Batch {number} of the validation does not fit. {error.what}",
                error.why,
                f"{error.fix} Or give validation as a callable: model → metrics by name.",
            ) from error

    def check(self, model: Any) -> None:
        """Refuse a validation that has no such metrics, by its first batch, before any training.

        Raises:
            DataError: its targets are of another kind than the label loss takes.
        """
        number, first = self._framework.seeded(lambda: next(self._labelled(), (0, None)), 0)
        if first is not None and self._objective.label_loss in CHECKED:
            self._told(model, few(first), number)

    def warning(self) -> str:
        """A sentence where the model answered one class for all samples when it was last validated; else empty."""
        last = self._last
        if last is None or not last.constant or last.most_frequent == last.n:
            return ""
        return (
            f"The trained model answers class {last.first} for all {last.n} samples of the validation, which has other "
            f"classes as well: accuracy {last.accuracy:.1%}, balanced accuracy {last.balanced:.1%}. It has not learned "
            "to tell the classes apart; lower the learning rate, train longer, or balance the classes."
        )
