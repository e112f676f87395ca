"""Run a recipe, stage after stage. Finished stages are kept, so that an interrupted run continues after them."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch import files, strict_json
from kirsch.data.sources import load_data
from kirsch.errors import KirschError, LoadError, OutputError
from kirsch.failures import during
from kirsch.measurement.machine import environment
from kirsch.recipes import manifest, run_folder
from kirsch.recipes.job import RECORD, Job
from kirsch.recipes.manifest import ARTIFACTS, ENVIRONMENT, LOCK, METRICS, MODEL, PRUNED, REPORT
from kirsch.recipes.metrics import goal_text, metrics_of
from kirsch.recipes.models import build, random_weights
from kirsch.recipes.recipe import Recipe
from kirsch.recipes.stages import Stage, check_objectives, check_threads, plan_for, stages_of
from kirsch.references import source_hash
from kirsch.report import render
from kirsch.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.data.dataset import DataSet
    from kirsch.recipes.job import Listen, Stop
    from kirsch.recipes.recipe import Recipe

GIVEN = "given"
"""Reference that stands for an object passed to `kirsch.compress`."""


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Args:
        exit_code: 0 if all goals are met, 3 if one is missed.
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
    """
    references = [recipe.teacher.model, *([recipe.student.model] if recipe.student else []), recipe.data.source]
    student = recipe.student

    def make(reference: str) -> Callable[[], Any]:
        return lambda: build(reference, base=base, seed=recipe.seed)

    return Materials(
        make_teacher=make(recipe.teacher.model),
        make_student=make(student.model) if student else None,
        data=load_data(recipe.data.source, recipe.data.options, seed=recipe.seed, base=base),
        origin=" ".join(source_hash(reference, base=base) for reference in references),
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
    stop: Stop = lambda: None,
    materials: Materials | None = None,
) -> Outcome:
    """Run a recipe, or the unfinished stages of an interrupted run.

    Args:
        recipe: recipe to run.
        folder: run folder; a run of the same recipe in it is continued.
        base: folder that the recipe's references are relative to; the working folder by default.
        listen: called with each event.
        stop: returns an error if the run is to stop; the error is raised after a checkpoint is saved.
        materials: models and data as objects, in place of the recipe's references.

    Raises:
        OutputError: the folder is in use, holds other files, or cannot be written.
        RecipeError: the folder holds a run of another recipe.
        KirschError: a stage failed.
    """
    started = time.monotonic()
    base = base or Path()
    files.check_writable(folder)
    run_folder.refuse_foreign(recipe, folder)
    run_folder.refuse_misplaced(folder)
    busy = OutputError(
        f"The run {folder} is in use.", "Another process runs in it.", "Wait for it, or choose another folder."
    )
    with files.exclusive_lock(folder / LOCK, busy):
        altered = run_folder.open_folder(recipe, folder, base)
        materials = materials or materials_of(recipe, base)
        job = Job(recipe, folder, materials.data, materials.make_teacher, materials.make_student, listen, stop)
        job.altered = altered
        machine = environment()
        with during("in the checks before the first stage", _lower(job)):
            _preflight(job)  # an error up to here leaves a finished run unchanged
        run_folder.reopen(recipe, folder, base)
        files.write_json(folder / ENVIRONMENT, machine)
        goal, relative = goal_text(job), run_folder.relative(base, folder)
        job.emit({"event": "start", "name": recipe.name, "run": str(folder), "goal": goal, "base": relative})
        untrained = random_weights(recipe.teacher.model, recipe.seed) if recipe.teacher.train is None else ""
        altered_notes = run_folder.notes(altered, [stage.key for stage in stages_of(recipe)])
        for sentence in [*([untrained] if untrained else []), *altered_notes]:
            job.note(sentence)
        _run_stages(job, materials.origin)
        seconds = sum(record["seconds"] for record in job.records.values())
        metrics = metrics_of(job, machine, seconds)
        files.write_json(folder / METRICS, metrics)
        files.write_text(folder / REPORT, render(metrics))
        job.emit(
            {
                "event": "end",
                "met": metrics["goal"]["met"],
                "text": " · ".join(item["text"] for item in metrics["goal"]["items"]),
                "significance": " · ".join(
                    item["significance"] for item in metrics["goal"]["items"] if item["significance"]
                ),
                "report": str(folder / REPORT),
                "seconds": time.monotonic() - started,
            }
        )
        manifest.write(folder)
    return Outcome(0 if metrics["goal"]["met"] else 3, folder, metrics, job.models["result"])


def resume(folder: Path, *, listen: Listen, stop: Stop = lambda: None) -> Outcome:
    """Continue a run that was stopped, killed or damaged; of a finished run only the report is written again.

    Raises:
        LoadError: the folder does not hold a run, or its models were passed as objects.
        CheckpointError: the folder holds files that must be deleted or moved first; the message lists them.
    """
    run_folder.require(folder)
    run_folder.refuse_misplaced(folder)
    recipe, base = run_folder.stored(folder)
    if recipe.teacher.model == GIVEN:
        raise LoadError(
            f"{folder} is a run of kirsch.compress.",
            "Its models and data were passed as objects.",
            "Call kirsch.compress again with the same objects and this folder to continue the run.",
        )
    return run(recipe, folder, base=base, listen=listen, stop=stop)


def _preflight(job: Job) -> None:
    """Check labels, classes, threads, disk space, objectives and the pruning goal before any long work."""
    if not (job.folder / "checkpoints" / "measure" / "done").is_dir():
        check_threads(job.recipe)
    job.task.check_data(job.data)
    teacher = job.make_teacher()
    model = job.make_student() if job.make_student is not None else teacher
    sizes = sum(4 * job.count(candidate)[0] for candidate in (teacher, model))
    files.check_writable(job.folder, 12 * sizes + 10_000_000)  # weights and two checkpoints per stage
    check_objectives(job, teacher, model)
    if job.recipe.prune is not None:
        plan_for(job, model, job.recipe.prune)


def _lower(job: Job) -> str:
    """Return the fix for insufficient memory."""
    return f"Lower the batch size (data.batch_size of a recipe), which is {job.recipe.data.batch_size}."


def _run_stages(job: Job, origin: str) -> None:
    """Run all stages; a finished stage with the same inputs is kept."""
    inputs = hashlib.sha256(f"{__version__} {job.data.sha256} {origin} {job.recipe.seed}".encode()).hexdigest()
    stages = stages_of(job.recipe)
    for number, stage in enumerate(stages, start=1):
        error = job.stop()
        if error is not None:
            raise error
        section = stage.section.model_dump_json() if stage.section is not None else ""
        inputs = hashlib.sha256(f"{inputs} {stage.key} {section} {job.recipe.data.batch_size}".encode()).hexdigest()
        job.inputs = inputs
        done = job.stage_folder(stage.key) / "done"
        record = _finished(job, stage, done, inputs)
        if record is None:
            job.emit({"event": "stage_start", "number": number, "of": len(stages), "key": stage.key})
            record = _run_stage(job, stage, done, inputs)
            event = "stage_end"
        else:
            event = "stage_kept"
        for old in done.parent.glob("step-*"):  # also those of a run that was killed just before this line
            files.remove(old)
        job.records[stage.key] = record
        shown = {name: record[name] for name in ("did", "cells", "seconds")}
        job.emit({"event": event, "number": number, "key": stage.key, **shown})


def _finished(job: Job, stage: Stage, done: Path, inputs: str) -> dict[str, Any] | None:
    """Load a stage that is finished, undamaged and had the same inputs, and return its record; otherwise None."""
    if not done.is_dir():
        return None
    why = files.first_flaw(done) or _altered(job, f"checkpoints/{stage.key}/done/")
    if why:
        job.note(f"The stage {stage.key!r} is run again: {why}.")
        return None
    try:
        record: dict[str, Any] = strict_json.read(done / RECORD)
        changed = record["inputs"] != inputs
        if not changed:
            stage.load(job, done, record)
            why = _artifacts_damage(job, record) if stage.key == "export" else ""
    except (KirschError, OSError, ValueError, KeyError, TypeError) as error:
        why = f"its results cannot be loaded: {error}".rstrip(".")
    else:
        why = "its inputs have changed" if changed else why
    if why:
        job.note(f"The stage {stage.key!r} is run again: {why}.")
        return None
    return record


def _altered(job: Job, *prefixes: str) -> str:
    """Return the first difference from the run's manifest among files with these prefixes; empty if none."""
    return next((why for name, why in job.altered.items() if name.startswith(prefixes)), "")


def _artifacts_damage(job: Job, record: dict[str, Any]) -> str:
    """Return the damage of the exported files, which lie outside the stage's folder; empty if there is none."""
    path = job.folder / ARTIFACTS / record["artifact"]["file"]
    if not path.is_file() or files.sha256(path) != record["artifact"]["sha256"]:
        return f"{path} is missing or damaged"
    return _altered(job, MODEL, f"{PRUNED}/") or (
        files.first_flaw(job.folder / PRUNED) if "prune" in job.records else ""
    )


def _run_stage(job: Job, stage: Stage, done: Path, inputs: str) -> dict[str, Any]:
    started = time.perf_counter()
    with files.new_folder(done) as folder:
        # Inside `new_folder`, which reports every OSError as an error of the folder.
        with during(f"in the stage {stage.key!r}", _lower(job)):
            record = stage.run(job, folder)
        record |= {"inputs": inputs, "seconds": round(time.perf_counter() - started, 3)}
        files.write_json(folder / RECORD, record)
    return record
