"""Steps of a job that train: `train` on labels, `distill` a student, `recover` a pruned model; and `evaluate`."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from kirsch.annotations import Positive, Seed, Share
from kirsch.distillation.checks import first_batch
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.further_outputs import with_further_outputs
from kirsch.distillation.objective import Objective
from kirsch.distillation.presets import PRESETS
from kirsch.distillation.targets import uses_labels
from kirsch.distillation.term import KD_TEMPERATURE, KD_WEIGHT
from kirsch.errors import DataError, UsageError
from kirsch.frameworks.determinism import require_deterministic
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.training import Trained, Training, TrainingHooks
from kirsch.jobs.job import WEIGHTS, ignore
from kirsch.jobs.step import STEPS, Step, model_cells
from kirsch.options import FieldsError, with_fields

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kirsch.data.batches import Batch
    from kirsch.jobs.job import Job, Record

TRIAL_BATCHES = 3
"""Number of batches on which training is timed, to estimate the time of a step of the job."""


FORMS = "Give the name of a preset such as dkd, {preset: at, label_weight: 0.5} or {terms: [{loss: kd, weight: 0.9}]}."


def _read_objective(value: Any) -> Any:
    """Convert a dict with a preset or terms to an `Objective`; return the name of a preset unchanged."""
    try:
        if isinstance(value, str):
            PRESETS[value]
        elif isinstance(value, dict):
            return _objective(value)
        elif not isinstance(value, Objective):
            raise UsageError(f"The objective is {value!r}.", fix=FORMS)  # noqa: TRY301 - reported like the others
    except UsageError as error:
        raise FieldsError([((), error)]) from error
    return value


def _objective(fields: dict[str, Any]) -> Objective:
    """Return the objective of a dict with a preset or terms, and other fields of an `Objective`."""
    if ("preset" in fields) == ("terms" in fields):
        found = "both a preset and terms" if "preset" in fields else "neither a preset nor terms"
        raise UsageError(f"The objective has {found}.", fix=FORMS)
    if "preset" in fields:
        changes = {name: value for name, value in fields.items() if name != "preset"}
        preset = Objective.preset(fields["preset"]).to_dict()
        return with_fields(lambda values: Objective.from_dict({**preset, **values}), changes)
    if not isinstance(fields["terms"], (list, tuple)):
        raise UsageError(f"The terms of the objective are {fields['terms']!r}; expected a list.", fix=FORMS)
    problems: list[tuple[tuple[str | int, ...], UsageError]] = []
    for number, term in enumerate(fields["terms"]):
        try:
            if not isinstance(term, dict):
                raise FieldsError([((), UsageError(f"The term is {term!r}.", fix="Write {loss: kd, weight: 0.9}."))])  # noqa: TRY301
            with_fields(lambda values: Objective.from_dict({"terms": [values], "label_weight": 1.0}), term)
        except FieldsError as error:
            problems += [(("terms", number, *place), inner) for place, inner in error.problems]
    if problems:
        raise FieldsError(problems)
    return with_fields(Objective.from_dict, fields)


def _write_objective(value: Objective | str) -> Any:
    """Return the fields of an objective that differ from their defaults; return the name of a preset unchanged."""
    return value if isinstance(value, str) else {"terms": [], **_changed_fields(value)}


def _changed_fields(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_changed_fields(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return dict(value) if isinstance(value, dict) else value
    fields = {entry.name: (entry, getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    return {
        name: _changed_fields(item)
        for name, (entry, item) in fields.items()
        if item != entry.default
        and not (entry.default_factory is not dataclasses.MISSING and item == entry.default_factory())
    }


if TYPE_CHECKING:
    ObjectiveOption = Objective | str
else:
    ObjectiveOption = Annotated[Any, BeforeValidator(_read_objective), PlainSerializer(_write_objective)]
    """An objective or the name of a preset; recipes write it as a name or a dict."""


class TrainingStep(Training, Step):
    """Settings that all steps with training share."""

    seed: Seed | None = Field(None, description="seed of all random numbers; null: the seed of the recipe")  # type: ignore[assignment]

    def training(self, job: Job) -> Training:
        """Return the settings of the training loop."""
        values = {name: getattr(self, name) for name in Training.model_fields}
        return Training(**values | {"seed": job.seed if self.seed is None else self.seed})

    def _record(self, job: Job, folder: Path, trained: Trained, name: str, did: str = "") -> Record:
        record = {"model": name, "did": did, "history": trained.history}
        record |= job.save_and_evaluate(trained.model, folder)
        record["cells"] = model_cells(record)
        return record

    def _timed(self, job: Job, trial: Callable[[Any], Any]) -> float:
        """Return the estimated time of the step from one run of `trial` on a few batches, after a warm-up."""
        size = job.batch_size
        part = job.data.first_batches(TRIAL_BATCHES, size)
        trial(part)
        started = time.perf_counter()
        trial(part)
        return (time.perf_counter() - started) / len(part) * job.data.count_batches(size) * self.epochs


QUIET = TrainingHooks(event=ignore)
ONE_EPOCH = Training(epochs=1, learning_rate=1e-6)


@STEPS.register("evaluate")
class Evaluate(Step):
    """Evaluate the teacher without training. A job without a step `train` for the teacher begins with this step."""

    repeatable: ClassVar[bool] = False
    changes_model: ClassVar[bool] = False

    def preview(self, job: Job) -> None:
        """Check that the teacher runs on the data."""
        job.count(job.teacher)

    def run(self, job: Job, folder: Path) -> Record:
        """Write the weights of the teacher, and return its metrics."""
        framework_of(job.teacher).inference.inference_mode(job.teacher)
        record = {"model": "teacher", "did": "the given model", **job.save_and_evaluate(job.teacher, folder)}
        record["cells"] = model_cells(record)
        job.check_usable(record, "Give a teacher with trained weights, or add a step `train`.")
        job.set_trained("teacher", job.teacher)
        return record

    def load(self, job: Job, folder: Path, record: Record) -> None:
        """Load the weights that were evaluated."""
        del record
        _load_weights(job.teacher, folder)
        job.set_trained("teacher", job.teacher)


@STEPS.register("train")
class Train(TrainingStep):
    """Train the teacher or the student on the labels alone."""

    model: Literal["teacher", "student"] = Field("teacher", description="model to train, teacher or student")

    def preview(self, job: Job) -> None:
        """Check that the model runs on the data, and that the data has labels."""
        model = self._model_of(job)
        job.count(model)
        _require_labels(job, _first_batch(job, model))

    def seconds(self, job: Job) -> float:
        """Estimate the time of the training."""
        model, objective = self._model_of(job), _label_objective(job, self.model)
        return self._timed(
            job, lambda part: fit(model, part, training=ONE_EPOCH, hooks=QUIET, objective=objective, progress=False)
        )

    def run(self, job: Job, folder: Path) -> Record:
        """Train the model, and write its weights."""
        trained = fit(
            self._model_of(job),
            job.data.batches(job.batch_size),
            training=self.training(job),
            validation=job.validation(),
            hooks=job.hooks(),
            progress=False,
            objective=_label_objective(job, self.model),
        )
        framework_of(trained.model).inference.inference_mode(trained.model)
        self._set_model(job, trained.model)
        record = self._record(job, folder, trained, self.model, f"{self.model} trained")
        job.check_usable(record)
        return record

    def load(self, job: Job, folder: Path, record: Record) -> None:
        """Load the trained weights."""
        del record
        model = self._model_of(job)
        _load_weights(model, folder)
        self._set_model(job, model)

    def _model_of(self, job: Job) -> Any:
        return job.teacher if self.model == "teacher" else job.model

    def _set_model(self, job: Job, model: Any) -> None:
        """Replace the teacher or the student. If the job has no student, the teacher is also the model to compress."""
        if self.model == "teacher":
            job.teacher = model
        if self.model == job.model_name:
            job.model = model
        job.set_trained(self.model, model)


@STEPS.register("distill")
class Distill(TrainingStep):
    """Train the student on the outputs of the teacher."""

    needs_student: ClassVar[bool] = True
    makes: ClassVar[str] = "student"
    did: ClassVar[str] = "student"

    objective: ObjectiveOption = Field(
        "kd",
        description=(
            "name of a preset such as dkd; or {preset: at, label_weight: 0.5}, or "
            "{terms: [{loss: kd, weight: 0.9}], label_weight: 0.1}; see `kirsch methods`"
        ),
    )
    temperature: Positive | None = Field(
        None, description=f'temperature of the objective "kd"; null: {KD_TEMPERATURE:g}'
    )
    weight: Share | None = Field(
        None,
        description=(
            'weight of the soft-target loss of the objective "kd"; the label loss has the weight 1 - weight; null: '
            f"{KD_WEIGHT:g}"
        ),
    )

    def check(self) -> None:
        """Check that temperature and weight belong to the objective kd."""
        super().check()
        given = {name: getattr(self, name) for name in ("temperature", "weight") if getattr(self, name) is not None}
        if self.objective == "kd" or not given:
            return
        if isinstance(self.objective, str):
            found, terms = repr(self.objective), Objective.preset(self.objective).terms
        else:
            found, terms = "an objective with its own terms", self.objective.terms
        fix = f"Leave out {' and '.join(given)}"
        term = next((term for term in terms if term.temperature is not None or "temperature" not in given), None)
        if term is not None:
            options = ", ".join(f"{name}: {value:g}" for name, value in given.items())
            fix += (
                f", or give terms with these options, such as objective: {{terms: [{{loss: {term.loss}, {options}}}]}}"
            )
        raise UsageError(
            f"{' and '.join(given)} of the step can only be combined with the name 'kd' as objective; found {found}.",
            "Each term of an objective has its own temperature and weight.",
            f"{fix}.",
        )

    def objective_for(self, job: Job) -> Objective:
        """Return the objective, with the outputs (logits or probabilities) of the models of the job."""
        objective = self.objective
        if objective == "kd":
            objective = Objective.kd(
                temperature=KD_TEMPERATURE if self.temperature is None else self.temperature,
                weight=KD_WEIGHT if self.weight is None else self.weight,
            )
        elif isinstance(objective, str):
            objective = Objective.preset(objective)
        return dataclasses.replace(
            objective,
            student_outputs=objective.student_outputs or job.outputs.get(job.model_name),
            teacher_outputs=objective.teacher_outputs or job.outputs.get("teacher"),
        )

    def preview(self, job: Job) -> None:
        """Check that the models have the layers of the objective, that shapes fit, and that labels are valid."""
        student = _model_to_train(job)
        for model in (job.teacher, *([] if job.model is job.teacher else [student])):
            require_deterministic(model, job.example)
        first, objective = _first_batch(job, student), self.objective_for(job)
        if uses_labels(objective):
            _require_labels(job, first)
        # The training emits the same warnings as events.
        Distiller(student, job.teacher, objective, first, warn=lambda _: None).close()

    def seconds(self, job: Job) -> float:
        """Estimate the time of the training."""
        student, objective = _model_to_train(job), self.objective_for(job)

        def trial(part: Any) -> None:
            distill(
                student,
                job.teacher,
                part,
                objective=objective,
                training=ONE_EPOCH,
                hooks=QUIET,
                progress=False,
                check_teacher=False,
            )

        return self._timed(job, trial)

    def run(self, job: Job, folder: Path) -> Record:
        """Train the model on the outputs of the teacher, and write its weights."""
        trained = distill(
            _model_to_train(job),
            job.teacher,
            job.data.batches(job.batch_size),
            objective=self.objective_for(job),
            training=self.training(job),
            validation=job.validation(),
            hooks=job.hooks(),
            progress=False,
        )
        self._set_model(job, trained.model)
        record = self._record(job, folder, trained, self.makes, self.did)
        record["first_batch"] = trained.first_batch
        record["cells"].append(_gradient_share(trained))
        job.check_usable(record)
        return record

    def load(self, job: Job, folder: Path, record: Record) -> None:
        """Load the trained weights."""
        del record
        model = copy.deepcopy(job.model)  # the result of an earlier step must not change
        _load_weights(model, folder)
        self._set_model(job, model)

    def _set_model(self, job: Job, model: Any) -> None:
        job.model = model
        job.set_trained("student", model)


@STEPS.register("recover")
class Recover(Distill):
    """Train a pruned model on the outputs of the teacher, to recover the quality lost by pruning.

    If the model is pruned from the teacher, the default objective kd also compares its further outputs with those of
    the teacher.
    """

    needs_student: ClassVar[bool] = False
    makes: ClassVar[str] = "recovered"
    did: ClassVar[str] = "retrained"

    def objective_for(self, job: Job) -> Objective:
        """Return the objective; without a student, the default objective compares all outputs of the model."""
        objective = super().objective_for(job)
        if self.objective != "kd" or job.model_name != "teacher":
            return objective
        features, first = framework_of(job.model).features, _first_batch(job, job.model)
        return with_further_outputs(objective, features, job.model, job.teacher, first.inputs)

    def _set_model(self, job: Job, model: Any) -> None:
        job.model = model


def _model_to_train(job: Job) -> Any:
    """Return the model to train, as a copy if it is the teacher itself."""
    return copy.deepcopy(job.model) if job.model is job.teacher else job.model


def _first_batch(job: Job, model: Any) -> Batch:
    first = first_batch(framework_of(model).training, job.data.batches(job.batch_size))
    job.data.check_first(first)
    return first


def _require_labels(job: Job, first: Batch) -> None:
    """Refuse training data without labels, before training starts.

    Raises:
        DataError: the first batch has no labels.
    """
    if first.targets is None:
        raise DataError(
            f"The first batch of the train part of {job.data.name} has no labels.",
            f"The step {job.key!r} has a loss on labels.",
            "Give batches of (inputs, labels), or an objective with label_weight=0.",
        )


def _label_objective(job: Job, model: str) -> Objective:
    """Return the objective of the label loss of the task."""
    return dataclasses.replace(
        Objective.labels(), label_loss=job.task.label_loss, student_outputs=job.outputs.get(model)
    )


def _load_weights(model: Any, folder: Path) -> None:
    inference = framework_of(model).inference
    inference.load_weights(model, folder / WEIGHTS)
    inference.inference_mode(model)


def _gradient_share(trained: Trained) -> str:
    """Return the distillation term with the largest share in the gradient, and this share, as text.

    The share is taken from the first batch; if all terms start with weight 0, from the last epoch.
    """
    for shares in (trained.first_batch.get("gradient_shares", {}), trained.history[-1]["gradient_shares"]):
        terms = {name: share for name, share in shares.items() if name != "label"}
        if terms:
            name = max(terms, key=lambda name: terms[name])
            return f"{'KD' if name == 'kd' else name} {100 * terms[name]:.0f} % of gradient"
    return ""
