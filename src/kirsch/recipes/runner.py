"""Run the steps of a job. Finished steps are kept, so that an interrupted run continues after them."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch import files, strict_json
from kirsch.data.sources import load_data
from kirsch.errors import NOT_REACHED, KirschError, LoadError, OutputError, UsageError
from kirsch.failures import during
from kirsch.frameworks.find import framework_of
from kirsch.jobs.job import CHECKPOINTS, RECORD, Job, ignore, never, without_masks
from kirsch.measurement.machine import environment
from kirsch.pruning.store import save
from kirsch.recipes import manifest, run_folder
from kirsch.recipes.goals import goal_texts, goals_of_steps, refuse_unreachable
from kirsch.recipes.manifest import ENVIRONMENT, LOCK, METRICS, PRUNED, REPORT
from kirsch.recipes.metrics import metrics_of
from kirsch.recipes.models import build, random_weights
from kirsch.recipes.recipe import NOT_TRAINED, TRAIN_STUDENT
from kirsch.references import source_hash
from kirsch.report import render
from kirsch.steps import Prune, Train
from kirsch.tasks import TASKS
from kirsch.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kirsch.data.dataset import DataSet
    from kirsch.jobs.job import Listen, Stop
    from kirsch.jobs.step import Step
    from kirsch.recipes.recipe import Recipe


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Args:
        exit_code: 0 if all goals are met, `NOT_REACHED` if one is missed.
        folder: run folder.
        metrics: content of metrics.json.
        model: resulting model.
    """

    exit_code: int
    folder: Path
    metrics: dict[str, Any]
    model: Any


@dataclass(frozen=True)
class Materials:
    """Models and data of a job.

    Args:
        make_teacher, make_student: functions that return the models before training.
        data: data set.
        origin: hash over the sources of models and data.
    """

    make_teacher: Callable[[], Any]
    make_student: Callable[[], Any] | None
    data: DataSet
    origin: str


def materials_of(recipe: Recipe, base: Path) -> Materials:
    """Return the models and data that a recipe refers to.

    Args:
        recipe: recipe with references to models and data.
        base: folder that the references are relative to.

    Raises:
        LoadError: a reference is null.
    """
    teacher, student, source = recipe.teacher.model, recipe.student, recipe.data.source
    if teacher is None or source is None or (student is not None and student.model is None):
        key = "teacher.model" if teacher is None else "data.source" if source is None else "student.model"
        raise LoadError(
            f"`{key}` of the recipe {recipe.name!r} is null, so there is nothing to load.",
            fix=f"Set {key}. To continue a run of kirsch.compress, whose recipe has null for objects, call "
            "kirsch.compress again with the same objects and the folder of the run.",
        )
    references = [teacher, *([student.model] if student is not None and student.model is not None else []), source]

    def make(reference: str) -> Callable[[], Any]:
        return lambda: build(reference, base=base, seed=recipe.seed)

    return Materials(
        make_teacher=make(teacher),
        make_student=make(student.model) if student is not None and student.model is not None else None,
        data=load_data(source, recipe.data.options, seed=recipe.seed, base=base),
        origin=" ".join(source_hash(reference, base=base) for reference in references),
    )


def job_of(recipe: Recipe, folder: Path, materials: Materials, listen: Listen = ignore, stop: Stop = never) -> Job:
    """Return the job of a recipe, with its models and data.

    Raises:
        DataError: the labels are not valid for the task.
    """
    task = TASKS[recipe.task]()
    task.check_data(materials.data)
    outputs = {"teacher": recipe.teacher.outputs, "student": recipe.student.outputs if recipe.student else None}
    return Job(
        data=materials.data,
        task=task,
        folder=folder,
        make_teacher=materials.make_teacher,
        make_student=materials.make_student,
        goal=recipe.goal,
        seed=recipe.seed,
        batch_size=recipe.data.batch_size,
        outputs=outputs,
        listen=listen,
        stop=stop,
    )


def new_folder_name(recipe: Recipe) -> str:
    """Return a name for a run folder: date, recipe name, four random hexadecimal digits."""
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in recipe.name)[:60]
    return f"{datetime.now(UTC).date().isoformat()}-{plain}-{secrets.token_hex(2)}"


def run(
    recipe: Recipe,
    folder: Path,
    *,
    base: Path | None = None,
    listen: Listen,
    stop: Stop = never,
    materials: Materials | None = None,
) -> Outcome:
    """Run a recipe, or the unfinished steps of an interrupted run.

    Args:
        recipe: recipe to run.
        folder: run folder; a run of the same recipe in it is continued.
        base: folder that the recipe's references are relative to; the working folder by default.
        listen: function that is called with each event.
        stop: function that returns an error if the run should stop, otherwise None. The error is raised after a
            checkpoint is saved.
        materials: models and data as objects, in place of the recipe's references.

    Raises:
        OutputError: the folder is in use, holds other files, or cannot be written.
        RecipeError: the folder holds a run of another recipe.
        KirschError: a step failed.
    """
    base = base or Path()
    new = run_folder.missing_paths(folder)
    files.check_writable(folder)
    run_folder.refuse_foreign(recipe, folder)
    run_folder.refuse_misplaced(folder)
    busy = OutputError(
        f"The run {folder} is in use.", "Another process runs in it.", "Wait for it, or choose another folder."
    )
    with contextlib.ExitStack() as on_error, files.exclusive_lock(folder / LOCK, busy):
        on_error.callback(run_folder.discard, new)
        altered = run_folder.open_folder(recipe, folder, base)
        materials = materials or materials_of(recipe, base)
        machine = environment()
        steps = recipe.all_steps
        job = job_of(recipe, folder, materials, listen, stop)
        with during("in the checks before the first step", _memory_fix(job)):
            preflight(job, steps)  # an error up to here leaves a finished run unchanged, and no new folder behind
        on_error.pop_all()
        run_folder.reopen(recipe, folder, base)
        files.write_json(folder / ENVIRONMENT, machine)
        goals, relative = goal_texts(job, steps), run_folder.relative(base, folder)
        job.emit({"event": "start", "name": recipe.name, "run": str(folder), "goals": goals, "base": relative})
        notes = _untrained_notes(recipe) + _loader_notes(recipe, job) + _overlap_notes(job.data)
        for sentence in [*notes, *run_folder.notes(altered, list(steps))]:
            job.note(sentence)
        _run_steps(job, steps, materials.origin, altered)
        job.model = without_masks(job.model)
        if any(isinstance(step, Prune) for step in steps.values()):
            save(job.model, folder / PRUNED)
        seconds = sum(record["seconds"] for record in job.records.values())
        metrics = metrics_of(job, recipe, machine, seconds)
        files.write_json(folder / METRICS, metrics)
        files.write_text(folder / REPORT, render(metrics))
        items = metrics["goal"]["items"]
        job.emit(
            {
                "event": "end",
                "met": metrics["goal"]["met"],
                "items": [{"text": item["text"], "met": item["met"]} for item in items],
                "significance": " · ".join(item["significance"] for item in items if item["significance"]),
                "report": str(folder / REPORT),
                "seconds": seconds,
            }
        )
        manifest.write(folder)
    return Outcome(0 if metrics["goal"]["met"] else NOT_REACHED, folder, metrics, job.model)


def resume(folder: Path, *, listen: Listen, stop: Stop = never) -> Outcome:
    """Continue a run that was stopped, killed or damaged.

    If the run has finished and is undamaged, its steps are kept, and its metrics and report are written again.

    Raises:
        LoadError: the folder does not hold a run, or its models were passed as objects.
        CheckpointError: the folder holds files that must be deleted or moved first; the message lists them.
    """
    run_folder.require(folder)
    run_folder.refuse_misplaced(folder)
    recipe, base = run_folder.stored_recipe(folder)
    if recipe.teacher.model is None:
        raise LoadError(
            f"{folder} is a run of kirsch.compress.",
            "Its models and data were passed as objects.",
            "Call kirsch.compress again with the same objects and this folder to continue the run.",
        )
    return run(recipe, folder, base=base, listen=listen, stop=stop)


def _untrained_notes(recipe: Recipe) -> list[str]:
    """Return notes if the teacher has random weights and is not trained, and if the student is not trained."""
    notes = [f"{NOT_TRAINED} {TRAIN_STUDENT}, unless its weights are trained."] * recipe.student_is_not_trained
    if recipe.teacher.model is not None and not any(isinstance(step, Train) for step in recipe.steps):
        notes.append(random_weights(recipe.teacher.model, recipe.seed))
    return list(filter(None, notes))


def _loader_notes(recipe: Recipe, job: Job) -> list[str]:
    """Return a note if the batch size of a recipe does not apply to training."""
    if recipe.data.source is None or not job.data.is_stream:
        return []
    return ["data.batch_size applies to evaluations only: the training part is a loader with its own batch size."]


def _overlap_notes(data: DataSet) -> list[str]:
    """Return a note for each part that contains test samples."""
    return [
        f"{count} of the {len(data.test)} test samples of {data.name} are also in its {part} part, so the results on "
        "the test part may be too good. Remove them from one of the parts."
        for part, count in data.test_samples_in_other_parts().items()
        if count
    ]


def preflight(job: Job, steps: Mapping[str, Step]) -> None:
    """Check disk space, the steps in order and their goals before any long work, on models that are not trained.

    Raises:
        KirschError: a step would fail.
        GoalError: the steps do not reach a limit of the cost.
    """
    job.build()
    models = [job.teacher, *([job.model] if job.model is not job.teacher else [])]
    counts = [job.count(model) for model in models]
    job.start_cost = job.cost(job.model, job.goal.cost, *goals_of_steps(steps))
    sizes = sum(4 * parameters for parameters, _ in counts)
    files.check_writable(job.folder, 12 * sizes + 10_000_000)  # weights and two checkpoints per step
    for key, step in steps.items():
        job.key = key
        step.preview(job)
    if job.goal.cost is not None:
        refuse_unreachable(job, steps, job.cost(job.model, job.goal.cost))
    job.plans.clear()


def _memory_fix(job: Job) -> str:
    """Return the fix in errors about insufficient memory."""
    return f"Lower the batch size (data.batch_size of a recipe), which is {job.batch_size}."


def _run_steps(job: Job, steps: Mapping[str, Step], origin: str, altered: dict[str, str]) -> None:
    """Run all steps; a finished step with the same inputs is kept."""
    job.build()
    inputs = hashlib.sha256(f"{__version__} {job.data.sha256} {origin} {job.seed}".encode()).hexdigest()
    for number, (key, step) in enumerate(steps.items(), start=1):
        error = job.stop()
        if error is not None:
            raise error
        inputs = hashlib.sha256(f"{inputs} {key} {step.identity(job)} {job.batch_size}".encode()).hexdigest()
        job.key, job.inputs = key, inputs
        done = job.step_folder(key) / "done"
        record = _finished(job, step, done, altered)
        if record is None:
            job.emit({"event": "step_start", "number": number, "of": len(steps), "key": key})
            record = _run_step(job, step, done)
            event = "step_end"
        else:
            event = "step_kept"
        for old in done.parent.glob("step-*"):  # checkpoints; a run killed just before this line left some, too
            files.remove(old)
        job.records[key] = record
        shown = {name: record[name] for name in ("did", "cells", "seconds")}
        job.emit({"event": event, "number": number, "key": key, **shown})


def _finished(job: Job, step: Step, done: Path, altered: dict[str, str]) -> dict[str, Any] | None:
    """Load a step that is finished, undamaged and had the same inputs, and return its record; otherwise None."""
    if not done.is_dir():
        return None
    why = files.first_flaw(done) or _altered(altered, f"{CHECKPOINTS}/{job.key}/done/")
    if not why:
        try:
            record: dict[str, Any] = strict_json.read(done / RECORD)
            if record["inputs"] != job.inputs:
                why = "its inputs have changed"
            else:
                step.load(job, done, record)
                why = _damage(job, step.outside_files(record), altered)
        except (KirschError, OSError, ValueError, KeyError, TypeError) as error:
            why = f"its results cannot be loaded: {error}".rstrip(".")
    if why:
        job.note(f"The step {job.key!r} is run again: {why}.")
        return None
    return record


def _altered(altered: dict[str, str], *prefixes: str) -> str:
    """Return the first difference from the run's manifest among files with these prefixes; empty if none."""
    return next((why for name, why in altered.items() if name.startswith(prefixes)), "")


def _damage(job: Job, hashes: Mapping[str, str], altered: dict[str, str]) -> str:
    """Return a description of the damage of a step's files outside its folder; empty if they are undamaged.

    The manifest of the step does not cover these files.
    """
    for name, digest in hashes.items():
        path = job.folder / name
        if not path.is_file() or files.sha256(path) != digest:
            return f"{path} is missing or damaged"
    return _altered(altered, *hashes)


def _run_step(job: Job, step: Step, done: Path) -> dict[str, Any]:
    started = time.perf_counter()
    with files.new_folder(done) as folder:
        # Errors of the step are translated inside `new_folder`, which reports every OSError as an error of the folder.
        with during(f"in the step {job.key!r}", _memory_fix(job)):
            before = _identity(job.model)
            record = step.run(job, folder)
            if step.changes_model and "model" not in record.get("roles", ()) and _identity(job.model) != before:
                raise UsageError(
                    f"The step {job.key!r} changed the model of the job without evaluating it.",
                    "Goals and report would show the numbers of an earlier model.",
                    "Set job.model, then add **job.save_and_evaluate(job.model, folder) to the record of the step.",
                )
        record |= {"inputs": job.inputs, "seconds": round(time.perf_counter() - started, 3)}
        files.write_json(folder / RECORD, record)
    return record


def _identity(model: Any) -> tuple[int, str]:
    """Return values that differ if the model is another object or has other weights."""
    return id(model), framework_of(model).inference.fingerprint(model)
