"""The verbs on a whole job: compress, resume, init, report, verify."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch import files
from kirsch.cli.progress import Progress, verdict
from kirsch.cli.signals import watched
from kirsch.cli.terminal import Line, Piece
from kirsch.errors import CheckpointError, LoadError, OutputError
from kirsch.recipes.recipe import BUILTIN, Recipe, commented, read_recipe
from kirsch.report import figures

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.cli.terminal import Terminal
    from kirsch.recipes.runner import Outcome

RUNS, METRICS, REPORT = Path("runs"), "metrics.json", "report.html"
DEFAULT = BUILTIN / "digits.yaml"

NOT_FINISHED = 3
"""Exit code of `verify` for a run without damage that has not ended, so that no hash covers all of it."""


def read(path: str, changes: Sequence[str]) -> tuple[Recipe, Path]:
    """A recipe, with the changes of the environment and the command line, and the folder that it is relative to."""
    if not path:
        return read_recipe(DEFAULT, changes, os.environ), Path()
    return read_recipe(Path(path), changes, os.environ), Path(path).parent


def folder_for(recipe: Recipe, run: str) -> Path:
    """The run folder: the one that was named, or a new one below runs/."""
    from kirsch.recipes.runner import new_folder_name

    return Path(run) if run else RUNS / new_folder_name(recipe)


def compress(recipe: Recipe, base: Path, folder: Path, terminal: Terminal) -> int:
    """Do a recipe. Gives the exit code."""
    from kirsch.recipes import runner

    return _followed(
        lambda listen, stop: runner.run(recipe, folder, base=base, listen=listen, stop=stop), folder, terminal
    )


def resume(folder: Path, terminal: Terminal) -> int:
    """Go on with a run. Gives the exit code."""
    from kirsch.recipes import runner

    return _followed(lambda listen, stop: runner.resume(folder, listen=listen, stop=stop), folder, terminal)


def _followed(work: Callable[..., Outcome], folder: Path, terminal: Terminal) -> int:
    """Do a job, shown on the terminal and stopped by signals."""
    progress = Progress(terminal)
    ends: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "end":
            ends.append(event)
        progress(event)

    try:
        with watched(folder, terminal.restore) as stop:
            outcome = work(listen, stop)
    finally:
        terminal.stop()
    content = {
        "exit_code": outcome.exit_code,
        "run": str(outcome.folder),
        "report": str(outcome.folder / REPORT),
        "metrics": outcome.metrics,
    }
    terminal.result([line for event in ends for line in verdict(event)], content)
    return outcome.exit_code


def dry_run(recipe: Recipe, base: Path, run: str, terminal: Terminal) -> int:
    """Say what a recipe would do. Plan files are written if a run folder is named, and nothing else."""
    from kirsch.recipes.forecast import forecast

    if run and Path(run).is_dir() and any(Path(run).iterdir()):  # a recipe that lies there must not be replaced
        raise OutputError(f"The folder {run} is not empty.", "A dry run writes to a new one.", "Choose another folder.")
    found = forecast(recipe, base=base, folder=Path(run) if run else None)
    terminal.result(forecast_lines(found, run), found)
    return 0


def forecast_lines(found: dict[str, Any], run: str = "") -> list[Line]:
    """A forecast, one line a stage."""
    data = found["data"]
    samples = f"{data['train']:,} to train on, {data['validation']:,} to watch by, {data['test']:,} to judge by"
    lines: list[Line] = [
        [Piece(found["name"], "strong"), Piece("   a dry run: a few steps are tried, nothing is kept")],
        [Piece(f"{'goal':<13}{found['goal']}")],
        [Piece(f"{'data':<13}{data['name']}: {samples}")],
        [],
    ]
    for number, stage in enumerate(found["stages"], start=1):
        cost = ""
        if stage["macs"] is not None:
            cost = f"{figures.count(stage['macs']):>6} MACs   {figures.count(stage['parameters']):>6} params"
        took = f"about {figures.seconds(stage['seconds'])}"
        text = f"{number:>2} {stage['key']:<10} {cost:<28}   {took:<14}   {stage['model'] or ''}"
        lines.append([Piece(text.rstrip())])
    plan = found["plan"]
    if plan is not None:
        before, after = plan["cost"]["before"], plan["cost"]["after"]
        cut = ", ".join(
            f"{word} {figures.count(before[key])} → {figures.count(after[key])}"
            f" (−{figures.percent(1 - after[key] / max(before[key], 1))})"
            for key, word in (("macs", "MACs"), ("parameters", "parameters"))
        )
        lines += [[], [Piece(f"{'plan':<13}{cut} in {len(plan['groups'])} groups, by {found['plan_weights']}")]]
    lines.append(
        [Piece(f"{'time':<13}about {figures.seconds(found['seconds'])} on this machine, as busy as it is now")]
    )
    lines.append([Piece(f"{'disk':<13}about {figures.bytes_(found['disk_bytes'])}")])
    if found["missing"]:
        lines.append([Piece(f"{'missing':<13}", "bad"), Piece(f"{', '.join(found['missing'])}; see kirsch doctor")])
    lines += [[Piece(f"{'note':<13}", "doubt"), Piece(text)] for text in found["notes"]]
    if run:
        lines.append([Piece(f"{'written':<13}{run}: recipe.yaml{', plan.json' if plan is not None else ''}")])
    return lines


def init(path: str, terminal: Terminal) -> int:
    """Write a recipe with a comment on each key; a file that is there is left as it is."""
    target = Path(path)
    if target.exists():
        raise OutputError(f"{target} exists.", "It is left as it is.", "Name another file: kirsch init FILE.")
    files.check_writable(target.parent)
    files.write_text(target, commented(read_recipe(DEFAULT)))
    said = [[Piece(f"{'recipe':<13}{target}")], [Piece(f"{'next':<13}kirsch compress {target}")]]
    terminal.result(said, {"file": str(target)})
    return 0


def report(folder: Path, terminal: Terminal) -> int:
    """Draw the report of a finished run again, from its metrics."""
    from kirsch.recipes import manifest
    from kirsch.report import render

    metrics = _metrics(folder)
    altered = manifest.altered_files(folder)
    wrong = [altered[name] for name in (METRICS, files.MANIFEST) if name in altered]
    if wrong:
        raise CheckpointError(
            f"The report of {folder} is not drawn: its numbers cannot be trusted.",
            f"{wrong[0]}.",
            f"Write them again: kirsch resume {folder}",
        )
    target = folder / REPORT
    manifest.update_file(folder, REPORT, render(metrics))
    terminal.result([[Piece(f"{'report':<13}{target}")]], {"report": str(target)})
    return 0


def verify(folder: Path, terminal: Terminal) -> int:
    """Compare a run folder with the hashes that were written with it. Gives the exit code.

    Raises:
        LoadError: the folder does not hold a run.
        CheckpointError: a file is damaged, missing or foreign; the message lists all of them.
    """
    from kirsch.recipes import integrity

    found = integrity.check(folder)
    if found.problems:
        raise CheckpointError(
            f"The run {folder} is damaged:\n" + "\n".join(found.problems),
            "",
            f"kirsch resume {folder} makes the damaged parts again, or says what to delete.",
        )
    content = {"run": str(folder), "sound": found.finished, "finished": found.finished, "stages": found.stages}
    content |= {"done": found.done, "uncovered": found.uncovered, "files": found.files, "folders": found.folders}
    if found.finished:
        said = f"all {found.files} files have the sha256 of the manifest"
        terminal.result([[Piece(f"{'sound':<13}", "good"), Piece(f"{folder}: {said}")]], content)
        return 0
    progress = f"{len(found.done)} of {len(found.stages)} stages are done"
    plural = "s" * (found.folders != 1)
    said = f"{found.files} files in {found.folders} folder{plural} have the sha256 of their manifests"
    rest = f"{', '.join(found.uncovered)}: no hash covers them until the run ends"
    lines: list[Line] = [
        [Piece(f"{'not finished':<13}", "doubt"), Piece(f"{folder}: {progress}; go on with kirsch resume {folder}")],
        [Piece(f"{'verified':<13}", "good"), Piece(said)],
        [Piece(f"{'not verified':<13}", "doubt"), Piece(rest)],
    ]
    terminal.result(lines, content)
    return NOT_FINISHED


def _metrics(folder: Path) -> dict[str, Any]:
    from kirsch.report import read_metrics

    try:
        path = folder / METRICS
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise LoadError(f"{path} is not a file.", fix=f"Delete or move it; then kirsch resume {folder}")
        return read_metrics(path)
    except OSError as error:
        raise LoadError(
            f"{folder} has no {METRICS}.",
            f"{error.strerror}: the run is not finished, or this is no run folder.",
            f"Finish it: kirsch resume {folder}",
        ) from error
