"""Run folder on disk: which run it holds, the run's recipe, and repairs before the run continues."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Any

from kirsch import files, strict_json
from kirsch.deploy.steps import EXPORTED
from kirsch.errors import CheckpointError, KirschError, LoadError, OutputError, RecipeError
from kirsch.jobs.job import CHECKPOINTS, EVENTS
from kirsch.pruning.step import plan_file
from kirsch.pruning.store import is_saved
from kirsch.recipes import manifest
from kirsch.recipes.manifest import ENVIRONMENT, LOCK, METRICS, RECIPE, REPORT, RUN
from kirsch.recipes.recipe import Recipe, read_recipe
from kirsch.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

DERIVED = (RUN, METRICS, REPORT, ENVIRONMENT, files.MANIFEST)
"""Files that a continued run writes again from its other files, as it does with the plans and the pruned model."""

WRITTEN = re.compile(
    r"(record|values|manifest|plan(\.\d+)?)\.json|(weights|arrays|model)\.safetensors|logits\.npy|(teacher|student)\.onnx"
)
"""Names of files that steps and checkpoints write."""


def refuse_foreign(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder with files that do not belong to a run, before anything in it is changed or cleaned up.

    Raises:
        OutputError: the folder is not empty, and does not hold a run.
    """
    if os.path.lexists(folder / RUN):
        return
    stored = folder / RECIPE
    # Files of a dry run of the same recipe, or of a run that was killed at its start, may be there.
    started = stored.is_file() and stored.read_bytes() == recipe.to_yaml().encode()
    if started and (folder / CHECKPOINTS).is_dir():
        return
    allowed = {LOCK, RECIPE, *_plan_files(recipe.all_steps)} if started else {LOCK}
    for path in sorted(folder.iterdir()):
        if path.name not in allowed and not path.name.startswith(files.TEMPORARY):
            raise OutputError(
                f"The folder {folder} is not empty.",
                f"It contains {path.name!r} and is not a run folder.",
                "Choose another folder.",
            )


def require(folder: Path) -> None:
    """Check that a folder holds a run, in whatever state.

    Raises:
        LoadError: the folder does not hold a run.
    """
    if not manifest.is_run(folder):
        raise no_run(folder)


def no_run(folder: Path) -> LoadError:
    """Return the error for a folder that does not hold a run."""
    if is_saved(folder):
        return LoadError(
            f"{folder} is not a run folder: it is a folder written by kirsch prune.",
            "",
            f"Give it to other commands as --pruned {folder}, or load it with kirsch.load, which checks its files.",
        )
    why = f"{RUN} is missing or damaged." if folder.is_dir() else "There is no such folder."
    return LoadError(f"{folder} is not a run folder.", why, "Start a run: kirsch compress.")


def how_to_continue(folder: Path) -> str:
    """Return the command or the call that continues a run; a run of `kirsch.compress` needs its models and data."""
    try:
        recipe, _ = stored_recipe(folder)
    except KirschError:  # another error reports the damage
        return f"kirsch resume {folder}"
    again = f"kirsch.compress with the same arguments and folder={str(folder)!r}"
    return again if recipe.teacher.model is None else f"kirsch resume {folder}"


def refuse_misplaced(folder: Path) -> None:
    """Refuse links, pipes and foreign files that would make a run fail, or that a run would remove.

    Raises:
        CheckpointError: there are such files; the message lists all of them.
    """
    problems = manifest.misplaced_entries(folder)
    for inner in manifest.folders_with_manifest(folder):
        foreign = (name for name in files.unlisted(inner) if not WRITTEN.fullmatch(name.rpartition("/")[2]))
        problems += [f"{inner / name} is not in its manifest" for name in foreign]
    if problems:
        raise CheckpointError(
            f"The run {folder} cannot continue:\n" + "\n".join(problems),
            "",
            "Delete or move these files, or make them readable. When the run is continued, it restores missing files.",
        )


def stored_recipe(folder: Path) -> tuple[Recipe, Path]:
    """Return the recipe of a run, and the folder that its references are relative to.

    Raises:
        LoadError: the folder does not hold a run, or files that the run cannot continue without are lost.
        RecipeError: recipe.yaml is damaged.
    """
    run = manifest.trusted_run(folder)
    base = run.get("base") or _base_of_events(folder)
    if base is None and not (folder / CHECKPOINTS).is_dir():
        raise no_run(folder)
    recipe = _recipe(folder, run)
    if base is None or recipe is None:
        raise LoadError(
            f"{folder} cannot be resumed.",
            f"{RECIPE if recipe is None else RUN} is missing or damaged, and no other file has its content.",
            f"Give the recipe again: kirsch compress RECIPE --run {folder} keeps the undamaged steps.",
        )
    return recipe, folder / base


def _recipe(folder: Path, run: dict[str, Any]) -> Recipe | None:
    """Return the recipe from recipe.yaml, otherwise from the copy in run.json; None if both are missing."""
    copy = run.get("recipe")
    if not (folder / RECIPE).is_file():
        return read_recipe(copy) if isinstance(copy, str) else None
    try:
        return read_recipe(folder / RECIPE)
    except RecipeError as error:
        if not isinstance(copy, str):
            raise
        fix = f"Correct it, or delete it: kirsch resume {folder} writes the recipe that the run started with."
        raise RecipeError(error.what, error.why, fix) from error


def _base_of_events(folder: Path) -> str | None:
    """Return the folder that the recipe's references are relative to, from the last start event."""
    for event in reversed(events_of(folder)[0]):
        if event.get("event") == "start" and isinstance(event.get("base"), str):
            return str(event["base"])
    return None


def events_of(folder: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Return the events of a run, and their lines; lines that are not events are left out."""
    events, lines = [], []
    content = (folder / EVENTS).read_bytes() if (folder / EVENTS).is_file() else b""
    for line in content.splitlines(keepends=True):
        try:
            event = (
                strict_json.parse(line) if line.endswith(b"\n") else None
            )  # a killed process may have cut off the last line
        except ValueError:
            event = None
        if isinstance(event, dict):
            events.append(event)
            lines.append(line)
    return events, lines


def relative(base: Path, folder: Path) -> str:
    """Return the folder that a recipe's references are relative to, as a path relative to the run folder."""
    return os.path.relpath(base.resolve(), folder.resolve())


def open_folder(recipe: Recipe, folder: Path, base: Path) -> dict[str, str]:
    """Open a new run folder, or the folder of a run of the same recipe.

    Returns:
        Files that are missing or differ from the manifest: name → description of the difference.

    Raises:
        RecipeError: the folder holds a run of another recipe.
    """
    run = manifest.read_run(folder)
    known = _recipe(folder, run)
    if known is not None and known != recipe:
        raise RecipeError(
            f"The folder {folder} holds a run with other steps or options.",
            f"In the run and now: {'; '.join(_differences(known, recipe))}.",
            f"Choose another folder. To continue the run: {how_to_continue(folder)}.",
        )
    altered = manifest.altered_files(folder)
    if not os.path.lexists(folder / RUN) and not (folder / CHECKPOINTS).is_dir():
        files.write_text(folder / RECIPE, recipe.to_yaml())
        files.write_json(folder / RUN, _content(recipe, folder, base))
    elif not run:
        altered.setdefault(RUN, f"{folder / RUN} is missing or damaged")
    if not (folder / RECIPE).is_file():
        altered.setdefault(RECIPE, f"{folder / RECIPE} is missing")
    elif run.get("recipe") not in (None, (folder / RECIPE).read_bytes().decode()):
        altered.setdefault(RECIPE, f"{folder / RECIPE} is not the recipe that {RUN} states")
    files.remove_temporary(folder)
    return altered


def missing_paths(folder: Path) -> list[Path]:
    """Return the paths that the start of a run in this folder would create: its first files, the folder and parents."""
    paths = (*(folder / name for name in (LOCK, RECIPE, RUN)), folder, *folder.parents)
    return [path for path in paths if not os.path.lexists(path)]


def discard(paths: Iterable[Path]) -> None:
    """Remove files and empty folders that a run has created before an error."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)


def reopen(recipe: Recipe, folder: Path, base: Path) -> None:
    """Prepare a run folder for writing: remove the manifest, and repair events.jsonl, run.json and recipe.yaml."""
    manifest.remove(folder)
    if not (folder / RECIPE).is_file():
        files.write_text(folder / RECIPE, recipe.to_yaml())
    content = _content(recipe, folder, base)
    if manifest.read_run(folder) != content:
        files.write_json(folder / RUN, content)
    kept, events = b"".join(events_of(folder)[1]), folder / EVENTS
    if events.is_file() and events.read_bytes() != kept:
        files.write_bytes(events, kept)


def _content(recipe: Recipe, folder: Path, base: Path) -> dict[str, Any]:
    return {"kirsch_run": 1, "base": relative(base, folder), "kirsch": __version__, "recipe": recipe.to_yaml()}


def _plan_files(steps: Iterable[str]) -> set[str]:
    """Return the names of the plans of the steps with these keys."""
    return {plan_file(key) for key in steps if key.startswith("prune")}


def notes(altered: dict[str, str], steps: Sequence[str]) -> Iterator[str]:
    """Yield a note for each altered file; differences in the folders of steps are reported by the steps."""
    reported = tuple(f"{CHECKPOINTS}/{key}/done/" for key in steps)
    reported += (EXPORTED,) if "export" in steps else ()
    plans = _plan_files(steps)
    for name, sentence in altered.items():
        derived = name in DERIVED or name in plans or (plans and name.startswith(f"{manifest.PRUNED}/"))
        if derived or (name == RECIPE and sentence.endswith("is missing")):
            yield f"{sentence}. It is written again."
        elif name == RECIPE:
            yield f"{sentence}. The steps that depend on the change are run again."
        elif name == EVENTS:
            yield f"{sentence}. It cannot be restored; the readable lines are kept."
        elif not name.startswith(reported):
            yield f"{sentence}. It is left as it is, and the new manifest lists it."


def _differences(first: Recipe, second: Recipe) -> list[str]:
    """Return a text for each difference of two recipes, with the keys that `--set` takes."""
    before, after = (
        recipe.model_dump(exclude={"steps"}) | {key: step.model_dump() for key, step in recipe.all_steps.items()}
        for recipe in (first, second)
    )
    order = [f"the order of the steps is {', '.join(first.all_steps)} and {', '.join(second.all_steps)}"]
    return list(_changed_values(before, after)) or order


def _changed_values(first: Any, second: Any, key: str = "") -> Iterator[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        for name in sorted(set(first) | set(second)):
            yield from _changed_values(first.get(name), second.get(name), f"{key}.{name}".lstrip("."))
    elif first != second:
        whole = isinstance(first, dict) or isinstance(second, dict)
        yield f"{key} only {'now' if first is None else 'in the run'}" if whole else f"{key} {first} and {second}"
