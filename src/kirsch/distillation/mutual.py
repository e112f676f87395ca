"""Students that learn from each other while they learn from the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kirsch.arguments import checked
from kirsch.distillation.arrays import detach
from kirsch.distillation.attach import attach, of_all
from kirsch.distillation.checks import (
    check_last_batch,
    few,
    first_batch,
    late_ramps,
    missing_targets,
    mixed_scores,
    split_relations,
)
from kirsch.distillation.distill import to_validate_by, with_validation
from kirsch.distillation.distillation_loss import DistillationLoss, add
from kirsch.distillation.objective import Objective
from kirsch.distillation.probabilities import Logits, logit_layers, settle
from kirsch.distillation.targets import check_labels
from kirsch.errors import UsageError
from kirsch.frameworks.annotations import Data, Model, Regularizer
from kirsch.frameworks.data import ArrayData
from kirsch.frameworks.port import framework_of
from kirsch.frameworks.training import LossOutput, Trained, Training, TrainingHooks, shares_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kirsch.frameworks.data import Batch
    from kirsch.frameworks.port import Framework

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
        training: one for all. `clip_norm` is that of all gradients together.
        validation: see `distill`; each student is judged by itself.
        hooks: one run, with one state to save and resume. Events and states name the parts of a student after its
            number: "0.kd", "1.accuracy".
        regularizers: further terms of each student.

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
    training, hooks = training or Training(), hooks or TrainingHooks()
    framework = framework_of(students[0]) if students else None
    if framework is None or len(students) < FEWEST:
        raise UsageError(
            f"Mutual learning needs at least two students; there {'is 1' if students else 'are none'}.",
            fix="Give more of them, or a teacher to kirsch.distill.",
        )
    _check_students(framework, students)
    _check_terms(objective, len(students))
    first = first_batch(framework, data)
    inputs = few(first).inputs
    targets = data.targets if isinstance(data, ArrayData) else first.targets
    lessons, peers, logits = [], [], []
    for place, student in enumerate(students):
        check_last_batch(framework, student, data, first)
        framework.check_runs(student, inputs)
        shape = tuple(framework.predict(student, inputs).shape[1:])
        check_labels(targets, shape, objective)
        others = [*students[:place], *students[place + 1 :]]
        pairs = attach(framework, objective, student, others, inputs, seed=training.seed)
        layers = logit_layers(objective, pairs, None)
        logits.append(settle(framework, student, objective, layers, inputs, teacher=None))
        peers.append(_Peers())
        lessons.append(DistillationLoss(framework, objective, pairs, peers[-1], scores=shape))
    hooks = _of_each(framework, with_validation(hooks, framework, validation, objective, students))
    texts = split_relations(objective, training) + late_ramps(objective, training)
    texts += missing_targets(framework, students[0], first, objective)
    for text in texts + mixed_scores(objective, len(students) - 1):
        hooks.doubt(text)
    module = framework.with_adapters(
        framework.cohort(students), [_site(place) for place in range(len(students))], {}, {}
    )
    trained = framework.train(
        module, data, MutualLoss(framework, lessons, peers, logits, regularizers), training, hooks
    )
    return [_own(trained, place, model) for place, model in enumerate(framework.members(trained.model))]


def _check_students(framework: Framework, students: Sequence[Any]) -> None:
    prints = [framework.fingerprint(student) for student in students]
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
        if (term.student, term.there) != ("logits", "logits") or term.adapter not in ("auto", "none"):
            raise UsageError(
                f"The term {term.called!r} compares {term.student!r} with {term.there!r}.",
                "Students that learn from each other are compared by their scores alone.",
                'Leave it out, or name the place "logits" for both sides.',
            )
        if term.of is not None:
            raise UsageError(
                f"The term {term.called!r} is of teacher {term.of}; there are peers instead.",
                fix="Leave out `of`: each student is held against all of its peers.",
            )
        if students > FEWEST and not of_all(term):
            raise UsageError(
                f"The term {term.called!r} compares what several peers cannot say together, and there are "
                f"{students} students.",
                fix="Give two students, or a loss on scores.",
            )


class _Peers:
    """A student's peers as its teachers: what they said in the step that is under way."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def __call__(self, batch: Batch) -> list[dict[str, Any]]:  # noqa: ARG002 - they were run with the student
        """See `kirsch.distillation.teachers.TeacherSource`."""
        return self.said

    def close(self) -> None:
        """See `kirsch.distillation.teachers.TeacherSource`."""


class MutualLoss:
    """Charges all students for a batch, as `kirsch.frameworks.training.LossFunction` wants it.

    Args:
        framework: of the students.
        lessons: of each.
        peers: the guides of these lessons.
        logits: what makes logits of the outputs of each student; None where they are logits.
        regularizers: further terms of each student.
    """

    def __init__(
        self,
        framework: Framework,
        lessons: Sequence[DistillationLoss],
        peers: Sequence[_Peers],
        logits: Sequence[Logits | None],
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        self._framework, self._lessons, self._peers, self._regularizers = framework, lessons, peers, regularizers
        self._logits = logits

    def __call__(self, model: Any, batch: Batch, epoch: float, of: Mapping[str, int] | None = None) -> LossOutput:
        """What a batch is charged, of all students together; see `LossFunction`."""
        seen = model(batch.inputs, {}, batch.ids).values
        scores = [
            seen[_site(place)] if own is None else own({"logits": seen[_site(place)]})["logits"]
            for place, own in enumerate(self._logits)
        ]
        total: Any = 0.0
        parts: dict[str, Any] = {}
        for place, (lesson, peers) in enumerate(zip(self._lessons, self._peers, strict=True)):
            peers.said = [{"logits": detach(each)} for each in (*scores[:place], *scores[place + 1 :])]
            own = SimpleNamespace(values={"logits": scores[place]}, joined={}, extra={})
            charge = lesson(lambda *_given, own=own: own, batch, epoch, of)
            total = total + charge.total
            parts |= {_name(place, name): part for name, part in charge.parts.items()}
        for place, student in enumerate(self._framework.members(self._framework.student_of(model))):
            for regularizer in self._regularizers:
                part = regularizer(student) * (1.0 if of is None else len(batch) / of["samples"])
                total = total + part
                add(parts, _name(place, type(regularizer).__name__), part)
        return LossOutput(total, parts)

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """See `LossFunction`; the students are charged for the same."""
        return self._lessons[0].counts(batches)

    def check(self, batch: Batch) -> list[str]:
        """See `LossFunction`; the students are charged for the same targets."""
        return self._lessons[0].check(batch)

    def balance(self, norms: dict[str, float]) -> None:
        """See `LossFunction`."""
        for place, lesson in enumerate(self._lessons):
            lesson.balance(_of(place, norms))

    def state(self) -> dict[str, Any]:
        """See `LossFunction`."""
        return {"students": [lesson.state() for lesson in self._lessons]}

    def restore(self, state: dict[str, Any]) -> None:
        """See `LossFunction`."""
        for lesson, own in zip(self._lessons, state["students"], strict=True):
            lesson.restore(own)


def _site(place: int) -> str:
    """Where the scores of a student are among what a cohort puts out."""
    return f"output.{place}"


def _name(place: int, name: str) -> str:
    """A part, or a metric, of one student."""
    return f"{place}.{name}"


def _of(place: int, named: dict[str, Any]) -> dict[str, Any]:
    """What is named after one student, by the names that it has for a student alone."""
    prefix = _name(place, "")
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _of_each(framework: Framework, hooks: TrainingHooks) -> TrainingHooks:
    """The hooks, with a validation of one model that judges each student."""
    validate = hooks.validate
    if validate is None:
        return hooks

    def judge(cohort: Any) -> dict[str, float]:
        found = [validate(student) for student in framework.members(cohort)]
        return {_name(place, name): value for place, own in enumerate(found) for name, value in own.items()}

    return dataclasses.replace(hooks, validate=judge)


def _own(trained: Trained, place: int, model: Any) -> Trained:
    """One student with its parts of what was trained together; shares are those within the student."""
    history = []
    for record in trained.history:
        parts = _of(place, record["parts"])
        kept = {name: record[name] for name in ("epoch", "learning_rate", "seconds")}
        shares = shares_of(_of(place, record["gradient_shares"]))
        own = {**kept, "loss": sum(parts.values()), "parts": parts, "gradient_shares": shares}
        history.append(own | _of(place, record))
    return Trained(model, history, {name: shares_of(_of(place, of)) for name, of in trained.first_batch.items()})
