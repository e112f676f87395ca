"""Manifest of a run folder: written when the run has finished, removed before any file changes."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from kirsch import files, strict_json
from kirsch.deploy.steps import EXPORTED
from kirsch.jobs.job import ARTIFACTS, CHECKPOINTS, EVENTS

if TYPE_CHECKING:
    from pathlib import Path

RUN, RECIPE, PLAN, LOCK = "run.json", "recipe.yaml", "plan.json", ".lock"
METRICS, REPORT, ENVIRONMENT, TRACEBACK = "metrics.json", "report.html", "environment.json", "error.txt"
PRUNED = f"{ARTIFACTS}/model"

NOT_COVERED = (LOCK, TRACEBACK)
"""Files that are not results of a run; the manifest does not list them."""

MANIFEST_KEY = "manifest_sha256"
"""Key that run.json has while the manifest is valid. It shows whether a missing manifest was deleted (run.json has the
key) or has not been written yet (run.json lacks the key)."""


def read_run(folder: Path) -> dict[str, Any]:
    """Return the content of run.json; empty if the file is missing or does not describe a run."""
    path = folder / RUN
    try:
        content = strict_json.read(path) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    known = isinstance(content, dict) and content.get("kirsch_run") == 1 and isinstance(content.get("base"), str)
    return content if known else {}


def trusted_run(folder: Path) -> dict[str, Any]:
    """Return the content of run.json; empty if the file is missing, or differs from its entry in the manifest."""
    run = read_run(folder)
    try:
        matches = _run_matches_manifest(folder, run)
    except (OSError, ValueError):
        matches = True  # without a readable manifest there is nothing to compare with
    return run if matches else {}


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run, or the remains of a run."""
    if os.path.lexists(folder / RUN):
        return True
    started = (folder / EVENTS).is_file() and (folder / CHECKPOINTS).is_dir()
    return started or any(path != folder / PRUNED for path in folders_with_manifest(folder))


def write(folder: Path) -> None:
    """Write the manifest of a finished run, and its sha256 to run.json.

    If the process is killed between these two writes, the manifest is valid and nothing is lost.
    """
    files.write_manifest(folder, NOT_COVERED)
    files.write_json(folder / RUN, read_run(folder) | {MANIFEST_KEY: files.sha256(folder / files.MANIFEST)})


def remove(folder: Path) -> None:
    """Remove the manifest before the files of a run change.

    The key in run.json is removed first, so that a kill in between does not leave a key without a manifest.
    """
    content = read_run(folder)
    if MANIFEST_KEY in content:
        files.write_json(folder / RUN, {key: value for key, value in content.items() if key != MANIFEST_KEY})
    (folder / files.MANIFEST).unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Return whether a run has finished and was not reopened since; its files may be damaged."""
    return MANIFEST_KEY in read_run(folder) or (folder / files.MANIFEST).is_file()


def altered_files(folder: Path) -> dict[str, str]:
    """Return the files of a finished run that differ from its manifest: name → description of the difference.

    Empty for a run that has not finished, since it has no manifest yet.
    """
    if not is_finished(folder):
        return {}
    found, run, manifest = files.flaws(folder, NOT_COVERED), read_run(folder), folder / files.MANIFEST
    if files.MANIFEST in found:
        return found
    if RUN in found and _run_matches_manifest(folder, run):
        del found[RUN]
    if MANIFEST_KEY in run and run[MANIFEST_KEY] != files.sha256(manifest):
        found[files.MANIFEST] = f"{manifest} does not have the sha256 that {RUN} states"
    return found


def _run_matches_manifest(folder: Path, run: dict[str, Any]) -> bool:
    """Return whether run.json without its manifest key is the file that the manifest lists."""
    before = files.json_text({key: value for key, value in run.items() if key != MANIFEST_KEY}).encode()
    entry = files.entries(folder).get(RUN)
    same = entry == (len(before), hashlib.sha256(before).hexdigest())
    return same and (folder / RUN).read_bytes() == files.json_text(run).encode()


def update_file(folder: Path, name: str, text: str) -> None:
    """Write one file of a run, and its entry in the manifest; all other entries stay."""
    path, content = folder / name, text.encode()
    if path.is_file() and path.read_bytes() == content:
        return
    run = read_run(folder)
    entries = files.entries(folder) if is_finished(folder) else {}
    if entries.get(name, (0, "")) == (len(content), hashlib.sha256(content).hexdigest()) or not entries:
        files.write_text(path, text)
        return
    remove(folder)
    files.write_text(path, text)
    files.write_entries(folder, entries | {name: (len(content), hashlib.sha256(content).hexdigest())})
    if MANIFEST_KEY in run:
        files.write_json(folder / RUN, run | {MANIFEST_KEY: files.sha256(folder / files.MANIFEST)})


def folders_with_manifest(folder: Path) -> list[Path]:
    """Return the folders of a run that have their own manifest: finished steps, checkpoints, the exported model."""
    parts = [path for step in _children(folder / CHECKPOINTS) for path in _children(step)]
    complete = [path for path in parts if path.name == "done" or path.name.startswith("step-")]
    return [path for path in [folder / PRUNED, *complete] if path.is_dir() and not path.is_symlink()]


def _children(folder: Path) -> list[Path]:
    """Return the entries of a folder, sorted; empty if the path is not a folder, is a link, or cannot be read."""
    readable = folder.is_dir() and not folder.is_symlink() and os.access(folder, os.R_OK | os.X_OK)
    return sorted(folder.iterdir()) if readable else []


def misplaced_entries(folder: Path) -> list[str]:
    """Return a description of each entry of a run folder that has the wrong kind or cannot be read."""
    steps = _children(folder / CHECKPOINTS)
    parts = [path for step in steps for path in _children(step)]
    plans = [path.name for path in _children(folder) if path.match("plan*.json")]
    plain = (RUN, RECIPE, *plans, LOCK, EVENTS, METRICS, REPORT, ENVIRONMENT, TRACEBACK, files.MANIFEST)
    plain += tuple(str(path.relative_to(folder)) for path in folder.glob(f"{EXPORTED}*"))
    folders = (folder / CHECKPOINTS, folder / ARTIFACTS, folder / PRUNED, *steps, *parts)
    found = list(files.irregular_entries(folder).values())
    found += [f"{folder / name} is a folder" for name in plain if (folder / name).is_dir()]
    unreadable = (path for path in map(folder.joinpath, plain) if path.is_file() and not os.access(path, os.R_OK))
    found += [f"{path} cannot be read: you lack the permission" for path in unreadable]
    found += [
        f"{path} is a file, where a folder belongs" for path in folders if path.is_file() and not path.is_symlink()
    ]
    return list(dict.fromkeys(found))
