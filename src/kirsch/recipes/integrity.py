"""Check of a run folder: each file is compared with its hash, and files that must agree are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kirsch import files, strict_json
from kirsch.errors import KirschError, LoadError
from kirsch.jobs.job import CHECKPOINTS, EVENTS, RECORD
from kirsch.pruning.step import PRUNED, plan_file
from kirsch.pruning.store import last_plan
from kirsch.recipes import manifest, run_folder
from kirsch.recipes.manifest import ENVIRONMENT, METRICS, PLAN, RECIPE, REPORT, RUN
from kirsch.recipes.metrics import metrics_of_records
from kirsch.recipes.recipe import read_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from kirsch.jobs.step import Step


@dataclass(frozen=True)
class RunIntegrity:
    """Result of the check of a run folder.

    Args:
        finished: whether the run has finished, so that one manifest covers all of its files.
        problems: a sentence for each file that is damaged, missing or foreign.
        steps: steps of the recipe, in order; empty if the run has finished or is damaged.
        done: those of `steps` that are done.
        files: number of files that were compared with a hash.
        folders: number of folders that have their own manifest.
        uncovered: names of files at the top of the folder that no manifest covers yet.
    """

    finished: bool
    problems: list[str]
    steps: list[str]
    done: list[str]
    files: int
    folders: int
    uncovered: list[str]


def check(folder: Path) -> RunIntegrity:
    """Compare a run folder with its manifests.

    The files of a finished run are compared with the manifest of the run. In a run that has not finished, each
    finished step and each checkpoint is compared with its own manifest, and files that must agree are compared with
    each other.

    Raises:
        LoadError: the folder does not hold a run.
    """
    if not manifest.is_run(folder):
        raise run_folder.no_run(folder)
    finished = manifest.is_finished(folder)
    misplaced = manifest.misplaced_entries(folder)
    folders = manifest.folders_with_manifest(folder)
    altered = manifest.altered_files(folder)
    problems, count = list(altered.values()), 0
    if not finished or files.MANIFEST in altered:  # only the inner folders have usable manifests
        flaws = [flaw for inner in folders for flaw in files.flaws(inner).values()]
        problems += flaws + ([] if misplaced else _contradictions(folder))
        count = 0 if flaws else sum(len(files.entries(inner)) for inner in folders)
    else:
        count = len(files.entries(folder))
    plans = [path.name for path in sorted(folder.glob("plan*.json"))]
    known = (RUN, RECIPE, *plans, EVENTS, METRICS, REPORT, ENVIRONMENT)
    uncovered = [] if finished else [name for name in known if (folder / name).exists()]
    problems = list(dict.fromkeys([*misplaced, *problems]))
    steps = [] if finished or problems else list(_steps(folder, manifest.read_run(folder)))
    done = [key for key in steps if (folder / CHECKPOINTS / key / "done").is_dir()]
    return RunIntegrity(finished, problems, steps, done, count, len(folders), uncovered)


def _contradictions(folder: Path) -> list[str]:
    """Return the unreadable files of an unfinished run, and the files that do not agree with each other."""
    problems = [text for name in (METRICS, PLAN, ENVIRONMENT) if (text := _unreadable(folder / name))]
    events = folder / EVENTS
    if events.is_file() and events.read_bytes().count(b"\n") != len(run_folder.events_of(folder)[0]):
        # A killed process can only cut off the last line, which `events_of` and the count of newlines leave out.
        problems.append(f"{events} has lines that are not events")
    run = manifest.read_run(folder)
    if not run:
        problems.append(f"{folder / RUN} is missing or damaged")
    try:
        keys = _steps(folder, run)
    except KirschError as error:
        return [*problems, f"{folder / RECIPE} cannot be used: {error.what}"]
    done = {key: folder / CHECKPOINTS / key / "done" for key in keys}
    last = max((number for number, key in enumerate(keys) if done[key].is_dir()), default=0)
    earlier = list(keys)[:last]
    problems += [f"{done[key]} is missing, and a later step is done" for key in earlier if not done[key].is_dir()]
    stated = run.get("recipe")
    if isinstance(stated, str) and (folder / RECIPE).read_bytes() != stated.encode():
        problems.append(f"{folder / RECIPE} is not the recipe that {RUN} states")
    started = _started_step(folder)  # the run may have been killed while this step wrote its files
    for key in keys:
        stored, shown = last_plan(done[key] / PRUNED), folder / plan_file(key)
        if started != key and stored.is_file() and not _same(stored, shown):
            problems.append(f"{shown} is missing, or is not the plan of the pruned model")
    if _ended(folder) and all(path.is_dir() for path in done.values()):
        problems += _metrics(folder, [path / RECORD for path in done.values()])
    for key, step in keys.items():
        if started != key and done[key].is_dir():
            problems += _outside_files(folder, step, done[key] / RECORD)
    return problems


def _same(first: Path, second: Path) -> bool:
    return second.is_file() and first.read_bytes() == second.read_bytes()


def _started_step(folder: Path) -> str:
    """Return the step that was started and has not ended; empty if there is none."""
    for event in reversed(run_folder.events_of(folder)[0]):
        if event.get("event") in ("step_start", "step_end", "step_kept"):
            return str(event.get("key")) if event["event"] == "step_start" else ""
    return ""


def _ended(folder: Path) -> bool:
    """Return whether the last process wrote metrics.json; otherwise the file may come from an earlier process."""
    names = [event.get("event") for event in run_folder.events_of(folder)[0]]
    return [name for name in names if name in ("start", "end")][-1:] == ["end"]


def _metrics(folder: Path, records: list[Path]) -> list[str]:
    """Return the differences between metrics.json and the records of the steps."""
    path = folder / METRICS
    try:
        found = strict_json.read(path) if path.is_file() else None
        expected = metrics_of_records({record.parts[-3]: strict_json.read(record) for record in records})
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return []  # another check reports these files as damaged
    if not isinstance(found, dict):
        return [f"{path} is missing, or is not a JSON object"]
    return [
        f"the key {name!r} of {path} does not agree with the records of the steps"
        for name, value in expected.items()
        if found.get(name) != value
    ]


def _steps(folder: Path, run: dict[str, Any]) -> dict[str, Step]:
    """Return the steps of a run's recipe by key, in order."""
    if not (folder / RECIPE).is_file():
        raise LoadError("it is missing.")
    recipe = read_recipe(run["recipe"]) if isinstance(run.get("recipe"), str) else read_recipe(folder / RECIPE)
    return recipe.all_steps


def _unreadable(path: Path) -> str:
    try:
        if path.is_file():
            strict_json.read(path)
    except (OSError, ValueError) as error:
        return f"{path} is damaged: {error}"
    return ""


def _outside_files(folder: Path, step: Step, record: Path) -> list[str]:
    """Return the differences between the files of a step outside its folder and the record of the step."""
    try:
        hashes = step.outside_files(strict_json.read(record))
    except (OSError, ValueError, KeyError, TypeError):
        return []  # the manifest of the step reports this record as damaged
    missing = [f"{folder / name} is missing" for name in hashes if not (folder / name).is_file()]
    return missing + [
        f"{folder / name} does not have the sha256 that the record of its step states"
        for name, digest in hashes.items()
        if (folder / name).is_file() and files.sha256(folder / name) != digest
    ]
