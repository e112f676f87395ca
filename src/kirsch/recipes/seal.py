"""The manifest of a whole run: written last, removed before anything changes, compared with what is there."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from kirsch import files, strict_json

if TYPE_CHECKING:
    from pathlib import Path

RUN, RECIPE, PLAN, LOCK, EVENTS = "run.json", "recipe.yaml", "plan.json", ".lock", "events.jsonl"
METRICS, REPORT, ENVIRONMENT, TRACEBACK = "metrics.json", "report.html", "environment.json", "error.txt"
CHECKPOINTS, ARTIFACTS, MODEL, PRUNED = "checkpoints", "artifacts", "artifacts/model.onnx", "artifacts/model"

BESIDE = (LOCK, TRACEBACK)
"""Files that are no part of a run's results; no manifest covers them."""

SEAL = "manifest_sha256"
"""Key of run.json while the manifest is valid. So a manifest that is gone is told from one that is not yet written."""


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json; empty where it is missing or is not that of a run."""
    path = folder / RUN
    try:
        content = strict_json.read(path) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    known = isinstance(content, dict) and content.get("kirsch_run") == 1 and isinstance(content.get("base"), str)
    return content if known else {}


def trusted_run(folder: Path) -> dict[str, Any]:
    """The content of run.json; empty, too, where it is not what the manifest of the run covers."""
    run = read_run(folder)
    try:
        fits = _sealed_form(folder, run)
    except (OSError, ValueError):
        fits = True  # no manifest, or a damaged one, to compare it with
    return run if fits else {}


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    if os.path.lexists(folder / RUN):
        return True
    begun = (folder / EVENTS).is_file() and (folder / CHECKPOINTS).is_dir()
    return begun or any(path != folder / PRUNED for path in stage_folders(folder))


def seal(folder: Path) -> None:
    """Record every file of a finished run in its manifest, and the manifest in run.json.

    A kill between the two leaves a manifest that holds; nothing is lost.
    """
    files.write_manifest(folder, BESIDE)
    files.write_json(folder / RUN, read_run(folder) | {SEAL: files.sha256(folder / files.MANIFEST)})


def lift(folder: Path) -> None:
    """Remove the manifest of a run that is about to change; run.json first, so that a kill leaves no contradiction."""
    content = read_run(folder)
    if SEAL in content:
        files.write_json(folder / RUN, {key: value for key, value in content.items() if key != SEAL})
    (folder / files.MANIFEST).unlink(missing_ok=True)


def is_sealed(folder: Path) -> bool:
    """Whether a run has ended and nothing has been done to it since, whatever its files look like now."""
    return SEAL in read_run(folder) or (folder / files.MANIFEST).is_file()


def altered(folder: Path) -> dict[str, str]:
    """What differs from the manifest of a finished run: a sentence for each file, by name.

    Empty for a run that has not ended: it has no manifest yet.
    """
    if not is_sealed(folder):
        return {}
    found, run, manifest = files.flaws(folder, BESIDE), read_run(folder), folder / files.MANIFEST
    if files.MANIFEST in found:
        return found
    if RUN in found and _sealed_form(folder, run):
        del found[RUN]
    if SEAL in run and run[SEAL] != files.sha256(manifest):
        found[files.MANIFEST] = f"{manifest} does not have the sha256 that {RUN} states"
    return found


def _sealed_form(folder: Path, run: dict[str, Any]) -> bool:
    """Whether run.json is, but for the seal, the file that the manifest covers."""
    before = files.json_text({key: value for key, value in run.items() if key != SEAL}).encode()
    entry = files.entries(folder).get(RUN)
    same = entry == (len(before), hashlib.sha256(before).hexdigest())
    return same and (folder / RUN).read_bytes() == files.json_text(run).encode()


def rewrite(folder: Path, name: str, text: str) -> None:
    """Write one file of a run; the entries of all other files in the manifest stay as they are."""
    path, content = folder / name, text.encode()
    if path.is_file() and path.read_bytes() == content:
        return
    run = read_run(folder)
    entries = files.entries(folder) if is_sealed(folder) else {}
    if entries.get(name, (0, "")) == (len(content), hashlib.sha256(content).hexdigest()) or not entries:
        files.write_text(path, text)
        return
    lift(folder)
    files.write_text(path, text)
    files.write_entries(folder, entries | {name: (len(content), hashlib.sha256(content).hexdigest())})
    if SEAL in run:
        files.write_json(folder / RUN, run | {SEAL: files.sha256(folder / files.MANIFEST)})


def stage_folders(folder: Path) -> list[Path]:
    """The folders of a run that have a manifest of their own: finished stages, checkpoints, the exported model."""
    parts = [path for stage in _children(folder / CHECKPOINTS) for path in _children(stage)]
    sealed = [path for path in parts if path.name == "done" or path.name.startswith("step-")]
    return [path for path in [folder / PRUNED, *sealed] if path.is_dir() and not path.is_symlink()]


def _children(folder: Path) -> list[Path]:
    """What lies in a folder, by name; nothing where it is none, a link, or unreadable."""
    readable = folder.is_dir() and not folder.is_symlink() and os.access(folder, os.R_OK | os.X_OK)
    return sorted(folder.iterdir()) if readable else []


def misplaced(folder: Path) -> list[str]:
    """A sentence for every entry of a run folder that is of another kind than Kirsch puts there, or unreadable."""
    stages = _children(folder / CHECKPOINTS)
    parts = [path for stage in stages for path in _children(stage)]
    plain = (RUN, RECIPE, PLAN, LOCK, EVENTS, METRICS, REPORT, ENVIRONMENT, TRACEBACK, files.MANIFEST, MODEL)
    folders = (folder / CHECKPOINTS, folder / ARTIFACTS, folder / PRUNED, *stages, *parts)
    found = list(files.irregular_entries(folder).values())
    found += [f"{folder / name} is a folder" for name in plain if (folder / name).is_dir()]
    unreadable = (path for path in map(folder.joinpath, plain) if path.is_file() and not os.access(path, os.R_OK))
    found += [f"{path} cannot be read: you lack the permission" for path in unreadable]
    found += [
        f"{path} is a file, where a folder belongs" for path in folders if path.is_file() and not path.is_symlink()
    ]
    return list(dict.fromkeys(found))
