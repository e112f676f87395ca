"""Mutual learning: students that are trained together, on the labels and on each other's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

from kirsch import ops
from kirsch.arguments import checked
from kirsch.data.annotations import Data, Model, Regularizer
from kirsch.data.batches import ArrayData
from kirsch.distillation.binding import bind, combines_teachers
from kirsch.distillation.checks import (
    check_single_samples,
    check_student,
    first_batch,
    first_samples,
    warning_of_averaged_logits,
    warning_of_unknown_entries,
    warnings_of_divided_batches,
    warnings_of_softmax_terms,
    warnings_of_unfinished_ramps,
)
from kirsch.distillation.distill import to_validation, with_validation
from kirsch.distillation.further_outputs import warning_of_unused_outputs
from kirsch.distillation.objective import Objective
from kirsch.distillation.probabilities import LogitsConverter, logits_converter
from kirsch.distillation.step import DistillationStep
from kirsch.distillation.targets import check_labels
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.progress import with_progress
from kirsch.frameworks.training import LossOutput, Trained, Training, TrainingHooks, metrics_of, shares_of

if TYPE_CHECKING:
    from kirsch.data.batches import Batch
    from kirsch.frameworks.protocols import Features, Inference

MIN_STUDENTS = 2


@checked
def distill_mutually(
    students: Sequence[Model],
    data: Data,
    *,
    objective: Objective | None = None,
    training: Training | None = None,
    validation: Any = None,
    hooks: TrainingHooks | None = None,
    regularizers: Sequence[Regularizer] = (),
    progress: bool | None = None,
) -> list[Trained]:
    """Train students together, each on the labels and on the outputs of its peers for the same batch.

    All students are updated in one step, from the logits of one forward pass in training mode. No gradient flows to the
    logits of the peers. The objective compares each student with all of its peers, combined as in
    `Objective.combine_teachers`. With `combine_teachers="probabilities"`, the gradient of the soft-target loss equals
    the mean of its gradients for the single peers, as in the paper.

    Args:
        students: two or more models with the same classes; copies are trained. Their architectures may differ, their
            initial weights must differ.
        data: see `distill`.
        objective: its terms compare logits; by default the preset "dml".
        training: settings for all students. `max_grad_norm` limits the norm of all gradients together.
        validation: see `distill`; each student is evaluated.
        hooks: hooks for the common run of all students, which has one state to save and to resume from. In events and
            states, the names of terms and metrics begin with the index of the student: "0.kd", "1.accuracy".
        regularizers: further loss terms, computed for each student.
        progress: see `distill`.

    Returns:
        The trained students, in order, each with its history.

    Raises:
        UsageError: there are fewer than two students, two of them are one object, have equal weights or share a
            parameter, or a term cannot compare a student with its peers.
        ShapeError: the students return different numbers of classes.
        DataError, NumericError: see `distill`.

    Source: Zhang et al. 2018, Deep mutual learning, arXiv:1706.00384, section 2. In the paper, students may also be
        updated in turn.
    """
    objective, validation = objective or Objective.preset("dml"), to_validation(validation)
    training, hooks = training or Training(), with_progress(hooks, progress)
    framework = framework_of(students[0]) if students else None
    if framework is None or len(students) < MIN_STUDENTS:
        raise UsageError(
            f"Mutual learning needs at least two students; found {len(students)}.",
            fix="Give more students, or use kirsch.distill with a teacher.",
        )
    _check_students(framework.inference, students)
    _check_terms(objective, len(students))
    first = first_batch(framework.training, data)
    inputs = first_samples(first).inputs
    targets = data.targets if isinstance(data, ArrayData) else first.targets
    warnings = warnings_of_divided_batches(objective, training) + warnings_of_unfinished_ramps(objective, training)
    warnings += warning_of_unknown_entries(framework.inference, students[0], first, objective)
    warnings += warning_of_averaged_logits(objective, len(students) - 1) + warnings_of_softmax_terms(objective)
    steps, logits = [], []
    for index, student in enumerate(students):
        check_single_samples(framework.inference, student, data, first)
        shape = check_student(framework.inference, student, first, objective)
        check_labels(targets, shape, objective)
        peers = [*students[:index], *students[index + 1 :]]
        terms = bind(framework, objective, student, peers, inputs, seed=training.seed)
        warnings += warning_of_unused_outputs(framework.features, student, None, objective, terms, inputs)
        logits.append(logits_converter(framework.features, student, objective, terms, inputs))
        steps.append(
            DistillationStep(framework.features, objective, terms, regularizers=regularizers, logits_shape=shape)
        )
    hooks = _validating_each(framework.features, with_validation(hooks, framework, validation, objective, students))
    for text in dict.fromkeys(warnings):
        hooks.warn(text)
    outputs = [_logits_layer(index) for index in range(len(students))]
    module = framework.features.with_adapters(framework.features.cohort(students), outputs, {}, {})
    step = MutualStep(framework.features, steps, logits)
    trained = framework.training.train(module, data, step, training, hooks)
    return [
        _trained_student(trained, index, model) for index, model in enumerate(framework.features.members(trained.model))
    ]


def _check_students(inference: Inference, students: Sequence[Any]) -> None:
    fingerprints = [inference.fingerprint(student) for student in students]
    for one, other in combinations(range(len(students)), 2):
        if students[one] is students[other]:
            raise UsageError(f"Students {one} and {other} are the same object.", fix="Build each student separately.")
        if fingerprints[one] == fingerprints[other]:
            raise UsageError(
                f"Students {one} and {other} have the same initial weights.",
                "Their outputs would be equal, so that they could not learn from each other.",
                "Build each student with a different seed.",
            )


def _check_terms(objective: Objective, students: int) -> None:
    if objective.teacher_outputs not in (None, objective.student_outputs):
        raise UsageError(
            "The objective has `teacher_outputs`, and mutual learning has no teacher.",
            fix="Give student_outputs= instead.",
        )
    if not objective.terms:
        raise UsageError(
            "The objective has no terms, so that the students would be trained on the labels only.",
            fix='Give an objective that compares logits, such as Objective.preset("dml").',
        )
    for term in objective.terms:
        if term.adapter not in ("auto", "none") and term.layers == ("logits", "logits"):
            raise UsageError(
                f"The term {term.record_name!r} has the adapter {term.adapter!r}.",
                "Mutual learning compares the logits of the students, which need no adapter.",
                "Leave out `adapter`.",
            )
        if term.layers != ("logits", "logits"):
            raise UsageError(
                f"The term {term.record_name!r} compares {term.student_layer!r} with {term.layers[1]!r}.",
                "Mutual learning compares the logits of the students.",
                'Leave the term out, or give student_layer="logits".',
            )
        if term.teacher is not None:
            raise UsageError(
                f"The term {term.record_name!r} has teacher={term.teacher}, and mutual learning has no teachers.",
                fix="Leave out `teacher`: each student is compared with all of its peers.",
            )
        if students > MIN_STUDENTS and not combines_teachers(term):
            raise UsageError(
                f"The term {term.record_name!r} cannot combine the outputs of several peers, and there are "
                f"{students} students.",
                fix="Give two students, or a loss on logits.",
            )


@dataclass(frozen=True)
class _LogitsOfStudent:
    """The outputs of one student of a cohort, as `DistillationLoss` takes them: logits, and no adapters."""

    features: dict[str, Any]
    adapted: Mapping[str, Any] = field(default_factory=dict)
    adapter_losses: Mapping[str, Any] = field(default_factory=dict)


class MutualStep:
    """Runs all students on a batch and sums their losses; a `kirsch.frameworks.training.LossFunction`.

    Args:
        features: the `Features` object of the students' framework.
        steps: the step of each student, in whose loss the other students are the teachers.
        logits: the function that converts the outputs of each student to logits; None if they are logits.
    """

    def __init__(
        self, features: Features, steps: Sequence[DistillationStep], logits: Sequence[LogitsConverter | None]
    ) -> None:
        self._features, self._steps, self._logits = features, steps, logits

    def __call__(
        self,
        module: Any,
        batch: Batch,
        epoch: float,
        step_counts: Mapping[str, int] | None = None,
        *,
        batch_counts: Mapping[str, int] | None = None,
    ) -> LossOutput:
        """Return the sum of the losses of all students; see `LossFunction`."""
        values = module(batch.inputs, {}, batch.ids).features
        outputs = [values[_logits_layer(index)] for index in range(len(self._logits))]
        logits = [
            output if convert is None else convert({"logits": output})["logits"]
            for output, convert in zip(outputs, self._logits, strict=True)
        ]
        students = self._features.members(self._features.student_of(module))
        total: Any = 0.0
        terms: dict[str, Any] = {}
        for index, (step, student) in enumerate(zip(self._steps, students, strict=True)):
            # Most losses detach the teacher's side; a loss with `learned=True` does not.
            peers = [{"logits": ops.detach(peer)} for peer in (*logits[:index], *logits[index + 1 :])]
            teacher_features = step.loss.features(peers, epoch)
            student_outputs = _LogitsOfStudent({"logits": logits[index]})
            output = step.loss_of(
                student_outputs,
                teacher_features,
                student,
                batch,
                epoch,
                step_counts,
                batch_counts,
                training=module.training,
            )
            total = total + output.total
            terms |= {_prefixed(index, name): value for name, value in output.terms.items()}
        return LossOutput(total, terms)

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Return the counts of the batches, which are the same for all students."""
        return self._steps[0].counts(batches)

    def check(self, batch: Batch, *, on_any_device: bool = False) -> list[str]:
        """Refuse targets that the label loss does not take; see `LossFunction`."""
        warnings = [text for step in self._steps for text in step.check(batch, on_any_device=on_any_device)]
        return list(dict.fromkeys(warnings))

    def balance(self, norms: dict[str, float]) -> dict[str, float]:
        """Scale the terms of each student by their gradients; see `DistillationStep.balance`."""
        return {
            _prefixed(index, name): norm
            for index, step in enumerate(self._steps)
            for name, norm in step.balance(_of_student(index, norms)).items()
        }

    def state(self) -> dict[str, Any]:
        """Return the state of the step of each student."""
        return {"students": [step.state() for step in self._steps]}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state that `state` returned."""
        for step, stored in zip(self._steps, state["students"], strict=True):
            step.restore(stored)


def _logits_layer(index: int) -> str:
    """Return the layer of the cohort (all students as one module) whose output is the logits of one student."""
    return f"output.{index}"


def _prefixed(index: int, name: str) -> str:
    """Return the name of a term or a metric of one student."""
    return f"{index}.{name}"


def _of_student(index: int, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of one student, with the prefix removed from their names."""
    prefix = _prefixed(index, "")
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _validating_each(features: Features, hooks: TrainingHooks) -> TrainingHooks:
    """Return the hooks with a validation of the cohort that evaluates each student."""
    validate = hooks.validate
    if validate is None:
        return hooks

    def validate_each(cohort: Any) -> dict[str, float]:
        metrics = [metrics_of(validate, student) for student in features.members(cohort)]
        return {
            _prefixed(index, name): value for index, by_name in enumerate(metrics) for name, value in by_name.items()
        }

    return dataclasses.replace(hooks, validate=validate_each)


def _trained_student(trained: Trained, index: int, model: Any) -> Trained:
    """Return one student with its part of the history; the shares of its terms sum to 1."""
    history = []
    for record in trained.history:
        terms = _of_student(index, record["terms"])
        shared = {name: record[name] for name in ("epoch", "learning_rate", "seconds")}
        shares = shares_of(_of_student(index, record["gradient_shares"]))
        student_record = {**shared, "loss": sum(terms.values()), "terms": terms, "gradient_shares": shares}
        history.append(student_record | _of_student(index, record))
    first_batch = {name: shares_of(_of_student(index, shares)) for name, shares in trained.first_batch.items()}
    return Trained(model, history, first_batch)
