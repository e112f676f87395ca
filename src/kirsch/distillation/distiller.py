"""An objective bound to its models, with hooks and adapters, for training loops of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from kirsch import user_warnings
from kirsch.annotations import Seed
from kirsch.arguments import checked
from kirsch.data.annotations import BatchLike, Model, Regularizer
from kirsch.data.batches import Batch
from kirsch.distillation.binding import bind, layers_of_teacher, refuse_classes, table
from kirsch.distillation.checks import (
    check_runs_on_few,
    check_student,
    first_samples,
    warning_of_averaged_logits,
    warning_of_unknown_entries,
    warnings_of_softmax_terms,
)
from kirsch.distillation.further_outputs import warning_of_unused_outputs
from kirsch.distillation.objective import Objective
from kirsch.distillation.probabilities import check_record, logits_converter, logits_converters
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
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.layers import texts
from kirsch.frameworks.training import GradientShares, LossOutput
from kirsch.tables import Line, Part, Piece, Printable, Table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kirsch.distillation.teachers import TeacherSource
    from kirsch.distillation.term import BoundTerm


class Distiller(Printable):
    """Computes the distillation loss in a training loop of your own.

        with kirsch.Distiller(student, teacher, objective, next(iter(loader))) as distiller:
            optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
            for epoch in range(epochs):
                distiller.train()
                for batch in loader:
                    optimizer.zero_grad()
                    distiller(batch, epoch).total.backward()
                    optimizer.step()

    Args:
        student: the model to train. It is trained in place, and keeps forward hooks until `close`.
        teacher: a model, a list of models, or a `TeacherStore`. Copies of models run on the device of the student, in
            inference mode and without gradient. An objective without terms needs no teacher.
        objective: the weighted terms.
        example_batch: a batch with the form of the training batches; a few of its samples are run to find shapes.
        seed: seed of the initial weights of adapters.
        regularizers: further loss terms that depend on the student only, see `kirsch.distill`.
        warn: called with each warning; by default, warnings are Python warnings.

    Attributes:
        student: the model to train.
        module: student and adapters as one module, to be wrapped by DDP; see `__call__`.
        step: the loss function of a batch; a `kirsch.frameworks.training.LossFunction`.
        rows: the layers that are compared, with shapes and adapters.
        unknown_entries: the warning that the example batch has no targets but entries that the student does not take;
            empty if there is none.

    Raises:
        UsageError: student and teacher are one object, a store lacks the outputs that a term needs, a model does not
            run on the batch, or a model returns probabilities that the objective does not declare.
        ShapeError: student and teacher return different numbers of classes, or, for a term, no adapter can convert
            the student's feature to the shape of the teacher's feature.
        UnknownNameError: a term names a layer that the model does not have.
        DataError: the label loss does not take the targets, or it is unclear which elements of the batch are inputs and
            which are targets.
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
        warn: Callable[[str], None] = user_warnings.warn,
    ) -> None:
        framework = framework_of(student)
        first = Batch.of(example_batch)
        samples = first_samples(first)
        self._logits_shape = check_student(framework.inference, student, first, objective)
        self._framework, self._objective = framework, objective
        self._teacher_source: TeacherSource | None = None
        terms: list[BoundTerm] = []
        if isinstance(teacher, TeacherStore):
            require_temperature(teacher, objective)
            _require_classes(teacher, objective, framework.inference.predict(student, samples.inputs).shape)
            self._teacher_source = StoredTeacher(framework.inference, teacher)
            (recorded,) = self._teacher_source(first)
            if "logits" in recorded and not holds_top_k(recorded["logits"]):
                check_record(recorded["logits"], objective)
            (recorded,) = self._teacher_source(samples)
            terms = bind(framework, objective, student, (), samples.inputs, seed=seed, recorded=recorded)
        elif objective.terms:
            if teacher is None:
                raise UsageError(
                    "`teacher` of kirsch.Distiller is None, and the terms of the objective need one.",
                    fix="Give a teacher, or an objective without terms: kirsch.Objective.labels().",
                )
            teachers = _copies(student, teacher)
            for model in teachers:
                check_runs_on_few(framework.inference, model, first)
            terms = bind(framework, objective, student, teachers, samples.inputs, seed=seed)
            layers = [layers_of_teacher(terms, index) for index in range(len(teachers))]
            logits = logits_converters(framework.features, teachers, objective, terms, samples.inputs)
            self._teacher_source = LiveTeachers(framework, teachers, layers, logits)
            for sentence in warning_of_averaged_logits(objective, len(teachers)):
                warn(sentence)
        self.unknown_entries = warning_of_unknown_entries(framework.inference, student, first, objective)
        for sentence in self.unknown_entries + warnings_of_softmax_terms(objective):
            warn(sentence)
        model = None if teacher is None or isinstance(teacher, TeacherStore) else one_or_more(teacher)[0]
        for sentence in warning_of_unused_outputs(framework.features, student, model, objective, terms, first.inputs):
            warn(sentence)
        self.student = student
        self.module: Any = framework.features.with_adapters(
            student,
            list(dict.fromkeys(["logits"] * objective.needs_logits + texts([term.student_layer for term in terms]))),
            {term.adapter_name: term.adapter for term in terms if term.adapter is not None},
            {term.adapter_name: term.student_layer for term in terms},
            logits_converter(framework.features, student, objective, terms, samples.inputs),
        )
        self.step = DistillationStep(
            framework.features,
            objective,
            terms,
            self._teacher_source,
            regularizers,
            partial(framework.features.feature_mask, student),
            self._logits_shape,
        )
        self.rows: list[dict[str, Any]] = table(terms)
        self._gradient_shares = GradientShares()
        self._checked_epoch: int | None = None
        self._warn = warn
        self.check_labels(first.targets)

    @checked
    def __call__(
        self,
        batch: BatchLike,
        epoch: float = 0.0,
        *,
        step_counts: Mapping[str, int] | None = None,
        batch_counts: Mapping[str, int] | None = None,
        module: Callable[..., Any] | None = None,
    ) -> LossOutput:
        """Run student and teachers on a batch and return the loss; call `.total.backward()`.

        On the first batch of each epoch in training mode, the gradient of each term is computed separately. A term
        without gradient raises an error. `shares` is updated. If the objective has `balance="gradient"`, the factors of
        its terms are updated.

        Args:
            batch: a batch that `kirsch.Batch.of` accepts, such as (inputs, targets) or a dict with "labels". Its arrays
                are those of numpy or of the framework, on any device.
            epoch: number of epochs done, for weights and temperatures that change during training.
            step_counts: the result of `counts` for all batches of the optimizer step, for gradient accumulation. The
                losses of these batches then add up to the loss of one large batch. None: the step has one batch.
            batch_counts: the result of `counts` for this batch alone. Give it if the batch is on an accelerator, with
                counts computed before the batch was moved there. None: the batch is counted in this call, which waits
                for the accelerator if the batch is on one.
            module: the module to run instead of `distiller.module`. In distributed training,
                `DistributedDataParallel(distiller.module)`.

        Raises:
            NumericError: a term gives the student no gradient.
            DataError: all targets of the step are masked.
        """
        model = self.module if module is None else module
        converted = Batch.of(batch)
        if batch_counts is None:  # before the batch is moved to the device of the student
            batch_counts = self._count([converted], first=self.module.training and int(epoch) != self._checked_epoch)
        placed = self._framework.inference.to_device(converted, self.student)
        output = self.step(model, placed, epoch, step_counts, batch_counts=batch_counts)
        if self.module.training and output.terms and int(epoch) != self._checked_epoch:
            norms = self._framework.training.gradient_norms(self.module, output.terms)
            if norms:
                self._checked_epoch = int(epoch)
                for sentence in self._gradient_shares.update(self.step.balance(norms)):
                    self._warn(sentence)
        return output

    def parts(self) -> list[Part]:
        """Return the models, the objective, and a row for each pair of layers that is compared."""
        rows = [
            [
                row["term"],
                f"{', '.join(texts(row['student']))} ({row['student_shape']})",
                f"{', '.join(texts(row['teacher']))} ({row['teacher_shape']})",
                row["adapter"] or "",
            ]
            for row in self.rows
        ]
        student: Line = [Piece("student  ", "faint"), Piece(type(self.student).__name__, "strong")]
        objective: Line = [Piece("loss     ", "faint"), Piece(str(self._objective))]
        table = Table([["term", "student", "teacher", "adapter"], *rows])
        return [student, objective, *([table] if rows else [])]

    @property
    def shares(self) -> dict[str, float]:
        """Share of each term in the gradient, on the first batch of the latest training epoch; initially empty."""
        return self._gradient_shares.latest

    @checked
    def counts(self, batches: Iterable[BatchLike]) -> dict[str, int]:
        """Return the numbers of samples, labels and positions in batches, for `step_counts` and `batch_counts`.

        The targets are checked here, if they are not on an accelerator. In distributed training, sum the counts of all
        processes by name, and pass the sums as `step_counts`.

        Raises:
            DataError: the label loss does not take the targets.
        """
        return self._count([Batch.of(batch) for batch in batches])

    def _count(self, batches: Sequence[Batch], *, first: bool = False) -> dict[str, int]:
        """Check the targets of batches, and count; `first`: also check targets on an accelerator."""
        for batch in batches:
            # `check` warns if a batch without targets follows one with targets. The warning is ignored here, because a
            # custom loop may mix such batches on purpose.
            self.step.check(batch, on_any_device=first)
        return self.step.counts(batches)

    def check_labels(self, targets: Any) -> None:
        """Check targets.

        Raises:
            DataError: the label loss does not take the targets.
        """
        check_labels(targets, self._logits_shape, self._objective)

    def parameters(self) -> Iterator[Any]:
        """Return the parameters of student and adapters, for the optimizer."""
        parameters: Iterator[Any] = self.module.parameters()
        return parameters

    @property
    def adapters(self) -> Any:
        """The adapters as one module, which has no parameters if no term needs an adapter."""
        return self.module.adapters

    @checked
    def train(self, mode: bool = True) -> Self:
        """Set student and adapters to training mode; the teachers stay in inference mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        """Set student and adapters to inference mode."""
        return self.train(mode=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the distiller: adapters, factors of the terms, and gradient shares.

        Save it together with the states of the student and the optimizer.
        """
        return {
            "adapters": self.module.adapter_state(),
            "balance": self.step.state(),
            "checked_epoch": self._checked_epoch,
            "shares": dict(self.shares),
            "first_shares": dict(self._gradient_shares.first),
        }

    @checked
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned.

        Raises:
            CheckpointError: the state belongs to another objective or to models of other shapes.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise CheckpointError(
                f"`state` has no {missing[0]!r}.", fix="Give a state that `Distiller.state_dict` returned."
            )
        expected, saved = self.module.adapter_state(), state["adapters"]
        different = sorted(expected.keys() ^ saved.keys())
        different = different or [n for n, value in expected.items() if tuple(value.shape) != tuple(saved[n].shape)]
        if different:
            raise CheckpointError(
                f"The adapters of the state differ from those of this distiller: {', '.join(different[:3])}.",
                fix="Build the distiller with the objective and the models that the state was saved with.",
            )
        self.module.load_adapter_state(saved)
        self.step.restore(state["balance"])
        self._checked_epoch = state["checked_epoch"]
        self._gradient_shares.restore(state["shares"], state["first_shares"])

    def close(self) -> None:
        """Remove the hooks from student and teachers; the next call adds them again."""
        self.module.close()
        if self._teacher_source is not None:
            self._teacher_source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copies(student: Any, teacher: Any) -> list[Any]:
    """Return frozen copies of the teachers."""
    teachers = one_or_more(teacher)
    if any(model is student for model in teachers):
        raise UsageError(
            "Student and teacher are the same object.", fix="Give the student as a copy: copy.deepcopy(teacher)."
        )
    return [framework_of(model).inference.frozen_copy(model, student) for model in teachers]


def _require_classes(store: TeacherStore, objective: Objective, shape: tuple[int, ...]) -> None:
    """Refuse a store that holds only the k largest logits, if its teacher and the student differ in number of classes.

    A store that holds all logits is checked when the terms are bound, by the shape of the logits.
    """
    compared = any(term.layers == ("logits", "logits") for term in objective.terms)
    if compared and store.specification.k and store.specification.classes != shape[-1]:
        refuse_classes(shape, (*shape[:-1], store.specification.classes or 0))
