"""Compression of a model in memory, from distillation to the report."""

from __future__ import annotations

import contextlib
import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kirsch import files, strict_json
from kirsch.annotations import Count, MaxDrop, Positive, Seed
from kirsch.arguments import ABBREVIATIONS, checked
from kirsch.data.annotations import Model
from kirsch.data.dataset import DataSet
from kirsch.deploy.export import Artifact
from kirsch.distillation.objective import Objective
from kirsch.errors import UsageError, nearest
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.progress import shown_on
from kirsch.frameworks.training import Training
from kirsch.graph.plan import Goal
from kirsch.jobs.goal import JobGoal, check_no_reference
from kirsch.jobs.job import ARTIFACTS, CHECKPOINTS, RECORD, WEIGHTS, ignore
from kirsch.progress import JobProgress, step_line, verdict_lines
from kirsch.pruning.options import PlanOptions
from kirsch.recipes.manifest import REPORT
from kirsch.recipes.recipe import DataSection, ModelSection, Name, Recipe
from kirsch.recipes.runner import Materials, new_folder_name, run
from kirsch.steps import Distill, Export, Measure, Prune, Recover, Step
from kirsch.tables import Part, Printable
from kirsch.user_warnings import warn


@dataclass(frozen=True)
class Compressed(Printable):
    """Result of `kirsch.compress`.

    Args:
        model: compressed model.
        artifact: exported file; None if the steps export none.
        report: path of the report.
        metrics: content of metrics.json.
        met: whether all goals are met.
        folder: run folder.
    """

    model: Any
    artifact: Artifact | None
    report: Path
    metrics: dict[str, Any]
    met: bool
    folder: Path

    def __repr__(self) -> str:
        """Return one line."""
        goals = "goals met" if self.met else "a goal is missed"
        return f"<kirsch.Compressed: {type(self.model).__name__}, {goals}, in {self.folder}>"

    def parts(self) -> list[Part]:
        """Return a line for each step, and the lines on the goals, the report and the duration."""
        items = self.metrics["goal"]["items"]
        verdict = {
            "met": self.met,
            "items": items,
            "significance": " · ".join(item["significance"] for item in items if item["significance"]),
            "report": str(self.report),
            "seconds": self.metrics["seconds"],
        }
        return [*map(step_line, self.metrics["steps"]), [], *verdict_lines(verdict)]


DEFAULT_TRAINING = Training()
"""Default options of the training after pruning, and of the training of a student."""

DEFAULT_BATCH_SIZE = 64


@checked
def compress(
    model: Model,
    data: DataSet,
    goal: Goal | None = None,
    *,
    student: Model | None = None,
    steps: Sequence[Step] | None = None,
    distill: Training | None = None,
    recover: Training | None = DEFAULT_TRAINING,
    objective: Objective | str | None = None,
    max_drop: MaxDrop | None = None,
    speedup: Positive | None = None,
    task: str = "classification",
    batch_size: Count | None = None,
    seed: Seed = 0,
    folder: str | Path | None = None,
    name: Name | None = None,
    listen: Callable[[dict[str, Any]], Any] = ignore,
    progress: bool | None = None,
    **plan_options: Any,
) -> Compressed:
    """Compress a trained model: distill it if a student is given, prune, recover, export, measure and report.

        kirsch.compress(model, data, kirsch.Goal(macs=0.5), exclude=["stem"])
        kirsch.compress(model, data, steps=[Prune(goal=Goal(macs=0.7)), Recover(epochs=5), Prune(...), Export()])

    Args:
        model: trained model. It is the teacher of all training, and is not changed.
        data: data set with training, validation and test part, in memory or from loaders; for a model with several
            inputs, its inputs are a tuple or dict.
        goal: limits of the pruned model, as fractions of the cost of the model before the first step `Prune`. With
            `steps`, the first step `Prune` may be without a goal; it then prunes to these limits.
        student: small untrained model that learns from the model and is then pruned; by default the model itself is
            pruned.
        steps: steps in order, from `kirsch.steps`, in place of the usual ones: `Distill` (with a student), `Prune`,
            `Recover`, `Export`, `Measure`. The arguments `distill`, `recover`, `objective` and the plan options then
            have no effect and are refused.
        distill: options of the training of the student.
        recover: options of the training after pruning; None to leave this training out.
        objective: `Objective`, or name of a preset, of both trainings. The default "kd" has soft targets and labels.
            Without a student, the training after pruning also has a term for each further output of the model, such as
            the age in {"logits": ..., "age": ...}. `Objective.kd()` has no such terms.
        max_drop: largest allowed drop of accuracy compared with the model, as a fraction below 1: 0.01 is one
            percentage point.
        speedup: smallest allowed speedup over the model.
        task: name of the task of the model in `kirsch.tasks.TASKS`.
        batch_size: samples per training step. None: the batch size of the loader if the training part is one, else 64.
        seed: seed of all random numbers, unless a training or step has its own.
        folder: run folder; by default a new folder under runs/. The same call with the same folder continues a run.
        name: name of the model in the report; by default the name of its class.
        listen: function that is called with each event.
        progress: show the lines of the command `kirsch compress`, on the standard error. None: only on a terminal and
            in a notebook. Without these lines and without `listen`, warnings of the run are Python warnings.
        plan_options: options of `kirsch.plan`, such as `exclude`, `round_to`, `importance`; and `compensate` of
            `kirsch.prune`.

    Raises:
        UsageError: there is no goal, `distill` is given without a student, an option is not valid, or options are given
            together with `steps`.
        KirschError: a step failed; the run folder keeps the finished steps.
    """
    _refuse_unknown(plan_options)
    if goal is not None:
        check_no_reference(goal)
    if distill is not None and student is None:
        raise UsageError("`distill` of kirsch.compress needs a student.", fix="Give student=..., or remove distill.")
    if steps is None:
        steps = _usual_steps(student is not None, goal, distill, recover, objective, plan_options)
    else:
        _refuse_beside_steps(distill, recover, objective, plan_options)
    limits = goal.to_dict() if goal is not None else {}
    recipe = Recipe(
        name=type(model).__name__ if name is None else name,
        seed=seed,
        task=task,
        data=DataSection(source=None, batch_size=_batch_size(batch_size, data)),
        teacher=ModelSection(model=None),
        student=None if student is None else ModelSection(model=None),
        steps=tuple(steps),
        goal=JobGoal(max_drop=max_drop, speedup=speedup, **limits),
    )
    materials = Materials(
        make_teacher=lambda: copy.deepcopy(model),
        make_student=(lambda: copy.deepcopy(student)) if student is not None else None,
        data=data,
        origin=_weights_hash(model) + ("" if student is None else _weights_hash(student)),
    )
    run_folder = Path(folder) if folder is not None else Path("runs") / new_folder_name(recipe)
    with _shown(listen, progress) as listen_and_show:
        outcome = run(recipe, run_folder, listen=listen_and_show, materials=materials)
    return Compressed(
        model=outcome.model,
        artifact=_artifact(run_folder),
        report=run_folder / REPORT,
        metrics=outcome.metrics,
        met=outcome.exit_code == 0,
        folder=run_folder,
    )


@contextlib.contextmanager
def _shown(listen: Callable[[dict[str, Any]], Any], progress: bool | None) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """Yield a function that shows each event, if progress is shown, and calls `listen`.

    Without progress and without `listen`, warnings of the run are Python warnings.
    """
    display = shown_on(progress)
    if display is None:
        yield _warn_once() if listen is ignore else listen
        return
    shown = JobProgress(display)

    def show(event: dict[str, Any]) -> None:
        shown(event)
        if event["event"] == "end":
            display.progress(*verdict_lines(event))
        listen(event)

    try:
        yield show
    finally:
        display.stop_status()


def _warn_once() -> Callable[[dict[str, Any]], Any]:
    """Return a function that emits each warning event as a Python warning, if its text was not emitted before."""
    emitted: set[str] = set()

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "warning" and event["text"] not in emitted:
            emitted.add(event["text"])
            warn(event["text"])

    return listen


def _batch_size(batch_size: int | None, data: DataSet) -> int:
    """Return the batch size of training: that of the loader if the training part is a loader."""
    if not data.is_stream:
        return batch_size or DEFAULT_BATCH_SIZE
    if batch_size is not None:
        raise UsageError(
            f"`batch_size` of kirsch.compress has no effect: the training part of {data.name} is a loader.",
            fix="Set it in the loader, and leave it out here.",
        )
    return data.train.batch_size or DEFAULT_BATCH_SIZE


def _usual_steps(
    with_student: bool,
    goal: Goal | None,
    distill: Training | None,
    recover: Training | None,
    objective: Objective | str | None,
    plan_options: dict[str, Any],
) -> list[Step]:
    """Return the default steps, for a call without `steps`."""
    if goal is None:
        raise UsageError("`goal` of kirsch.compress is missing.", fix="Give kirsch.Goal(macs=0.5), or steps.")
    if objective is not None and recover is None and not with_student:
        raise UsageError(
            "`objective` of kirsch.compress has no effect: without a student and recovery, nothing is trained.",
            fix="Leave out `objective`, or give recover=kirsch.Training(...).",
        )
    chosen = "kd" if objective is None else objective

    def settings(training: Training) -> dict[str, Any]:
        values = {name: getattr(training, name) for name in Training.model_fields}
        return values if "seed" in training.model_fields_set else values | {"seed": None}  # None: the seed of the job

    steps: list[Step] = []
    if with_student:
        steps.append(Distill(objective=chosen, **settings(distill or DEFAULT_TRAINING)))
    steps.append(Prune(**plan_options))
    if recover is not None:
        steps.append(Recover(objective=chosen, **settings(recover)))
    return [*steps, Export(), Measure()]


def _refuse_unknown(plan_options: dict[str, Any]) -> None:
    """Raise an error for keywords that are not options of a plan."""
    arguments = [name for name in inspect.signature(compress).parameters if name != "plan_options"]
    options = [*PlanOptions.model_fields, "compensate"]
    for name, value in plan_options.items():
        if name not in options:
            refused = Goal.refuse_argument(name)
            if refused is not None:
                raise refused
            fix = nearest(name, [*arguments, *options])
            full_name = ABBREVIATIONS.get(name, name)
            if full_name in ("training", *Training.model_fields):
                fix = f"Give recover=kirsch.Training({'...' if name == 'training' else f'{full_name}=...'})."
            elif full_name in inspect.signature(Goal).parameters:
                fix = f"Write goal=kirsch.Goal({full_name}={value!r})."
            raise UsageError(
                f"kirsch.compress has no argument {name!r}.",
                f"Arguments: {', '.join(arguments)}. Options of the plan: {', '.join(options)}.",
                fix or "Leave it out.",
            )


def _refuse_beside_steps(
    distill: Training | None, recover: Training | None, objective: Any, plan_options: dict[str, Any]
) -> None:
    given = {
        "distill": distill is not None,
        "recover": recover is not DEFAULT_TRAINING,  # not `!=`: a caller may give an equal object
        "objective": objective is not None,
        **dict.fromkeys(plan_options, True),
    }
    unused = [name for name, is_given in given.items() if is_given]
    if unused:
        raise UsageError(
            f"`{unused[0]}` of kirsch.compress has no effect together with `steps`.",
            fix="Give it to the step: kirsch.steps.Recover(epochs=5), kirsch.steps.Prune(exclude=['stem']).",
        )


def _artifact(folder: Path) -> Artifact | None:
    """Return the exported file of a run; None if there is none."""
    record = folder / CHECKPOINTS / "export" / "done" / RECORD
    if not record.is_file():
        return None
    exported = strict_json.read(record)["artifact"]
    return Artifact.of_dict(folder / ARTIFACTS / exported["file"], exported)


def _weights_hash(model: Any) -> str:
    """Return a hash over the weights of a model, so that a run folder of another model is not continued."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / WEIGHTS
        framework_of(model).inference.save_weights(model, weights)
        return files.sha256(weights)
