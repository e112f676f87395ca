"""An objective bound to its models: hooks on them, adapters beside the student, and what each batch is charged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from kirsch.annotations import Seed
from kirsch.arguments import checked
from kirsch.distillation.binding import bind, layers_of_teacher, refuse_classes, table
from kirsch.distillation.checks import few, missing_targets, mixed_scores
from kirsch.distillation.objective import Objective
from kirsch.distillation.probabilities import check_record, logit_layers, settle, teachers_logits
from kirsch.distillation.step import DistillationStep
from kirsch.distillation.store import TeacherStore
from kirsch.distillation.targets import check_labels
from kirsch.distillation.teachers import (
    LiveTeachers,
    StoredTeacher,
    Teacher,
    holds_top_k,
    one_or_more,
    require_temperature,
)
from kirsch.errors import CheckpointError, UsageError
from kirsch.frameworks.annotations import BatchLike, Model, Regularizer
from kirsch.frameworks.data import Batch
from kirsch.frameworks.layers import texts
from kirsch.frameworks.port import framework_of
from kirsch.frameworks.training import LossOutput, doubts, shares_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kirsch.distillation.bound_term import BoundTerm
    from kirsch.distillation.teachers import TeacherSource


class Distiller:
    """What a training loop of one's own calls to distill.

        with kirsch.Distiller(student, teacher, objective, next(iter(loader))) as distiller:
            optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
            for epoch in range(epochs):
                distiller.train()
                for batch in loader:
                    optimizer.zero_grad()
                    distiller(batch, epoch).total.backward()
                    optimizer.step()

    Args:
        student: the model that learns; it is trained itself, not a copy, and its hooks are there until `close`.
        teacher: one, several as a list, or a `TeacherStore`. Copies are used, where the student lies, in inference mode
            and without gradient; only an objective without terms needs none.
        objective: what is compared.
        example_batch: of the kind that will come; some of its samples are run to find the shapes.
        seed: of what adapters begin with.
        regularizers: further terms of the student alone, see `kirsch.distill`.
        doubt: is told what seems wrong, a sentence each.

    Attributes:
        student: the model given.
        module: student and adapters as one module, to be wrapped by DDP and the like; see `__call__`.
        step: returns the loss of a batch, as `kirsch.frameworks.training.LossFunction` says.
        rows: which places are compared with which, and by what adapter; to be printed.
        shares: of each term in the gradient, as the first batch of the epoch had them.

    Raises:
        UsageError: student and teacher are one object, a store is asked for what it does not hold, a model does not run
            on the batch, or puts out probabilities where logits are needed.
        ShapeError: they put out different numbers of classes, or two places are of shapes that no adapter joins.
        UnknownNameError: a model has no such layer.
        DataError: the targets are not what the loss on labels takes, or the parts of the batch cannot be told apart.
    """

    @checked
    def __init__(
        self,
        student: Model,
        teacher: Teacher | None,
        objective: Objective,
        example_batch: BatchLike,
        *,
        seed: Seed = 0,
        regularizers: Sequence[Regularizer] = (),
        doubt: Callable[[str], None] = warnings.warn,
    ) -> None:
        framework = framework_of(student)
        first = Batch.of(example_batch)
        some = few(first)
        framework.check_runs(student, some.inputs)
        self._framework, self._objective = framework, objective
        self._teacher_source: TeacherSource | None = None
        terms: list[BoundTerm] = []
        if isinstance(teacher, TeacherStore):
            require_temperature(teacher, objective)
            _require_classes(teacher, objective, framework.predict(student, some.inputs).shape)
            self._teacher_source = StoredTeacher(framework, teacher)
            (recorded,) = self._teacher_source(first)
            if "logits" in recorded and not holds_top_k(recorded["logits"]):
                check_record(recorded["logits"], objective)
            (recorded,) = self._teacher_source(some)
            terms = bind(framework, objective, student, (), some.inputs, seed=seed, recorded=recorded)
        elif objective.terms:
            if teacher is None:
                raise UsageError(
                    "`teacher` of kirsch.Distiller is None, and the terms of the objective need one.",
                    fix="Give a teacher, or an objective without terms: kirsch.Objective.labels().",
                )
            teachers = _copies(student, teacher)
            for model in teachers:
                framework.check_runs(model, some.inputs)
            terms = bind(framework, objective, student, teachers, some.inputs, seed=seed)
            layers = [layers_of_teacher(terms, index) for index in range(len(teachers))]
            logits = teachers_logits(framework, teachers, objective, terms, some.inputs)
            self._teacher_source = LiveTeachers(framework, teachers, layers, logits)
            for sentence in mixed_scores(objective, len(teachers)):
                doubt(sentence)
        for sentence in missing_targets(framework, student, first, objective):
            doubt(sentence)
        self.student = student
        logits_of_student = logit_layers(objective, terms, None)
        self.module: Any = framework.with_adapters(
            student,
            list(dict.fromkeys(["logits"] * objective.scored + texts([term.student_layer for term in terms]))),
            {term.adapter_name: term.adapter for term in terms if term.adapter is not None},
            {term.adapter_name: term.student_layer for term in terms},
            settle(framework, student, objective, logits_of_student, some.inputs, teacher=None),
        )
        self._scores = tuple(framework.predict(student, some.inputs).shape[1:]) if objective.scored else None
        self.step = DistillationStep(
            framework,
            objective,
            terms,
            self._teacher_source,
            regularizers,
            partial(framework.positions, student),
            self._scores,
        )
        self.rows: list[dict[str, Any]] = table(terms)
        self.shares: dict[str, float] = {}
        self._looked: int | None = None
        self._began: dict[str, float] = {}
        self._doubt, self._doubted = doubt, set[str]()
        self.check_labels(first.targets)

    @checked
    def __call__(
        self,
        batch: BatchLike,
        epoch: float = 0.0,
        *,
        of: Mapping[str, int] | None = None,
        module: Callable[..., Any] | None = None,
    ) -> LossOutput:
        """What a batch is charged; the student runs in it, and `.total` is to be sent backward.

        At the first batch of each whole epoch that is trained on, each term must reach the student. Its share of the
        gradient is kept in `shares`, a share that teaches nothing is warned of, and `balance="gradient"` scales by it.

        Args:
            batch: whatever `kirsch.frameworks.data.Batch.of` takes, such as (inputs, targets) or a dict with "labels";
                of numpy or of the framework, wherever it lies.
            epoch: how many are done, for what changes over them.
            of: where several batches make one step, what `counts` says of them all; the charges then add up to that of
                one large batch. None: the batch is a step.
            module: `module` as something wraps it, `DistributedDataParallel(distiller.module)`; itself if left out.

        Raises:
            NumericError: a term gives the student no gradient.
            DataError: all targets of a step are masked.
        """
        model = self.module if module is None else module
        given = Batch.of(batch)
        # Its warnings are of batches that a loader gives; a loop of one's own knows which of its batches have targets.
        self.step.check(given, wherever=self.module.training and int(epoch) != self._looked)
        charge = self.step(model, self._framework.placed(given, self.student), epoch, of)
        if self.module.training and charge.parts and int(epoch) != self._looked:
            norms = self._framework.gradient_norms(self.module, charge.parts)
            if norms:
                self._look_at(norms, int(epoch))
        return charge

    def _look_at(self, norms: dict[str, float], epoch: int) -> None:
        self._looked, self.shares = epoch, shares_of(norms)
        self._began = self._began or self.shares
        self.step.balance(norms)
        for name, sentence in doubts(self.shares, self._began).items():
            if name not in self._doubted:
                self._doubted.add(name)
                self._doubt(sentence)

    @checked
    def counts(self, batches: Iterable[BatchLike]) -> dict[str, int]:
        """How many samples, labels and positions the means of some batches go over, to be given as `of`.

        Processes that share a step add theirs up, by name, before.
        """
        return self.step.counts([Batch.of(batch) for batch in batches])

    def check_labels(self, targets: Any) -> None:
        """Refuse targets that the objective cannot charge the student for.

        Raises:
            DataError: they are of another kind or out of range.
        """
        if self._scores is not None:
            check_labels(targets, self._scores, self._objective)

    def parameters(self) -> Iterator[Any]:
        """Those of the student, and those of the adapters: what an optimizer is to be given."""
        found: Iterator[Any] = self.module.parameters()
        return found

    @property
    def adapters(self) -> Any:
        """What is trained beside the student, as one module; without parameters where nothing has to be joined."""
        return self.module.adapters

    @checked
    def train(self, mode: bool = True) -> Self:
        """Student and adapters in training mode; the teachers stay in inference mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        """Student and adapters in inference mode."""
        return self.train(mode=False)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs beside the states of student and optimizer to go on: adapters, balance, and last look."""
        return {
            "adapters": dict(self.module.adapters.state_dict()),
            "balance": self.step.state(),
            "looked": self._looked,
            "shares": dict(self.shares),
            "began": dict(self._began),
        }

    @checked
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            CheckpointError: it is of another objective, or of models of other shapes.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise CheckpointError(
                f"`state` has no {missing[0]!r}.", fix="Give what `state_dict` of a distiller returned."
            )
        own, given = self.module.adapters.state_dict(), state["adapters"]
        other = sorted(own.keys() ^ given.keys())
        other = other or [name for name, value in own.items() if tuple(value.shape) != tuple(given[name].shape)]
        if other:
            raise CheckpointError(
                f"The state holds other adapters than this distiller: {', '.join(other[:3])}.",
                fix="Build it with the objective, the models and the places that the state was saved with.",
            )
        self.module.adapters.load_state_dict(given)
        self.step.restore(state["balance"])
        self._looked, self.shares, self._began = state["looked"], dict(state["shares"]), dict(state["began"])

    def close(self) -> None:
        """Take the hooks from student and teachers; the next call puts them back."""
        self.module.close()
        if self._teacher_source is not None:
            self._teacher_source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copies(student: Any, teacher: Any) -> list[Any]:
    """The teachers as copies that do not learn."""
    given = one_or_more(teacher)
    if any(model is student for model in given):
        raise UsageError(
            "Student and teacher are the same object.", fix="Give the student as a copy: copy.deepcopy(teacher)."
        )
    return [framework_of(model).frozen(model, student) for model in given]


def _require_classes(store: TeacherStore, objective: Objective, shape: tuple[int, ...]) -> None:
    """Refuse a student of other classes than a store of the largest scores has, of which `attach` sees some alone."""
    compared = any((term.student, term.there) == ("logits", "logits") for term in objective.terms)
    if compared and store.manifest.keep == "top-k" and store.manifest.classes != shape[-1]:
        refuse_classes(shape, (*shape[:-1], store.manifest.classes or 0))
