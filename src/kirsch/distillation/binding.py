"""An objective bound to its models: hooks on the teachers, adapters beside the student, and the loss of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kirsch.distillation.attach import Pair, attach, table, wanted_of
from kirsch.distillation.checks import few
from kirsch.distillation.lesson import Lesson
from kirsch.distillation.store import TeacherStore
from kirsch.distillation.teachers import LiveTeachers, StoredTeacher, one_or_more
from kirsch.errors import UsageError
from kirsch.frameworks.port import framework_of
from kirsch.frameworks.sites import texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.distillation.lesson import Regularizer
    from kirsch.distillation.objective import Objective
    from kirsch.distillation.teachers import Guide
    from kirsch.frameworks.data import Batch
    from kirsch.frameworks.port import Framework


@dataclass(frozen=True)
class Bound:
    """An objective bound to its models.

    Args:
        pupil: the student with the adapters that are trained beside it.
        lesson: what a step charges.
        rows: which places are compared with which, and by what adapter; to be printed.
        guide: the teachers.
    """

    pupil: Any
    lesson: Lesson
    rows: list[dict[str, Any]]
    guide: Guide | None

    def close(self) -> None:
        """Take the hooks from the teachers."""
        if self.guide is not None:
            self.guide.close()


def bind(
    framework: Framework,
    student: Any,
    teacher: Any,
    objective: Objective,
    first: Batch,
    *,
    seed: int = 0,
    regularizers: Sequence[Regularizer] = (),
) -> Bound:
    """A student and its teachers, or a store, with hooks and adapters for an objective; the student is not copied.

    Args:
        framework: of all of them.
        student: the model that learns.
        teacher: one, several, or a store; copies of them are frozen, in inference mode.
        objective: what is compared.
        first: a batch, of which some samples are run to find the shapes.
        seed: of what adapters begin with.
        regularizers: see `distill`.

    Raises:
        UsageError: student and teacher are one object, or a store is asked for what it does not hold.
        ShapeError, UnknownNameError: see `distill`.
    """
    guide: Guide | None = None
    pairs: list[Pair] = []
    some = few(first)
    if isinstance(teacher, TeacherStore):
        guide = StoredTeacher(framework, teacher)
        recorded = guide(some)
        pairs = attach(framework, objective, student, (), some.inputs, seed=seed, recorded=recorded[0])
    elif objective.terms:
        given = one_or_more(teacher)
        if any(model is student for model in given):
            raise UsageError(
                "Student and teacher are the same object.", mend="Give the student as a copy: copy.deepcopy(teacher)."
            )
        teachers = [framework_of(model).frozen(model) for model in given]
        pairs = attach(framework, objective, student, teachers, some.inputs, seed=seed)
        sites = [wanted_of(objective, pairs, place) for place in range(len(teachers))]
        guide = LiveTeachers(framework, teachers, sites)
    pupil = framework.pupil(
        student,
        list(dict.fromkeys(["logits", *texts([pair.student for pair in pairs])])),
        {pair.name: pair.joint for pair in pairs if pair.joint is not None},
        {pair.name: pair.student for pair in pairs},
    )
    lesson = Lesson(framework, objective, pairs, guide, regularizers)
    return Bound(pupil, lesson, table(objective, pairs), guide)
