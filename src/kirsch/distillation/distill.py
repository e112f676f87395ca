"""Training a student on a teacher, or on labels alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kirsch.distillation.losses import LOSSES, hard_label
from kirsch.distillation.objective import Objective
from kirsch.errors import DataError, NumericError, ShapeError, UsageError
from kirsch.frameworks.port import Framework, framework_of, host
from kirsch.frameworks.training import ArrayData, Trained, Training, TrainingHooks

Regularizer = Callable[[Any], Any]
"""model → scalar with gradient, added to the loss as it is."""

ENOUGH = 32
"""Samples from which on a teacher's accuracy is held against chance."""


def distill(
    student: Any,
    teacher: Any,
    data: Any,
    *,
    objective: Objective | None = None,
    training: Training | None = None,
    validation: Any = None,
    hooks: TrainingHooks | None = None,
    regularizers: Sequence[Regularizer] = (),
    check_teacher: bool = True,
) -> Trained:
    """A student trained on the scores of a teacher; both models given are left as they are.

    Args:
        student: the model that learns; a copy is trained.
        teacher: the model it learns from: used in inference mode, without gradient.
        data: `ArrayData`, a DataLoader, or anything that gives (inputs, targets) each time it is gone through.
        objective: `Objective.kd()` if left out.
        training: `Training()` if left out.
        validation: `ArrayData`, (inputs, labels) as arrays, or a callable model → metrics by name.
        hooks: events, stop, checkpoints.
        regularizers: further terms, such as `kirsch.pruning.regularizers.Slimming(1e-4)`.
        check_teacher: refuse a teacher that is no better than chance.

    Returns:
        The trained student with its history. `first_batch` has the shares of the terms in loss and gradient.

    Raises:
        UsageError: student and teacher are one object.
        ShapeError: they put out different numbers of classes.
        DataError: there are no samples, the targets are no class numbers, or a label is out of range.
        NumericError: the teacher is no better than chance, a term gives no gradient, or numbers are not finite.
    """
    if student is teacher:
        raise UsageError(
            "Student and teacher are the same object.", mend="Give the student as a copy: copy.deepcopy(teacher)."
        )
    framework = framework_of(student)
    guide = framework_of(teacher).frozen(teacher)
    inputs, targets = _first(framework, data)
    classes = _classes(framework, student, guide, inputs)
    _check_labels(data.targets if isinstance(data, ArrayData) else targets, classes)
    hooks = hooks or TrainingHooks()
    if check_teacher:
        accuracy = _check_teacher(framework, guide, data, validation, classes)
        if hooks.event is not None:
            hooks.event({"event": "teacher", "accuracy": accuracy, "classes": classes})
    loss = _Loss(framework, objective or Objective.kd(), guide, regularizers)
    return framework.train(student, data, loss, training or Training(), _with_validation(hooks, framework, validation))


def fit(
    model: Any,
    data: Any,
    *,
    training: Training | None = None,
    validation: Any = None,
    hooks: TrainingHooks | None = None,
    regularizers: Sequence[Regularizer] = (),
    label_smoothing: float = 0.0,
) -> Trained:
    """A model trained on labels alone; see `distill` for the arguments."""
    framework = framework_of(model)
    inputs, targets = _first(framework, data)
    classes = int(framework.predict(model, inputs).shape[-1])
    _check_labels(data.targets if isinstance(data, ArrayData) else targets, classes)
    loss = _Loss(framework, Objective.labels(label_smoothing), None, regularizers)
    hooks = _with_validation(hooks or TrainingHooks(), framework, validation)
    return framework.train(model, data, loss, training or Training(), hooks)


class _Loss:
    """The objective as a training step calls it."""

    def __init__(
        self, framework: Framework, objective: Objective, teacher: Any, regularizers: Sequence[Regularizer]
    ) -> None:
        self._framework = framework
        self._objective = objective
        self._teacher = teacher
        self._regularizers = regularizers

    def __call__(self, model: Any, inputs: Any, targets: Any) -> tuple[Any, dict[str, Any]]:
        objective = self._objective
        student = self._framework.scores(model, inputs)
        parts: dict[str, Any] = {}
        if objective.label_weight:
            _add(parts, "label", objective.label_weight * self._label(student, targets))
        terms = [term for term in objective.terms if term.weight]
        if terms:
            teacher = self._framework.infer(self._teacher, inputs)
            for term in terms:
                loss = LOSSES[term.loss](student, teacher, temperature=term.temperature)
                _add(parts, term.loss, term.weight * loss)
        for regularizer in self._regularizers:
            _add(parts, type(regularizer).__name__, regularizer(model))
        return sum(parts.values()), parts

    def _label(self, student: Any, targets: Any) -> Any:
        try:
            return hard_label(student, targets, label_smoothing=self._objective.label_smoothing)
        except (IndexError, RuntimeError):
            _check_labels(targets, int(student.shape[-1]))  # only the labels of the first batch were looked at before
            raise


def _add(parts: dict[str, Any], name: str, part: Any) -> None:
    """Add a part under its name; the second of a name is "name#2", so that none takes another's place."""
    number = 1 + sum(known.partition("#")[0] == name for known in parts)
    parts[name if number == 1 else f"{name}#{number}"] = part


def _first(framework: Framework, data: Any) -> tuple[Any, Any]:
    """The first batch."""
    if isinstance(data, ArrayData):
        return data.inputs[: data.batch_size], None if data.targets is None else data.targets[: data.batch_size]

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
    inputs, targets = first
    return inputs, targets


def _classes(framework: Framework, student: Any, teacher: Any, inputs: Any) -> int:
    mine, theirs = (framework.predict(model, inputs).shape[1:] for model in (student, teacher))
    if mine != theirs:
        raise ShapeError(
            f"The student puts out {_counted(mine)}, the teacher {_counted(theirs)}.",
            "Soft targets need the same classes in the same order.",
            "Give one of them a head for the classes of the other.",
        )
    return int(mine[-1])


def _counted(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} classes" if len(shape) == 1 else f"scores of shape {shape} a sample"


def _check_labels(given: Any, classes: int) -> None:
    targets = host(given)
    if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
        raise DataError(
            f"The targets have shape {targets.shape} and type {targets.dtype}.",
            "They must be class numbers: one whole number a sample.",
            "Of one-hot rows give targets.argmax(-1).",
        )
    wrong = (targets < 0) | (targets >= classes)
    if wrong.any():
        raise DataError(
            f"Sample {int(wrong.argmax())} has the label {int(targets[wrong.argmax()])}.",
            f"The model puts out {classes} classes, so labels go from 0 to {classes - 1}.",
            "Repair the labels, or give the model a larger head.",
        )


def _check_teacher(framework: Framework, teacher: Any, data: Any, validation: Any, classes: int) -> float:
    """The teacher's accuracy on some samples; an error if it is no better than chance."""
    if isinstance(validation, ArrayData):
        validation = (validation.inputs, validation.targets)
    if isinstance(validation, tuple):
        inputs, targets = validation
    elif isinstance(data, ArrayData):
        inputs, targets = data.inputs, data.targets
    else:
        inputs, targets = _first(framework, data)
    inputs, targets = inputs[:1024], host(targets[:1024])
    scores = framework.predict(teacher, inputs)
    if not np.isfinite(scores).all():
        raise NumericError(
            "The teacher's scores are not finite.",
            "A student would learn nothing from NaN or infinity.",
            "Check the teacher's weights, and that the inputs are prepared as it expects.",
        )
    accuracy = float((scores.argmax(-1) == targets).mean())
    if len(targets) >= ENOUGH and accuracy <= 1 / classes:
        raise NumericError(
            f"The teacher is no better than chance: {accuracy:.1%} of {len(targets)} samples are right, "
            f"chance is {1 / classes:.1%}.",
            "A student would learn noise from it.",
            "Check the teacher's weights, the order of its classes, and that the inputs are prepared as it expects.",
        )
    return accuracy


def _with_validation(hooks: TrainingHooks, framework: Framework, validation: Any) -> TrainingHooks:
    """The hooks, with a validation that may be given as arrays."""
    if validation is None or hooks.validate is not None:
        return hooks
    validate = validation
    if not callable(validation):
        pair = (validation.inputs, validation.targets) if isinstance(validation, ArrayData) else validation
        inputs, targets = pair

        def validate(model: Any) -> dict[str, float]:
            return {"accuracy": float((framework.predict(model, inputs).argmax(-1) == host(targets)).mean())}

    return TrainingHooks(validate, hooks.event, hooks.stop, hooks.save, hooks.resume)
