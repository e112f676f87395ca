"""Running a recipe: stage after stage, each finished one kept, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch import __version__, files, strict_json
from kirsch.errors import LoadError, OutputError, RecipeError
from kirsch.measurement.machine import environment
from kirsch.recipes.job import RECORD, Job
from kirsch.recipes.metrics import goal_text, metrics_of
from kirsch.recipes.models import build, source_hash
from kirsch.recipes.recipe import Recipe, read_recipe
from kirsch.recipes.stages import Stage, check_objectives, check_threads, plan_for, stages_of
from kirsch.recipes.tasks.data import DataSet, load_data
from kirsch.report import render

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.recipes.job import Listen, Stop

RUN, RECIPE, PLAN, LOCK = "run.json", "recipe.yaml", "plan.json", ".lock"

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
    _refuse_strangers(recipe, folder)
    busy = OutputError(
        f"The run {folder} is in use.", "Another process works on it.", "Wait for it, or choose another folder."
    )
    with files.alone(folder / LOCK, busy):
        _open(recipe, folder, base)
        materials = materials or materials_of(recipe, base)
        job = Job(recipe, folder, materials.data, materials.make_teacher, materials.make_student, listen, stop)
        surroundings = environment()
        files.write_json(folder / "environment.json", surroundings)
        job.tell({"event": "start", "name": recipe.name, "run": str(folder), "goal": goal_text(job)})
        _preflight(job)
        _work(job, materials.origin)
        seconds = sum(record["seconds"] for record in job.records.values())
        metrics = metrics_of(job, surroundings, seconds)
        files.write_json(folder / "metrics.json", metrics)
        files.write_text(folder / "report.html", render(metrics))
        job.tell(
            {
                "event": "end",
                "met": metrics["goal"]["met"],
                "text": " · ".join(item["text"] for item in metrics["goal"]["items"]),
                "doubt": " · ".join(item["doubt"] for item in metrics["goal"]["items"] if item["doubt"]),
                "report": str(folder / "report.html"),
                "seconds": time.monotonic() - started,
            }
        )
    return Outcome(0 if metrics["goal"]["met"] else 3, folder, metrics, job.models["result"])


def resume(folder: Path, *, listen: Listen, stop: Stop = lambda: None) -> Outcome:
    """Go on with a run that was stopped or killed; a finished one only gets its report anew.

    Raises:
        LoadError: the folder holds no run, or one whose models were given as objects.
    """
    try:
        base = folder / strict_json.read(folder / RUN)["base"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"{folder} holds no run.", f"{RUN} is missing or damaged.", "Start it: kirsch compress."
        ) from error
    recipe = read_recipe(folder / RECIPE)
    if recipe.teacher.model == GIVEN:
        raise LoadError(
            f"{folder} is a run of kirsch.compress.",
            "Its models and data were given as objects.",
            "Call kirsch.compress again with them and this folder: it goes on where it was.",
        )
    return run(recipe, folder, base=base, listen=listen, stop=stop)


def _open(recipe: Recipe, folder: Path, base: Path) -> None:
    """A new run folder, or one that holds the same recipe."""
    if not (folder / RUN).is_file():
        files.write_text(folder / RECIPE, recipe.to_yaml())
        created = {"kirsch_run": 1, "base": os.path.relpath(base.resolve(), folder.resolve()), "kirsch": __version__}
        files.write_json(folder / RUN, created)
    elif (stored := read_recipe(folder / RECIPE)) != recipe:
        raise RecipeError(
            f"The folder {folder} holds a run of another recipe.",
            f"They differ in {', '.join(_differences(stored.model_dump(), recipe.model_dump()))}.",
            "Choose another folder, or go on with it: kirsch resume.",
        )
    files.sweep(folder)
    _repair(folder / "events.jsonl")


def _refuse_strangers(recipe: Recipe, folder: Path) -> None:
    """A folder that is not ours is left as it is, even by the sweep."""
    if (folder / RUN).is_file():
        return
    stored = folder / RECIPE
    # What a dry run of the recipe wrote is ours, and what a run that was killed at its very start left.
    started = stored.is_file() and stored.read_bytes() == recipe.to_yaml().encode()
    ours = {LOCK, RECIPE, PLAN} if started else {LOCK}
    for path in sorted(folder.iterdir()):
        if path.name not in ours and not path.name.startswith(files.TEMPORARY):
            raise OutputError(
                f"The folder {folder} holds something else.",
                f"It has {path.name!r}, and is no run folder.",
                "Choose another folder.",
            )


def _differences(first: Any, second: Any, key: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        names = sorted(set(first) | set(second))
        return [d for n in names for d in _differences(first.get(n), second.get(n), f"{key}.{n}".lstrip("."))]
    return [] if first == second else [f"{key} ({first} and {second})"]


def _repair(events: Path) -> None:
    """Drop a last line that a kill has torn."""
    content = events.read_bytes() if events.is_file() else b""
    if content and not content.endswith(b"\n"):
        files.write_bytes(events, content[: content.rfind(b"\n") + 1])


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
            stage.load(job, done, record)
            happened = "stage_kept"
        for old in done.parent.glob("step-*"):  # also those of a run that was killed just before this
            shutil.rmtree(old)
        job.records[stage.key] = record
        shown = {name: record[name] for name in ("did", "cells", "seconds")}
        job.tell({"event": happened, "number": number, "key": stage.key, **shown})


def _finished(job: Job, stage: Stage, done: Path, inputs: str) -> dict[str, Any] | None:
    """The record of a stage that is finished, sound, and had the same inputs."""
    if not done.is_dir():
        return None
    wrong = files.damage(done)
    if wrong:
        job.note(f"The stage {stage.key!r} is done again: {wrong}.")
        return None
    record: dict[str, Any] = strict_json.read(done / RECORD)
    if record["inputs"] != inputs:
        job.note(f"The stage {stage.key!r} is done again: its inputs have changed.")
        return None
    wrong = _artifacts_damage(job, record) if stage.key == "export" else ""
    if wrong:
        job.note(f"The stage 'export' is done again: {wrong}.")
        return None
    return record


def _artifacts_damage(job: Job, record: dict[str, Any]) -> str:
    """What is wrong with what the export left outside its own folder; empty when it is sound."""
    path = job.folder / "artifacts" / record["artifact"]["file"]
    if not path.is_file() or files.sha256(path) != record["artifact"]["sha256"]:
        return f"{path} is missing or damaged"
    return files.damage(path.parent / "model") if "prune" in job.records else ""


def _do(job: Job, stage: Stage, done: Path, inputs: str) -> dict[str, Any]:
    started = time.perf_counter()
    with files.new_folder(done) as folder:
        record = stage.work(job, folder)
        record |= {"inputs": inputs, "seconds": round(time.perf_counter() - started, 3)}
        files.write_json(folder / RECORD, record)
    return record
