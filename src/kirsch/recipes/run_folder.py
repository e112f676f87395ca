"""A run folder on disk: whose it is, what it says of its run, and what is repaired before work goes on."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from kirsch import files, strict_json
from kirsch.errors import CheckpointError, LoadError, OutputError, RecipeError
from kirsch.recipes import seal
from kirsch.recipes.recipe import Recipe, read_recipe
from kirsch.recipes.seal import CHECKPOINTS, ENVIRONMENT, EVENTS, LOCK, METRICS, PLAN, RECIPE, REPORT, RUN
from kirsch.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

DERIVED = (RUN, PLAN, METRICS, REPORT, ENVIRONMENT, files.MANIFEST)
"""Files that every run writes again from what else it has."""

WRITTEN = re.compile(
    r"(record|values|manifest|plan(\.\d+)?)\.json|(weights|arrays|model)\.safetensors|logits\.npy|(teacher|student)\.onnx"
)
"""Names of files that stages and checkpoints write."""


def refuse_strangers(recipe: Recipe, folder: Path) -> None:
    """Leave a folder that is not ours as it is, even by the sweep.

    Raises:
        OutputError: there is something in the folder, and it holds no run of this recipe.
    """
    if os.path.lexists(folder / RUN):
        return
    stored = folder / RECIPE
    # What a dry run of the recipe wrote is ours, and what a run that was killed at its very start left.
    started = stored.is_file() and stored.read_bytes() == recipe.to_yaml().encode()
    if started and (folder / CHECKPOINTS).is_dir():
        return
    ours = {LOCK, RECIPE, PLAN} if started else {LOCK}
    for path in sorted(folder.iterdir()):
        if path.name not in ours and not path.name.startswith(files.TEMPORARY):
            raise OutputError(
                f"The folder {folder} holds something else.",
                f"It has {path.name!r}, and is no run folder.",
                "Choose another folder.",
            )


def require(folder: Path) -> None:
    """Make sure that a folder holds a run, whatever state that is in.

    Raises:
        LoadError: it does not.
    """
    if not seal.is_run(folder):
        raise _no_run(folder)


def _no_run(folder: Path) -> LoadError:
    return LoadError(f"{folder} holds no run.", f"{RUN} is missing or damaged.", "Start it: kirsch compress.")


def refuse_misplaced(folder: Path) -> None:
    """Stop before links, pipes and foreign files that a run would trip over or remove.

    Raises:
        CheckpointError: names all of them.
    """
    found = seal.misplaced(folder)
    for place in seal.stage_folders(folder):
        foreign = (name for name in files.unlisted(place) if not WRITTEN.fullmatch(name.rpartition("/")[2]))
        found += [f"{place / name} is not in its manifest" for name in foreign]
    if found:
        raise CheckpointError(
            f"The run {folder} cannot go on as it is:\n" + "\n".join(found),
            "",
            f"Delete or move these, or make them readable; then kirsch resume {folder} makes again what is missing.",
        )


def stored(folder: Path) -> tuple[Recipe, Path]:
    """The recipe of a run, and the folder that its files are relative to.

    Raises:
        LoadError: the folder holds no run, or too little of one.
        RecipeError: recipe.yaml is damaged.
    """
    run = seal.trusted_run(folder)
    base = run.get("base") or _base_of_events(folder)
    if base is None and not (folder / CHECKPOINTS).is_dir():
        raise _no_run(folder)
    recipe = _recipe(folder, run)
    if base is None or recipe is None:
        raise LoadError(
            f"{folder} cannot be resumed.",
            f"{RECIPE if recipe is None else RUN} is missing or damaged, and no other file there says what it said.",
            f"Give its recipe again: kirsch compress RECIPE --run {folder} keeps the stages that are sound.",
        )
    return recipe, folder / base


def _recipe(folder: Path, run: dict[str, Any]) -> Recipe | None:
    """The recipe of a run: recipe.yaml, else the copy in run.json; None where both are missing."""
    copy = run.get("recipe")
    if not (folder / RECIPE).is_file():
        return read_recipe(copy) if isinstance(copy, str) else None
    try:
        return read_recipe(folder / RECIPE)
    except RecipeError as error:
        if not isinstance(copy, str):
            raise
        again = f"Correct it, or delete it: kirsch resume {folder} writes the recipe that the run began with."
        raise RecipeError(error.what, error.why, again) from error


def _base_of_events(folder: Path) -> str | None:
    """The folder that a recipe's files are relative to, as the last start in events.jsonl states it."""
    for event in reversed(events_of(folder)[0]):
        if event.get("event") == "start" and isinstance(event.get("base"), str):
            return str(event["base"])
    return None


def events_of(folder: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The events of a run, and their lines; lines that are no events are left out."""
    found, kept = [], []
    content = (folder / EVENTS).read_bytes() if (folder / EVENTS).is_file() else b""
    for line in content.splitlines(keepends=True):
        try:
            event = strict_json.parse(line) if line.endswith(b"\n") else None  # a kill has torn the last one
        except ValueError:
            event = None
        if isinstance(event, dict):
            found.append(event)
            kept.append(line)
    return found, kept


def relative(base: Path, folder: Path) -> str:
    """The folder that a recipe's files are relative to, as seen from the run folder."""
    return os.path.relpath(base.resolve(), folder.resolve())


def begin(recipe: Recipe, folder: Path, base: Path) -> dict[str, str]:
    """Open a new run folder, or one that holds the same recipe.

    Returns:
        Files that differ from the manifest of the run or are missing, by name, with a sentence each.

    Raises:
        RecipeError: the folder holds the run of another recipe.
    """
    run = seal.read_run(folder)
    known = _recipe(folder, run)
    if known is not None and known != recipe:
        raise RecipeError(
            f"The folder {folder} holds a run of another recipe.",
            f"They differ in {', '.join(_differences(known.model_dump(), recipe.model_dump()))}.",
            "Choose another folder, or go on with it: kirsch resume.",
        )
    altered = seal.altered(folder)
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


def reopen(recipe: Recipe, folder: Path, base: Path) -> None:
    """Make ready for writing: without the manifest, with sound events, run.json and recipe.yaml."""
    seal.lift(folder)
    if not (folder / RECIPE).is_file():
        files.write_text(folder / RECIPE, recipe.to_yaml())
    content = _content(recipe, folder, base)
    if seal.read_run(folder) != content:
        files.write_json(folder / RUN, content)
    kept, events = b"".join(events_of(folder)[1]), folder / EVENTS
    if events.is_file() and events.read_bytes() != kept:
        files.write_bytes(events, kept)


def _content(recipe: Recipe, folder: Path, base: Path) -> dict[str, Any]:
    return {"kirsch_run": 1, "base": relative(base, folder), "kirsch": __version__, "recipe": recipe.to_yaml()}


def notes(altered: dict[str, str], stages: Sequence[str]) -> Iterator[str]:
    """Say what is done about files that differ from the manifest; what stages find in their own folders, they say."""
    own = tuple(f"{CHECKPOINTS}/{key}/done/" for key in stages)
    own += (seal.MODEL, f"{seal.PRUNED}/") if "export" in stages else ()
    for name, sentence in altered.items():
        if name in DERIVED or (name == RECIPE and sentence.endswith("is missing")):
            yield f"{sentence}. It is written again."
        elif name == RECIPE:
            yield f"{sentence}. The stages that this changes are done again."
        elif name == EVENTS:
            yield f"{sentence}. It cannot be made again; the lines that can be read are kept."
        elif not name.startswith(own):
            yield f"{sentence}. It is left as it is, and the new manifest covers what is there."


def _differences(first: Any, second: Any, key: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        names = sorted(set(first) | set(second))
        return [d for n in names for d in _differences(first.get(n), second.get(n), f"{key}.{n}".lstrip("."))]
    return [] if first == second else [f"{key} ({first} and {second})"]
