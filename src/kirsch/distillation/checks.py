"""What is looked at before a student is trained: the first batch, the labels, and what the teacher knows."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.distillation.arrays import classes_last, each
from kirsch.distillation.attach import of_all
from kirsch.distillation.losses.loss import given_to, loss_of
from kirsch.distillation.schedule import Ramp
from kirsch.distillation.store import TeacherStore
from kirsch.errors import DataError, NumericError, UsageError
from kirsch.frameworks.data import ArrayData, Batch
from kirsch.frameworks.port import host

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kirsch.distillation.objective import Objective
    from kirsch.frameworks.port import Framework
    from kirsch.frameworks.training import Training

ENOUGH = 32
"""Samples from which on a teacher's accuracy is held against chance."""

FEW = 8
"""Samples of the run that finds the shapes at all sites."""

MOST_JUDGED = 1024
"""Samples on which a teacher is judged."""

UNJUDGED = (
    "The teacher is not held against chance, since no sample has a label: whether it knows anything of these inputs is "
    "not known. Give validation=(inputs, labels), or check_teacher=False to leave it at that."
)
"""Of a teacher whose accuracy cannot be told."""


def first_batch(framework: Framework, data: Any) -> Batch:
    """The first batch of the data, as it is without augmentation where the data lies in memory.

    Raises:
        DataError: there is none, or the data can be gone through only once.
    """
    if isinstance(data, ArrayData):
        end = data.batch_size
        return Batch(data.rows(slice(end)), None if data.targets is None else data.targets[:end], data.sample_ids[:end])

    def fetch() -> Any:
        batches = iter(data)
        if batches is data:
            raise DataError(
                "The data can be gone through only once.",
                "Each epoch goes through it anew.",
                "Give a list or a DataLoader.",
            )
        return next(batches, None)

    first = framework.seeded(fetch, 0)  # a loader that shuffles draws from the caller's random state
    if first is None:
        raise DataError("The data is empty.", mend="Give at least one batch.")
    return Batch.of(first)


def few(batch: Batch) -> Batch:
    """Some samples of a batch."""
    return dataclasses.replace(
        batch,
        inputs=each(lambda part: part[:FEW] if hasattr(part, "shape") else part, batch.inputs),  # else a switch
        targets=None if batch.targets is None else batch.targets[:FEW],
        ids=None if batch.ids is None else batch.ids[:FEW],
        seeds=None if batch.seeds is None else batch.seeds[:FEW],
    )


def check_labels(given: Any, shape: tuple[int, ...], objective: Objective) -> None:
    """Refuse targets that are no class numbers where the objective charges for such.

    Args:
        given: the targets; None where there are none.
        shape: of the scores of one sample.
        objective: what the targets are for.

    Raises:
        DataError: they are of another kind or out of range, or there is nothing else to learn from.
        UsageError: positions shall predict the next, and there are none.
    """
    if objective.causal and len(shape) == 1:
        raise UsageError(
            f"The objective is causal, and the student puts out {shape[0]} scores a sample.",
            "Where each position predicts the next, there are scores for each position.",
            "Leave causal out, or give a model of sequences.",
        )
    if given is None:
        if not objective.terms:
            raise DataError("The data has no targets, and there is no teacher.", mend="Give (inputs, targets).")
        return
    targets = host(given)
    if objective.label_loss != "cross-entropy":
        return
    if targets.ndim != len(shape) or not np.issubdtype(targets.dtype, np.integer):
        raise DataError(
            f"The targets have shape {targets.shape} and type {targets.dtype}.",
            f"They must be class numbers: one whole number a {'sample' if len(shape) == 1 else 'position'}.",
            "Of one-hot rows give targets.argmax(-1).",
        )
    without = [term for term in objective.terms if "labels" not in given_to(loss_of(term.loss))]
    if not without and not (targets != objective.ignore).any():
        raise DataError(
            f"All targets are masked: each of the {len(targets)} samples looked at has the label {objective.ignore}.",
            "No term does without them, so there is nothing to learn from.",
            "Look at the mask and the labels of the data.",
        )
    classes = shape[0] if len(shape) >= len("KHW") else shape[-1]
    wrong = ((targets < 0) | (targets >= classes)) & (targets != objective.ignore)
    if wrong.any():
        place = int(wrong.reshape(len(targets), -1).any(axis=1).argmax())
        raise DataError(
            f"Sample {place} has the label {int(targets[wrong][0])}.",
            f"The model puts out {classes} classes, so labels go from 0 to {classes - 1}.",
            f"Repair the labels, or give the model a larger head; {objective.ignore} stands for no label.",
        )


def split_relations(objective: Objective, training: Training) -> list[str]:
    """A doubt about each term that parts of a batch do not add up to, where a step has several batches."""
    return [
        f"The term {term.called!r} relates the samples of a batch to each other. Of the {training.accumulate} "
        "batches of a step it sees one at a time, so that it is not what one large batch would give."
        for term in objective.terms
        if training.accumulate > 1 and (loss_of(term.loss).relational or loss_of(term.loss).over == "contents")
    ]


def late_ramps(objective: Objective, training: Training) -> list[str]:
    """A doubt about each weight that has not come to its end when the run has."""
    weights = [("the labels", objective.label_weight)]
    weights += [(f"the term {term.called!r}", term.weight) for term in objective.terms]
    return [
        f"The weight of {name} comes to {weight.end:g} after {weight.after + weight.epochs:g} epochs, and the run ends "
        f"after {training.epochs}, with {weight.at(training.epochs):.3g}. Give a Ramp that is a like part of these."
        for name, weight in weights
        if isinstance(weight, Ramp) and weight.after + weight.epochs > training.epochs
    ]


def mixed_scores(objective: Objective, teachers: int) -> list[str]:
    """A doubt about probabilities of several teachers that are multiplied, and not mixed."""
    activations = {loss_of(term.loss).activation for term in objective.terms if of_all(term)}
    if objective.teachers != "logits" or teachers == 1 or not activations - {"identity"}:
        return []
    text = (
        f"The scores of the {teachers} teachers are averaged, which says the product of what they say, and no mixture: "
        'one that is sure outvotes the others. Combined as "probabilities" they are a mixture.'
    )
    return [text]


def judged(
    framework: Framework,
    teacher: Any,
    data: Any,
    validation: Any,
    objective: Objective,
    doubt: Callable[[str], None],
) -> dict[str, Any]:
    """The accuracy of a teacher on some labelled samples, and the number of classes; empty where none has a label.

    A `TeacherStore` is judged by its first view of the data that it was built from, since its teacher is not there.
    What cannot be told from chance, by two standard deviations, is doubted.

    Raises:
        NumericError: it is no better than chance, or its scores are not finite.
    """
    if isinstance(teacher, TeacherStore):
        right, classes = _stored(teacher, data, objective), teacher.manifest.classes or 0
    else:
        right, classes = _live(framework, teacher, data, validation, objective)
    if not len(right):
        return {}
    share, chance = float(right.mean()), 1 / classes
    if len(right) >= ENOUGH and share <= chance:
        raise NumericError(
            f"The teacher is no better than chance: {share:.1%} of {len(right)} samples are right, "
            f"chance is {chance:.1%}.",
            "A student would learn noise from it.",
            "Check the teacher's weights, the order of its classes, and that the inputs are prepared as it expects.",
        )
    if share <= chance + 2 * math.sqrt(chance * (1 - chance) / len(right)):
        doubt(
            f"Whether the teacher knows more than chance is not known: {share:.1%} of {len(right)} samples are right, "
            f"chance is {chance:.1%}. Give more samples with labels, as validation=(inputs, labels)."
        )
    return {"accuracy": share, "classes": classes}


NOTHING = np.zeros(0, np.bool_)


def _spread(samples: int) -> NDArray[np.int64]:
    """Places of the samples that a teacher is judged on: evenly spread, since data may be sorted by its labels."""
    return np.unique(np.linspace(0, samples - 1, min(samples, MOST_JUDGED)).round().astype(np.int64))


def _stored(store: TeacherStore, data: ArrayData, objective: Objective) -> NDArray[np.bool_]:
    """Whether a store's most likely class is the right one, of some samples; see `correct`."""
    if data.targets is None or store.manifest.keep is None:
        return NOTHING
    places = _spread(data.samples)
    found = store.read(data.sample_ids[places])
    if "indices" in found:
        return _right(found["indices"][..., 0], data.targets[places], objective)
    return correct(found["scores"] + found["maximum"][..., None], data.targets[places], objective)


def _live(
    framework: Framework, teacher: Any, data: Any, validation: Any, objective: Objective
) -> tuple[NDArray[np.bool_], int]:
    """Whether a teacher's most likely class is the right one, of some samples, and how many classes there are."""
    source = validation if validation is not None and not callable(validation) else data
    if isinstance(source, ArrayData):
        batches = [Batch(source.inputs, source.targets)]
    else:
        batches = framework.seeded(lambda: _until_enough(source), 0)
    found = [_judged_on(framework, teacher, batch, objective) for batch in batches]
    return np.concatenate([right for right, _ in found]), found[0][1]


def _until_enough(data: Any) -> list[Batch]:
    """The first batches of a loader, until there are samples enough."""
    batches: list[Batch] = []
    for given in data:
        batches.append(Batch.of(given))
        if sum(len(batch) for batch in batches) >= ENOUGH:
            break
    return batches


def _judged_on(framework: Framework, teacher: Any, batch: Batch, objective: Objective) -> tuple[NDArray[np.bool_], int]:
    places = _spread(len(batch))
    some = each(lambda part: part[places] if hasattr(part, "shape") else part, batch.inputs)
    scores = framework.predict(teacher, some)
    if not np.isfinite(scores).all():
        raise NumericError(
            "The teacher's scores are not finite.",
            "A student would learn nothing from NaN or infinity.",
            "Check the teacher's weights, and that the inputs are prepared as it expects.",
        )
    right = NOTHING if batch.targets is None else correct(scores, host(batch.targets)[places], objective)
    return right, classes_last(scores).shape[-1]


def share_of(right: Sequence[NDArray[np.bool_]], objective: Objective) -> float:
    """The share of what counts that is right, of batches as `correct` gives them.

    Raises:
        DataError: nothing counts.
    """
    counted = sum(len(part) for part in right)
    if not counted:
        raise DataError(
            "Nothing of the validation has a label.",
            f"All its targets are {objective.ignore}, or there are none.",
            "Give some that have, or a callable: model → metrics by name.",
        )
    return sum(int(part.sum()) for part in right) / counted


def correct(scores: Any, targets: Any, objective: Objective) -> NDArray[np.bool_]:
    """Whether the most likely class is the right one, of each sample, position or pixel that counts.

    Args:
        scores: shape (N, K), (N, L, K) or (N, K, H, W), numpy.
        targets: class numbers, one for each; positions are shifted as the objective says.
        objective: whether positions predict the next one, and what stands for no label.

    Raises:
        DataError: the targets are no class numbers.
    """
    return _right(classes_last(scores).argmax(-1), targets, objective)


def _right(likely: Any, targets: Any, objective: Objective) -> NDArray[np.bool_]:
    targets = host(targets)
    if likely.shape != targets.shape or not np.issubdtype(targets.dtype, np.integer):
        raise DataError(
            f"The targets to validate by have shape {targets.shape} and type {targets.dtype}.",
            f"Accuracy is that of class numbers, of shape {likely.shape}.",
            "Give validation as a callable: model → metrics by name.",
        )
    if objective.causal:
        likely, targets = likely[:, :-1], targets[:, 1:]
    right: NDArray[np.bool_] = (likely == targets)[targets != objective.ignore]
    return right
