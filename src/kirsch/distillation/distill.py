"""Training of a student on the outputs of a teacher, or of a model on labels only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kirsch.annotations import value_phrase
from kirsch.arguments import accepts_arguments, checked
from kirsch.data.annotations import Data, Model, Regularizer, is_model
from kirsch.data.batches import ArrayData, Batch
from kirsch.distillation.checks import (
    check_single_samples,
    check_student,
    first_batch,
    first_samples,
    warning_of_missing_targets,
    warnings_of_divided_batches,
    warnings_of_unfinished_ramps,
)
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.evaluation import CHECKED, NOT_EVALUATED, Validation, evaluate_teacher
from kirsch.distillation.further_outputs import warning_of_unused_outputs
from kirsch.distillation.objective import Objective
from kirsch.distillation.probabilities import logits_converter
from kirsch.distillation.step import DistillationStep
from kirsch.distillation.store import TeacherStore
from kirsch.distillation.targets import check_labels
from kirsch.distillation.teachers import Teacher, one_or_more, with_store_views
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.progress import with_progress
from kirsch.frameworks.training import Trained, Training, TrainingHooks

if TYPE_CHECKING:
    from kirsch.frameworks.protocols import Framework


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
    progress: bool | None = None,
) -> Trained:
    """Train a student on the outputs of a teacher. The models that are passed do not change.

    Args:
        student: the model to train; a copy is trained.
        teacher: the model to learn from, which is run in inference mode, without gradient, on the same augmented
            samples. Or a list of teachers, which the objective combines; or a `TeacherStore` with outputs of a teacher.
        data: `ArrayData`, `GeneratedData`, a DataLoader, or another iterable of batches that can be iterated once per
            epoch. A batch is inputs, (inputs, targets), (inputs, targets, ids), or a dict with "labels", see
            `Batch.of`. Samples without a target, or with the target `objective.ignore_index`, have no label loss. All
            targets of `ArrayData` are checked before training, the targets of other data batch by batch.
        objective: the losses and their weights; by default `Objective.kd()`.
        training: by default `Training()`.
        validation: `ArrayData`, (inputs, labels) as arrays, a DataLoader, or a callable model → metrics, a dict of
            numbers by name.
        hooks: callbacks for events, stopping and checkpoints.
        regularizers: further loss terms that depend on the student only, such as `kirsch.Slimming(1e-4)`.
        check_teacher: raise an error if the teacher is no better than predictions that ignore the inputs.
        progress: show a line for each epoch and a bar during the epoch, on the standard error; warnings are shown as
            lines, too. None: only on a terminal and in a notebook.

    Returns:
        The student with the weights after the last epoch, which need not be those of the best validation, and its
        history. The field `first_batch` contains the share of each term in the loss and in
        the gradient of the first batch.

    Raises:
        UsageError: student and teacher are one object, a model does not run on the first batch, or a model returns
            probabilities that the objective does not declare.
        ShapeError: student and teacher return different numbers of classes, or, for a term, no adapter can convert
            the student's feature to the shape of the teacher's feature.
        UnknownNameError: a term names a layer that the model does not have.
        DataError: there are no samples, the label loss does not take the targets, the data is a dataset and not a
            loader, or a model does not take a batch.
        StoreError: a store was built from other data.
        NumericError: the teacher is not better than chance, a term has no gradient, or a loss, gradient or output is
            not finite.
    """
    objective, validation = objective or Objective.kd(), to_validation(validation)
    training, hooks = training or Training(), with_progress(hooks, progress)
    framework = framework_of(student)
    stored = isinstance(teacher, TeacherStore)
    if isinstance(teacher, TeacherStore):
        data = with_store_views(teacher, data)
    first = next(data.epoch(0, 0)) if stored else first_batch(framework.training, data)
    bound = Distiller(
        student, teacher, objective, first, seed=training.seed, regularizers=regularizers, warn=hooks.warn
    )
    if isinstance(data, ArrayData):
        bound.check_labels(data.targets)
    check_single_samples(framework.inference, student, data, first)
    hooks = with_validation(hooks, framework, validation, objective, [student])
    emit = hooks.event or (lambda _event: None)
    if check_teacher and objective.needs_logits and objective.label_loss in CHECKED:
        teachers = one_or_more(teacher)
        for index, model in enumerate(teachers):
            name = "The teacher" if len(teachers) == 1 else f"Teacher {index} (of {len(teachers)}, counted from 0)"
            metrics = evaluate_teacher(framework, model, data, validation, objective, hooks.warn, index, name)
            emit({"event": "teacher", **metrics})
            if not metrics and not stored:
                hooks.warn(NOT_EVALUATED.format(teacher=name))
    if any((row["student"], row["teacher"]) != ("logits", "logits") for row in bound.rows):
        emit({"event": "attached", "pairs": bound.rows})
    texts = warnings_of_divided_batches(objective, training) + warnings_of_unfinished_ramps(objective, training)
    # If the batches have unknown entries, the Distiller has already warned that there are no targets.
    if not bound.unknown_entries:
        texts += warning_of_missing_targets(first, objective)
    for text in texts:
        hooks.warn(text)
    try:
        trained = framework.training.train(bound.module, data, bound.step, training, hooks)
    finally:
        bound.close()
    warn_of_result(hooks)
    return trained


@checked
def fit(
    model: Model,
    data: Data,
    *,
    training: Training | None = None,
    validation: Any = None,
    hooks: TrainingHooks | None = None,
    regularizers: Sequence[Regularizer] = (),
    label_smoothing: float | None = None,
    objective: Objective | None = None,
    progress: bool | None = None,
) -> Trained:
    """Train a model on labels only; see `distill` for the arguments.

    Args:
        label_smoothing: see `Objective`; only without `objective`.
        objective: an objective without terms; by default `Objective.labels()`.

    Raises:
        UsageError: the objective has terms, which need a teacher, or `label_smoothing` is given together with
            `objective`.
    """
    objective, validation = _label_objective(objective, label_smoothing), to_validation(validation)
    training, hooks = training or Training(), with_progress(hooks, progress)
    framework = framework_of(model)
    first = first_batch(framework.training, data)
    targets, inputs = data.targets if isinstance(data, ArrayData) else first.targets, first_samples(first).inputs
    shape = check_student(framework.inference, model, first, objective)
    check_labels(targets, shape, objective)
    logits = logits_converter(framework.features, model, objective, (), inputs)
    check_single_samples(framework.inference, model, data, first)
    for text in warning_of_unused_outputs(framework.features, model, None, objective, (), inputs):
        hooks.warn(text)
    step = DistillationStep(framework.features, objective, regularizers=regularizers, logits_shape=shape)
    hooks = with_validation(hooks, framework, validation, objective, [model])
    trained = framework.training.train(
        framework.features.with_adapters(model, ("logits",), {}, {}, logits), data, step, training, hooks
    )
    warn_of_result(hooks)
    return trained


def _label_objective(objective: Objective | None, label_smoothing: float | None) -> Objective:
    """Return the objective of `fit`."""
    if objective is None:
        return Objective.labels(label_smoothing=label_smoothing or 0.0)
    if objective.terms:
        names = ", ".join(term.record_name for term in objective.terms)
        raise UsageError(
            f"The objective has the terms {names}, and kirsch.fit has no teacher to compare with.",
            "A model would be trained on the label loss alone.",
            "Use kirsch.distill with a teacher, or an objective without terms, such as kirsch.Objective.labels().",
        )
    if label_smoothing is not None:
        raise UsageError(
            "`label_smoothing` of kirsch.fit has no effect together with `objective`.",
            fix=f"Set it in the objective: kirsch.Objective.labels(label_smoothing={label_smoothing}).",
        )
    return objective


def to_validation(validation: Any) -> Any:
    """Return a validation as a callable, as an iterable of batches that can be iterated more than once, or None.

    Raises:
        UsageError: the validation is of another type.
    """
    if callable(validation) and (is_model(validation) or not accepts_arguments(validation, 1)):
        problem = "a model" if is_model(validation) else f"{value_phrase(validation)}, which does not take one argument"
        raise UsageError(
            f"`validation` is {problem}.",
            fix="Give (inputs, labels), batches, or a function: validation(model) → metrics by name.",
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
        raise UsageError(
            f"`validation` is {value_phrase(validation)}.",
            fix="Give ArrayData, (inputs, labels), a DataLoader, a list of batches, or a callable: model → metrics.",
        )
    return validation


def with_validation(
    hooks: TrainingHooks, framework: Framework, validation: Any, objective: Objective, students: Sequence[Any]
) -> TrainingHooks:
    """Return the hooks with a validation.

    Args:
        hooks: hooks of the run.
        framework: the framework of the students.
        validation: a validation that `to_validation` returned.
        objective: supplies the label loss.
        students: models to check the validation with.

    Raises:
        UsageError: the hooks have a `validate`, too.
        DataError: the label loss does not take the targets of the validation.
    """
    if validation is None:
        return hooks
    if hooks.validate is not None:
        raise UsageError(
            "Both `validation` and `hooks.validate` are given.",
            "A run has one validation.",
            "Leave one of them out. To compute further metrics, give a callable: model → metrics by name.",
        )
    if callable(validation):
        return dataclasses.replace(hooks, validate=validation)
    validate = Validation(framework, validation, objective)
    for student in students:
        validate.check(student)
    return dataclasses.replace(hooks, validate=validate)


def warn_of_result(hooks: TrainingHooks) -> None:
    """Warn if the trained model predicts one class for all samples."""
    if isinstance(hooks.validate, Validation) and (text := hooks.validate.warning()):
        hooks.warn(text)
