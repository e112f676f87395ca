"""Training a student on a teacher, or on labels alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kirsch.annotations import described
from kirsch.arguments import checked, takes
from kirsch.distillation.checks import (
    UNJUDGED,
    check_labels,
    correct,
    few,
    first_batch,
    judged,
    late_ramps,
    share_of,
    split_relations,
)
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.lesson import Lesson
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import TeacherStore
from kirsch.distillation.teachers import Teacher, one_or_more, replayed
from kirsch.errors import UsageError
from kirsch.frameworks.annotations import Data, Model, Regularizer
from kirsch.frameworks.data import ArrayData, Batch
from kirsch.frameworks.port import framework_of
from kirsch.frameworks.training import Trained, Training, TrainingHooks

if TYPE_CHECKING:
    from kirsch.frameworks.port import Framework


@checked
def distill(
    student: Model,
    teacher: Teacher,
    data: Data,
    *,
    objective: Objective | None = None,
    training: Training | None = None,
    validation: Any = None,
    hooks: TrainingHooks | None = None,
    regularizers: Sequence[Regularizer] = (),
    check_teacher: bool = True,
) -> Trained:
    """A student trained on what a teacher computes; all models given are left as they are.

    Args:
        student: the model that learns; a copy is trained.
        teacher: the model it learns from: used in inference mode, without gradient, on the same augmented samples. Or a
            list of several, which the objective combines; or a `TeacherStore` of what one put out.
        data: `ArrayData`, `GeneratedData`, a DataLoader, or anything that gives inputs, (inputs, targets), (inputs,
            targets, ids) or dicts each time it is gone through. Without targets, and for those equal to
            `objective.ignore`, nothing is charged for labels.
        objective: `Objective.kd()` if left out.
        training: `Training()` if left out.
        validation: `ArrayData`, (inputs, labels) as arrays, a DataLoader, or a callable model → metrics by name.
        hooks: events, stop, checkpoints.
        regularizers: further terms, such as `kirsch.pruning.regularizers.Slimming(1e-4)`.
        check_teacher: refuse a teacher that is no better than chance.

    Returns:
        The trained student with its history. `first_batch` has the shares of the terms in loss and gradient.

    Raises:
        UsageError: student and teacher are one object.
        ShapeError: they put out different numbers of classes, or two places are of shapes that no adapter joins.
        UnknownNameError: a model has no such site.
        DataError: there are no samples, the targets are no class numbers, or a label is out of range.
        StoreError: a store is of other data.
        NumericError: the teacher is no better than chance, a term gives no gradient, or numbers are not finite.
    """
    objective, validation = objective or Objective.kd(), to_validate_by(validation)
    training, hooks = training or Training(), hooks or TrainingHooks()
    framework = framework_of(student)
    stored = isinstance(teacher, TeacherStore)
    if isinstance(teacher, TeacherStore):
        data = replayed(teacher, data)
    first = next(data.epoch(0, 0)) if stored else first_batch(framework, data)
    bound = Distiller(
        student, teacher, objective, first, seed=training.seed, regularizers=regularizers, doubt=hooks.doubt
    )
    if isinstance(data, ArrayData):
        bound.check_labels(data.targets)
    tell = hooks.event or (lambda _event: None)
    if check_teacher and objective.scored and objective.label_loss == "cross-entropy":
        for model in one_or_more(teacher):
            known = judged(framework, model, data, validation, objective, hooks.doubt)
            tell({"event": "teacher", **known})
            if not known and not stored:
                hooks.doubt(UNJUDGED)
    if any((row["student"], row["teacher"]) != ("logits", "logits") for row in bound.rows):
        tell({"event": "attached", "pairs": bound.rows})
    for text in split_relations(objective, training) + late_ramps(objective, training):
        hooks.doubt(text)
    try:
        hooks = with_validation(hooks, framework, validation, objective)
        return framework.train(bound.pupil, data, bound.lesson, training, hooks)
    finally:
        bound.close()


@checked
def fit(
    model: Model,
    data: Data,
    *,
    training: Training | None = None,
    validation: Any = None,
    hooks: TrainingHooks | None = None,
    regularizers: Sequence[Regularizer] = (),
    label_smoothing: float = 0.0,
    objective: Objective | None = None,
) -> Trained:
    """A model trained on labels alone; see `distill` for the arguments."""
    objective, validation = objective or Objective.labels(label_smoothing), to_validate_by(validation)
    training, hooks = training or Training(), hooks or TrainingHooks()
    framework = framework_of(model)
    first = first_batch(framework, data)
    targets = data.targets if isinstance(data, ArrayData) else first.targets
    check_labels(targets, framework.predict(model, few(first).inputs).shape[1:], objective)
    lesson = Lesson(framework, objective, regularizers=regularizers)
    hooks = with_validation(hooks, framework, validation, objective)
    return framework.train(framework.pupil(model, ("logits",), {}, {}), data, lesson, training, hooks)


def to_validate_by(validation: Any) -> Any:
    """What is given to validate by, as a callable, as batches that can be gone through again and again, or None.

    Raises:
        UsageError: it is something else.
    """
    if callable(validation) and not takes(validation, 1):
        raise UsageError(
            f"`validation` is {described(validation)}, which does not take one argument.",
            mend="Write it as validation(model) → metrics by name.",
        )
    if validation is None or callable(validation):
        return validation
    if isinstance(validation, ArrayData):
        return [Batch(validation.inputs, validation.targets)]
    if isinstance(validation, Mapping):
        return [Batch.of(validation)]
    pair = isinstance(validation, (tuple, list)) and len(validation) == len(("inputs", "labels"))
    if pair and (isinstance(validation, tuple) or hasattr(validation[1], "shape")):
        return [Batch(*validation)]
    batches = hasattr(validation, "__iter__") and not hasattr(validation, "__next__")
    if not batches or isinstance(validation, tuple) or hasattr(validation, "shape"):
        parts = f" of {len(validation)}" if isinstance(validation, tuple) else ""
        raise UsageError(
            f"The validation is a {type(validation).__name__}{parts}.",
            mend="Give ArrayData, (inputs, labels), a DataLoader, a list of batches, or a callable: model → metrics.",
        )
    return validation


def with_validation(hooks: TrainingHooks, framework: Framework, validation: Any, objective: Objective) -> TrainingHooks:
    """The hooks, with a validation as `to_validate_by` gives it."""
    if validation is None or hooks.validate is not None:
        return hooks
    validate = validation
    if not callable(validation):

        def answers(model: Any) -> list[Any]:
            labelled = [batch for batch in map(Batch.of, validation) if batch.targets is not None]
            return [correct(framework.predict(model, batch.inputs), batch.targets, objective) for batch in labelled]

        def validate(model: Any) -> dict[str, float]:  # a loader that shuffles draws from the random state of the run
            return {"accuracy": share_of(framework.seeded(lambda: answers(model), 0), objective)}

    return dataclasses.replace(hooks, validate=validate)
