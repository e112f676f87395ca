"""Running a recipe: stage after stage, each finished one kept, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch import files, strict_json
from kirsch.errors import KirschError, LoadError, OutputError
from kirsch.failures import during
from kirsch.measurement.machine import environment
from kirsch.recipes import run_folder, seal
from kirsch.recipes.job import RECORD, Job
from kirsch.recipes.metrics import goal_text, metrics_of
from kirsch.recipes.models import build, random_weights, source_hash
from kirsch.recipes.recipe import Recipe
from kirsch.recipes.seal import ARTIFACTS, ENVIRONMENT, LOCK, METRICS, MODEL, PRUNED, REPORT
from kirsch.recipes.stages import Stage, check_objectives, check_threads, plan_for, stages_of
from kirsch.recipes.tasks.data import DataSet, load_data
from kirsch.report import render
from kirsch.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.recipes.job import Listen, Stop
    from kirsch.recipes.recipe import Recipe

GIVEN = "given"
"""In place of a reference, for a model that was given to `kirsch.compress` as an object."""


@dataclass(frozen=True)
class Outcome:
    """What a run ended with.

    Args:
        exit_code: 0 goals met, 3 a goal missed.
        folder: the run folder.
        metrics: as in metrics.json.
        model: the result.
    """

    exit_code: int
    folder: Path
    metrics: dict[str, Any]
    model: Any


@dataclass(frozen=True)
class Materials:
    """Where a job's models and data come from.

    Args:
        make_teacher, make_student: the models before any training.
        data: the data set.
        origin: a hash over the sources behind them.
    """

    make_teacher: Callable[[], Any]
    make_student: Callable[[], Any] | None
    data: DataSet
    origin: str


def materials_of(recipe: Recipe, base: Path) -> Materials:
    """The models and data that a recipe names.

    Args:
        recipe: with references.
        base: folder that they are relative to.
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
    """A name for a run folder: date, recipe, four random digits."""
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
    """Do a whole job, or what is left of it.

    Args:
        recipe: what to do.
        folder: the run folder; one of the same recipe goes on where it was.
        base: folder that the recipe's files are relative to; the working folder if left out.
        listen: is given each event.
        stop: gives an error when the run shall stop; it is raised after a checkpoint is saved.
        materials: models and data given as objects, in place of the recipe's references.

    Raises:
        OutputError: the folder is in use, holds something else, or cannot be written.
        RecipeError: the folder holds a run of another recipe.
        KirschError: whatever the stages raise.
    """
    started = time.monotonic()
    base = base or Path()
    files.check_writable(folder)
    run_folder.refuse_strangers(recipe, folder)
    run_folder.refuse_misplaced(folder)
    busy = OutputError(
        f"The run {folder} is in use.", "Another process works on it.", "Wait for it, or choose another folder."
    )
    with files.exclusive_lock(folder / LOCK, busy):
        altered = run_folder.begin(recipe, folder, base)
        materials = materials or materials_of(recipe, base)
        job = Job(recipe, folder, materials.data, materials.make_teacher, materials.make_student, listen, stop)
        job.altered = altered
        surroundings = environment()
        with during("in the checks before the first stage", _lower(job)):
            _preflight(job)  # what fails up to here leaves a finished run as it is
        run_folder.reopen(recipe, folder, base)
        files.write_json(folder / ENVIRONMENT, surroundings)
        goal, relative = goal_text(job), run_folder.relative(base, folder)
        job.tell({"event": "start", "name": recipe.name, "run": str(folder), "goal": goal, "base": relative})
        unstated = random_weights(recipe.teacher.model, recipe.seed) if recipe.teacher.train is None else ""
        altered_notes = run_folder.notes(altered, [stage.key for stage in stages_of(recipe)])
        for sentence in [*([unstated] if unstated else []), *altered_notes]:
            job.note(sentence)
        _work(job, materials.origin)
        seconds = sum(record["seconds"] for record in job.records.values())
        metrics = metrics_of(job, surroundings, seconds)
        files.write_json(folder / METRICS, metrics)
        files.write_text(folder / REPORT, render(metrics))
        job.tell(
            {
                "event": "end",
                "met": metrics["goal"]["met"],
                "text": " · ".join(item["text"] for item in metrics["goal"]["items"]),
                "doubt": " · ".join(item["doubt"] for item in metrics["goal"]["items"] if item["doubt"]),
                "report": str(folder / REPORT),
                "seconds": time.monotonic() - started,
            }
        )
        seal.seal(folder)
    return Outcome(0 if metrics["goal"]["met"] else 3, folder, metrics, job.models["result"])


def resume(folder: Path, *, listen: Listen, stop: Stop = lambda: None) -> Outcome:
    """Go on with a run that was stopped, killed or damaged; a finished one only gets its report anew.

    Raises:
        LoadError: the folder holds no run, or one whose models were given as objects.
        CheckpointError: the folder holds something that is to be deleted or moved first; names it.
    """
    run_folder.require(folder)
    run_folder.refuse_misplaced(folder)
    recipe, base = run_folder.stored(folder)
    if recipe.teacher.model == GIVEN:
        raise LoadError(
            f"{folder} is a run of kirsch.compress.",
            "Its models and data were given as objects.",
            "Call kirsch.compress again with them and this folder: it goes on where it was.",
        )
    return run(recipe, folder, base=base, listen=listen, stop=stop)


def _preflight(job: Job) -> None:
    """What can go wrong is found before any long work: classes, threads, disk, objectives, the goal of pruning."""
    if not (job.folder / "checkpoints" / "measure" / "done").is_dir():
        check_threads(job.recipe)
    teacher = job.make_teacher()
    model = job.make_student() if job.make_student is not None else teacher
    sizes = sum(4 * job.count(candidate)[0] for candidate in (teacher, model))
    files.check_writable(job.folder, 12 * sizes + 10_000_000)  # each stage: weights, two checkpoints with momentum
    check_objectives(job, teacher, model)
    if job.recipe.prune is not None:
        plan_for(job, model, job.recipe.prune)


def _lower(job: Job) -> str:
    """Return the fix for a lack of memory."""
    return f"Lower the batch size (data.batch_size of a recipe), which is {job.recipe.data.batch_size}."


def _work(job: Job, origin: str) -> None:
    """All stages; a finished one whose inputs are the same is kept."""
    inputs = hashlib.sha256(f"{__version__} {job.data.sha256} {origin} {job.recipe.seed}".encode()).hexdigest()
    stages = stages_of(job.recipe)
    for number, stage in enumerate(stages, start=1):
        error = job.stop()
        if error is not None:
            raise error
        section = stage.section.model_dump_json() if stage.section is not None else ""
        inputs = hashlib.sha256(f"{inputs} {stage.key} {section} {job.recipe.data.batch_size}".encode()).hexdigest()
        job.inputs = inputs
        done = job.place(stage.key) / "done"
        record = _finished(job, stage, done, inputs)
        if record is None:
            job.tell({"event": "stage_start", "number": number, "of": len(stages), "key": stage.key})
            record = _do(job, stage, done, inputs)
            happened = "stage_end"
        else:
            happened = "stage_kept"
        for old in done.parent.glob("step-*"):  # also those of a run that was killed just before this
            files.remove(old)
        job.records[stage.key] = record
        shown = {name: record[name] for name in ("did", "cells", "seconds")}
        job.tell({"event": happened, "number": number, "key": stage.key, **shown})


def _finished(job: Job, stage: Stage, done: Path, inputs: str) -> dict[str, Any] | None:
    """The record of a stage that is finished, sound, and had the same inputs; its models are loaded."""
    if not done.is_dir():
        return None
    why = files.first_flaw(done) or _altered(job, f"checkpoints/{stage.key}/done/")
    if why:
        job.note(f"The stage {stage.key!r} is done again: {why}.")
        return None
    try:
        record: dict[str, Any] = strict_json.read(done / RECORD)
        changed = record["inputs"] != inputs
        if not changed:
            stage.load(job, done, record)
            why = _artifacts_damage(job, record) if stage.key == "export" else ""
    except (KirschError, OSError, ValueError, KeyError, TypeError) as error:
        why = f"what it left cannot be taken up: {error}".rstrip(".")
    else:
        why = "its inputs have changed" if changed else why
    if why:
        job.note(f"The stage {stage.key!r} is done again: {why}.")
        return None
    return record


def _altered(job: Job, *places: str) -> str:
    """What differs from the manifest of the run among files whose names begin so; empty if nothing does."""
    return next((why for name, why in job.altered.items() if name.startswith(places)), "")


def _artifacts_damage(job: Job, record: dict[str, Any]) -> str:
    """What is wrong with what the export left outside its own folder; empty when it is sound."""
    path = job.folder / ARTIFACTS / record["artifact"]["file"]
    if not path.is_file() or files.sha256(path) != record["artifact"]["sha256"]:
        return f"{path} is missing or damaged"
    return _altered(job, MODEL, f"{PRUNED}/") or (
        files.first_flaw(job.folder / PRUNED) if "prune" in job.records else ""
    )


def _do(job: Job, stage: Stage, done: Path, inputs: str) -> dict[str, Any]:
    started = time.perf_counter()
    with files.new_folder(done) as folder:
        # Within the folder, which takes any OSError for one of its own.
        with during(f"in the stage {stage.key!r}", _lower(job)):
            record = stage.work(job, folder)
        record |= {"inputs": inputs, "seconds": round(time.perf_counter() - started, 3)}
        files.write_json(folder / RECORD, record)
    return record
