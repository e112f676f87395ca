"""Whether a run folder is as its run left it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kirsch import files, strict_json
from kirsch.errors import KirschError, LoadError
from kirsch.recipes import run_folder, seal
from kirsch.recipes.job import RECORD
from kirsch.recipes.metrics import of_records
from kirsch.recipes.recipe import read_recipe
from kirsch.recipes.seal import CHECKPOINTS, ENVIRONMENT, EVENTS, METRICS, MODEL, PLAN, RECIPE, REPORT, RUN
from kirsch.recipes.stages import stages_of

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Soundness:
    """What was found in a run folder.

    Args:
        finished: the run has ended, and one manifest covers all of it.
        wrong: a sentence for everything that is damaged, missing or not of the run.
        stages: the stages of the recipe, in order, of a run without damage that has not ended; else empty.
        done: those of them that are done.
        files: how many files were compared with a hash.
        folders: how many folders have a manifest of their own.
        uncovered: names at the top of the folder that no hash covers yet.
    """

    finished: bool
    wrong: list[str]
    stages: list[str]
    done: list[str]
    files: int
    folders: int
    uncovered: list[str]


def check(folder: Path) -> Soundness:
    """Compare a run folder with the hashes that were written with it.

    A finished run is compared with its manifest, file by file. Before that, each finished stage and each checkpoint is
    compared with its own, and what can be read from several files must agree.

    Raises:
        LoadError: the folder holds no run.
    """
    if not seal.is_run(folder):
        raise LoadError(f"{folder} holds no run.", f"{RUN} is missing.", "Give the folder of a run.")
    finished = seal.is_sealed(folder)
    misplaced = seal.misplaced(folder)
    sealed = seal.stage_folders(folder)
    altered = seal.altered(folder)
    wrong, count = list(altered.values()), 0
    if not finished or files.MANIFEST in altered:  # the folders inside still have manifests of their own
        flaws = [flaw for place in sealed for flaw in files.flaws(place).values()]
        wrong += flaws + ([] if misplaced else _contradictions(folder))
        count = 0 if flaws else sum(len(files.entries(place)) for place in sealed)
    else:
        count = len(files.entries(folder))
    known = (RUN, RECIPE, PLAN, EVENTS, METRICS, REPORT, ENVIRONMENT)
    uncovered = [] if finished else [name for name in known if (folder / name).exists()]
    wrong = list(dict.fromkeys([*misplaced, *wrong]))
    stages = [] if finished or wrong else _stages(folder, seal.read_run(folder))
    done = [key for key in stages if (folder / CHECKPOINTS / key / "done").is_dir()]
    return Soundness(finished, wrong, stages, done, count, len(sealed), uncovered)


def _contradictions(folder: Path) -> list[str]:
    """What cannot be right in a run that has not ended: unreadable files, and files that do not agree."""
    wrong = [text for name in (METRICS, PLAN, ENVIRONMENT) if (text := _unreadable(folder / name))]
    events = folder / EVENTS
    if events.is_file() and events.read_bytes().count(b"\n") != len(run_folder.events_of(folder)[0]):
        wrong.append(f"{events} has lines that are no events")  # a kill tears the last one alone, before its end
    run = seal.read_run(folder)
    if not run:
        wrong.append(f"{folder / RUN} is missing or damaged")
    try:
        keys = _stages(folder, run)
    except KirschError as error:
        return [*wrong, f"{folder / RECIPE} cannot be used: {error.what}"]
    done = {key: folder / CHECKPOINTS / key / "done" for key in keys}
    last = max((number for number, key in enumerate(keys) if done[key].is_dir()), default=0)
    wrong += [f"{done[key]} is missing, and a later stage is done" for key in keys[:last] if not done[key].is_dir()]
    stated = run.get("recipe")
    if isinstance(stated, str) and (folder / RECIPE).read_bytes() != stated.encode():
        wrong.append(f"{folder / RECIPE} is not the recipe that {RUN} states")
    under_way = _under_way(folder)  # it may have been killed between its files
    sealed, shown = done.get("prune", folder) / "model" / PLAN, folder / PLAN
    if under_way != "prune" and sealed.is_file() and not _same(sealed, shown):
        wrong.append(f"{shown} is missing, or is not the plan of the pruned model")
    if _ended(folder) and all(path.is_dir() for path in done.values()):
        wrong += _metrics(folder, [path / RECORD for path in done.values()])
    if under_way != "export" and "export" in keys and done["export"].is_dir():
        wrong += _artifact(folder, done["export"] / RECORD)
    return wrong


def _same(first: Path, second: Path) -> bool:
    return second.is_file() and first.read_bytes() == second.read_bytes()


def _under_way(folder: Path) -> str:
    """The stage that was started last and has not ended; empty if there is none."""
    for event in reversed(run_folder.events_of(folder)[0]):
        if event.get("event") in ("stage_start", "stage_end", "stage_kept"):
            return str(event.get("key")) if event["event"] == "stage_start" else ""
    return ""


def _ended(folder: Path) -> bool:
    """Whether the process that worked last has written metrics.json; if not, that may be of an earlier one."""
    said = [event.get("event") for event in run_folder.events_of(folder)[0]]
    return [event for event in said if event in ("start", "end")][-1:] == ["end"]


def _metrics(folder: Path, records: list[Path]) -> list[str]:
    """The parts of metrics.json that contradict the records of the stages."""
    path = folder / METRICS
    try:
        found = strict_json.read(path) if path.is_file() else None
        expected = of_records({record.parts[-3]: strict_json.read(record) for record in records})
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return []  # the file itself is named as damaged, or the manifest of the stage does not fit such a record
    if not isinstance(found, dict):
        return [f"{path} is missing, or holds no JSON object"]
    return [
        f"{path} does not have the {name} that the records of the stages give"
        for name, value in expected.items()
        if found.get(name) != value
    ]


def _stages(folder: Path, run: dict[str, Any]) -> list[str]:
    """The stages of a run's recipe, in order."""
    if not (folder / RECIPE).is_file():
        raise LoadError("it is missing.")
    recipe = read_recipe(run["recipe"]) if isinstance(run.get("recipe"), str) else read_recipe(folder / RECIPE)
    return [stage.key for stage in stages_of(recipe)]


def _unreadable(path: Path) -> str:
    try:
        if path.is_file():
            strict_json.read(path)
    except (OSError, ValueError) as error:
        return f"{path} is damaged: {error}"
    return ""


def _artifact(folder: Path, record: Path) -> list[str]:
    """What is wrong with the exported file, by the record of its stage."""
    try:
        digest = strict_json.read(record)["artifact"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # the manifest of the stage does not fit such a record
    path = folder / MODEL
    if not path.is_file():
        return [f"{path} is missing"]
    return [] if files.sha256(path) == digest else [f"{path} does not have the sha256 of its stage"]
