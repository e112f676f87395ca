"""Students that learn from each other while they learn from the labels."""

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
    averaged_logits,
    check_last_batch,
    few,
    first_batch,
    late_ramps,
    missing_targets,
    split_relations,
)
from kirsch.distillation.distill import to_validate_by, with_validation
from kirsch.distillation.distillation_loss import DistillationLoss
from kirsch.distillation.objective import Objective
from kirsch.distillation.probabilities import Logits, check_training, logit_layers, settle
from kirsch.distillation.step import TargetCheck, balanced, regularization
from kirsch.distillation.targets import check_labels
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.progress import with_progress
from kirsch.frameworks.training import LossOutput, Trained, Training, TrainingHooks, shares_of

if TYPE_CHECKING:
    from kirsch.data.batches import Batch
    from kirsch.frameworks.protocols import Features, Inference

FEWEST = 2


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
    """Students trained side by side, each on the labels and on what its peers say of the same batch.

    All of them take their step at once, from scores of one forward in training mode; what a peer says is a constant.
    The objective holds each student against all of its peers together, as `Objective.teachers` combines them. For soft
    targets, "probabilities" has the gradient of the mean divergence to each peer, which is that of the paper.

    Args:
        students: two or more models that put out the same classes; copies are trained. They may be of different
            architectures, and must begin with different weights.
        data: see `distill`.
        objective: the preset "dml" if left out. Its terms compare scores.
        training: one for all. `max_grad_norm` is that of all gradients together.
        validation: see `distill`; each student is judged by itself.
        hooks: one run, with one state to save and resume. Events and states name the parts of a student after its
            number: "0.kd", "1.accuracy".
        regularizers: further terms of each student.
        progress: see `distill`.

    Returns:
        The trained students, in their order, each with its own parts of the history.

    Raises:
        UsageError: there are fewer than two, two are one object, begin alike or share a parameter, or a term cannot be
            compared with peers.
        ShapeError: they put out different numbers of classes.
        DataError, NumericError: see `distill`.

    Source: Zhang et al. 2018, Deep mutual learning, arXiv:1706.00384, section 2; there students may also take turns.
    """
    objective, validation = objective or Objective.preset("dml"), to_validate_by(validation)
    training, hooks = training or Training(), with_progress(hooks, progress)
    framework = framework_of(students[0]) if students else None
    if framework is None or len(students) < FEWEST:
        raise UsageError(
            f"Mutual learning needs at least two students; there {'is 1' if students else 'are none'}.",
            fix="Give more of them, or a teacher to kirsch.distill.",
        )
    _check_students(framework.inference, students)
    _check_terms(objective, len(students))
    first = first_batch(framework.training, data)
    inputs = few(first).inputs
    targets = data.targets if isinstance(data, ArrayData) else first.targets
    losses, logits, shape = [], [], ()
    for place, student in enumerate(students):
        check_last_batch(framework.inference, student, data, first)
        framework.inference.check_runs(student, inputs)
        shape = tuple(framework.inference.predict(student, inputs).shape[1:])
        check_labels(targets, shape, objective)
        others = [*students[:place], *students[place + 1 :]]
        terms = bind(framework, objective, student, others, inputs, seed=training.seed)
        logits.append(
            settle(framework.features, student, objective, logit_layers(objective, terms, None), inputs, teacher=None)
        )
        losses.append(DistillationLoss(objective, terms))
    hooks = _of_each(framework.features, with_validation(hooks, framework, validation, objective, students))
    warnings = split_relations(objective, training) + late_ramps(objective, training)
    warnings += missing_targets(framework.inference, students[0], first, objective)
    for text in warnings + averaged_logits(objective, len(students) - 1):
        hooks.warn(text)
    outputs = [_output(place) for place in range(len(students))]
    module = framework.features.with_adapters(framework.features.cohort(students), outputs, {}, {})
    step = MutualStep(framework.features, losses, logits, TargetCheck(objective, shape), regularizers)
    trained = framework.training.train(module, data, step, training, hooks)
    return [_own(trained, place, model) for place, model in enumerate(framework.features.members(trained.model))]


def _check_students(inference: Inference, students: Sequence[Any]) -> None:
    prints = [inference.fingerprint(student) for student in students]
    for one, other in combinations(range(len(students)), 2):
        if students[one] is students[other]:
            raise UsageError(f"Students {one} and {other} are the same object.", fix="Build each by itself.")
        if prints[one] == prints[other]:
            raise UsageError(
                f"Students {one} and {other} begin with the same weights.",
                "They would have next to nothing to learn from each other.",
                "Build each from a seed of its own.",
            )


def _check_terms(objective: Objective, students: int) -> None:
    if objective.teacher_outputs not in (None, objective.student_outputs):
        raise UsageError(
            "The objective says what teachers put out, and students that learn from each other have none.",
            fix="Say it of the students: student_outputs=.",
        )
    if not objective.terms:
        raise UsageError(
            "The objective has no terms, so that the students would learn from the labels alone.",
            fix='Give one that compares scores, such as Objective.preset("dml").',
        )
    for term in objective.terms:
        if term.layers != ("logits", "logits") or term.adapter not in ("auto", "none"):
            raise UsageError(
                f"The term {term.record_name!r} compares {term.student_layer!r} with {term.layers[1]!r}.",
                "Students that learn from each other are compared by their scores alone.",
                'Leave it out, or name the place "logits" for both sides.',
            )
        if term.teacher is not None:
            raise UsageError(
                f"The term {term.record_name!r} is of teacher {term.teacher}; there are peers instead.",
                fix="Leave out `teacher`: each student is held against all of its peers.",
            )
        if students > FEWEST and not combines_teachers(term):
            raise UsageError(
                f"The term {term.record_name!r} compares what several peers cannot say together, and there are "
                f"{students} students.",
                fix="Give two students, or a loss on scores.",
            )


@dataclass(frozen=True)
class _Logits:
    """The outputs of one student of a cohort, as `DistillationLoss` takes them: logits, and no adapters."""

    features: dict[str, Any]
    adapted: Mapping[str, Any] = field(default_factory=dict)
    adapter_losses: Mapping[str, Any] = field(default_factory=dict)


class MutualStep:
    """Runs all students on a batch and adds up their losses; a `kirsch.frameworks.training.LossFunction`.

    Args:
        features: of the framework of the students.
        losses: of each student, with the other students as its teachers.
        logits: for each student, what makes logits of its outputs; None if they are logits.
        check: of the targets of each batch.
        regularizers: further terms of each student.
        progress: see `distill`.
    """

    def __init__(
        self,
        features: Features,
        losses: Sequence[DistillationLoss],
        logits: Sequence[Logits | None],
        check: TargetCheck,
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        self._features, self._losses, self._logits = features, losses, logits
        self._check, self._regularizers = check, regularizers
        self._factors: list[dict[str, float]] = [{} for _ in losses]
        self._epoch = 0.0
        self._unchecked = True  # until the first step in training mode

    def __call__(
        self, module: Any, batch: Batch, epoch: float, step_counts: Mapping[str, int] | None = None
    ) -> LossOutput:
        """Return the sum of the losses of all students; see `LossFunction`."""
        self._epoch = epoch
        values = module(batch.inputs, {}, batch.ids).features
        logits = [
            values[_output(place)] if to_logits is None else to_logits({"logits": values[_output(place)]})["logits"]
            for place, to_logits in enumerate(self._logits)
        ]
        if self._unchecked and module.training:
            for loss, own in zip(self._losses, logits, strict=True):
                check_training({"logits": own}, logit_layers(loss.objective, loss.terms, None), loss.objective)
            self._unchecked = False
        students = self._features.members(self._features.student_of(module))
        total: Any = 0.0
        parts: dict[str, Any] = {}
        for place, (loss, student) in enumerate(zip(self._losses, students, strict=True)):
            peers = [{"logits": ops.detach(other)} for other in (*logits[:place], *logits[place + 1 :])]
            output = loss(
                _Logits({"logits": logits[place]}),
                loss.features(peers, epoch),
                batch,
                epoch,
                step_counts,
                factors=self._factors[place],
                regularization=regularization(self._regularizers, student),
            )
            total = total + output.total
            parts |= {_name(place, name): part for name, part in output.terms.items()}
        return LossOutput(total, parts)

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Return the counts of the batches, which are the same for all students."""
        return self._losses[0].counts(batches)

    def check(self, batch: Batch) -> list[str]:
        """Refuse targets that the label loss does not take; see `LossFunction`."""
        return self._check(batch)

    def balance(self, norms: dict[str, float]) -> None:
        """Scale the terms of each student by their gradients; see `DistillationStep.balance`."""
        for place, loss in enumerate(self._losses):
            if loss.objective.balance == "gradient":
                weights = loss.weights(self._epoch, self._factors[place])
                names = [term.name for term in loss.terms]
                self._factors[place] |= balanced(_of(place, norms), weights, names)

    def state(self) -> dict[str, Any]:
        """Return the factors of the terms of each student."""
        return {"students": [dict(factors) for factors in self._factors]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._factors = [dict(factors) for factors in state["students"]]


def _output(place: int) -> str:
    """Return the layer of a cohort that holds the logits of one student."""
    return f"output.{place}"


def _name(place: int, name: str) -> str:
    """A part, or a metric, of one student."""
    return f"{place}.{name}"


def _of(place: int, named: dict[str, Any]) -> dict[str, Any]:
    """What is named after one student, by the names that it has for a student alone."""
    prefix = _name(place, "")
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _of_each(features: Features, hooks: TrainingHooks) -> TrainingHooks:
    """The hooks, with a validation of one model that judges each student."""
    validate = hooks.validate
    if validate is None:
        return hooks

    def judge(cohort: Any) -> dict[str, float]:
        found = [validate(student) for student in features.members(cohort)]
        return {_name(place, name): value for place, own in enumerate(found) for name, value in own.items()}

    return dataclasses.replace(hooks, validate=judge)


def _own(trained: Trained, place: int, model: Any) -> Trained:
    """One student with its parts of what was trained together; shares are those within the student."""
    history = []
    for record in trained.history:
        parts = _of(place, record["terms"])
        kept = {name: record[name] for name in ("epoch", "learning_rate", "seconds")}
        shares = shares_of(_of(place, record["gradient_shares"]))
        own = {**kept, "loss": sum(parts.values()), "terms": parts, "gradient_shares": shares}
        history.append(own | _of(place, record))
    return Trained(model, history, {name: shares_of(_of(place, of)) for name, of in trained.first_batch.items()})
