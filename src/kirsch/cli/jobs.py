"""The subcommands on recipes and runs: compress, resume, init, report, verify."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch import figures, files
from kirsch.cli.signals import stop_on_signals
from kirsch.errors import NOT_REACHED, CheckpointError, LoadError, OutputError
from kirsch.graph.cost_names import WORDS
from kirsch.progress import JobProgress, labeled, verdict_lines
from kirsch.pruning.step import plan_file
from kirsch.recipes.manifest import METRICS, RECIPE, REPORT
from kirsch.recipes.recipe import BUILTIN, Recipe, commented, read_recipe
from kirsch.tables import Line, Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.cli.terminal import Terminal
    from kirsch.recipes.runner import Outcome

RUNS = Path("runs")
DEFAULT = BUILTIN / "digits.yaml"


def read(path: str, changes: Sequence[str]) -> tuple[Recipe, Path]:
    """Return a recipe, changed by environment variables and `--set`, and the base folder of its relative paths."""
    if not path:
        return read_recipe(DEFAULT, changes, os.environ), Path()
    return read_recipe(Path(path), changes, os.environ), Path(path).parent


def folder_for(recipe: Recipe, run: str) -> Path:
    """Return the run folder `run`, or a new folder in runs/ if `run` is empty."""
    from kirsch.recipes.runner import new_folder_name

    return Path(run) if run else RUNS / new_folder_name(recipe)


def compress(recipe: Recipe, base: Path, folder: Path, terminal: Terminal) -> int:
    """Run a recipe, and return the exit code."""
    from kirsch.recipes import runner

    return _run_with_progress(
        lambda listen, stop: runner.run(recipe, folder, base=base, listen=listen, stop=stop), folder, terminal
    )


def resume(folder: Path, terminal: Terminal) -> int:
    """Resume a run, and return the exit code."""
    from kirsch.recipes import runner

    return _run_with_progress(lambda listen, stop: runner.resume(folder, listen=listen, stop=stop), folder, terminal)


def _run_with_progress(work: Callable[..., Outcome], folder: Path, terminal: Terminal) -> int:
    """Run a job, show its progress on the terminal, and stop it on signals."""
    progress = JobProgress(terminal)
    end_events: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "end":
            end_events.append(event)
        progress(event)

    try:
        with stop_on_signals(folder, terminal.restore_cursor) as stop:
            outcome = work(listen, stop)
    finally:
        terminal.stop_status()
    content = {
        "exit_code": outcome.exit_code,
        "run": str(outcome.folder),
        "report": str(outcome.folder / REPORT),
        "metrics": outcome.metrics,
    }
    terminal.result([line for event in end_events for line in verdict_lines(event)], content)
    return outcome.exit_code


def dry_run(recipe: Recipe, base: Path, run: str, terminal: Terminal) -> int:
    """Show what a recipe would do. If a run folder is named, the recipe and its plans are written to it."""
    from kirsch.recipes.forecast import forecast

    if run and Path(run).is_dir() and any(Path(run).iterdir()):  # a recipe in this folder must not be replaced
        raise OutputError(
            f"The folder {run} is not empty.",
            "A dry run writes only to a new or empty folder.",
            "Choose another folder.",
        )
    content = forecast(recipe, base=base, folder=Path(run) if run else None)
    terminal.result(forecast_lines(content, run), content)
    return 0


def forecast_lines(content: dict[str, Any], run: str = "") -> list[Line]:
    """Return the lines of a dry run, one line per step."""
    data = content["data"]
    train = "a loader" if data["train"] is None else f"{data['train']:,}"
    samples = f"{train} for training, {data['validation']:,} for validation, {data['test']:,} for testing"
    lines: list[Line] = [
        [
            Piece(content["name"], "strong"),
            Piece("   a dry run: a few training steps are timed, and nothing else is trained"),
        ],
        *labeled("goal", "", [[Piece(text)] for text in content["goals"] or ["none is set"]]),
        [Piece(f"{'data':<13}{data['name']}: {samples}")],
        [],
    ]
    for number, step in enumerate(content["steps"], start=1):
        cost = ""
        if step["macs"] is not None:
            cost = f"{figures.count(step['macs']):>6} MACs   {figures.count(step['parameters']):>6} params"
        duration = "not timed" if step["seconds"] is None else f"about {figures.seconds(step['seconds'])}"
        text = f"{number:>2} {step['key']:<10} {cost:<28}   {duration:<14}   {step['model'] or ''}"
        lines.append([Piece(text.rstrip())])
    for number, (key, plan) in enumerate(content["plans"].items()):
        before, after = plan["cost"]["before"], plan["cost"]["after"]
        reduction = ", ".join(
            f"{word} {figures.count(before[key])} → {figures.count(after[key])}"
            f" (−{figures.percent(1 - after[key] / max(before[key], 1))})"
            for key, word in WORDS.items()
            if key in ("macs", "parameters") or key in plan["goal"]
        )
        lines += [[]] if number == 0 else []
        kind = "block" if plan["blocks"] else "unit"
        ranking = f"; {kind}s ranked by the importance {plan['method']['importance']}"
        if plan["groups"]:
            ranking += f", widths by the ranking {plan['method']['ranking']}"
        weights = f", with {content['plan_weights']}" if number == 0 else ""
        of_groups = f"by pruning {figures.counted(len(plan['groups']), 'group')}"
        of_blocks = f"by removing {figures.counted(len(plan['blocks']), 'block')}"
        text = f"{reduction} {of_blocks if plan['blocks'] else of_groups}{ranking}{weights}"
        lines.append([Piece(f"{Path(plan_file(key)).stem:<13}{text}")])
    lines += labeled("reached", "good", [[Piece(text)] for text in content["expected"]])
    untimed = [step["key"] for step in content["steps"] if step["seconds"] is None]
    without = f", without {' and '.join(untimed)}" if untimed else ""
    duration = f"about {figures.seconds(content['seconds'])}{without}, on this machine under its current load"
    lines.append([Piece(f"{'time':<13}{duration}")])
    lines.append([Piece(f"{'disk':<13}about {figures.bytes_(content['disk_bytes'])}")])
    if content["missing"]:
        lines.append([Piece(f"{'missing':<13}", "bad"), Piece(f"{', '.join(content['missing'])}; see kirsch doctor")])
    lines += [[Piece(f"{'note':<13}", "warning"), Piece(text)] for text in content["notes"]]
    if run:
        names = [RECIPE, *map(plan_file, content["plans"])]
        lines.append([Piece(f"{'written':<13}{run}: {', '.join(names)}")])
    return lines


def init(path: str, terminal: Terminal) -> int:
    """Write a recipe with a comment on each key; an existing file is not replaced."""
    target = Path(path)
    if target.exists():
        raise OutputError(
            f"{target} already exists.", "It is not replaced.", "Give another file name: kirsch init FILE."
        )
    files.check_writable(target.parent)
    files.write_text(target, commented(read_recipe(DEFAULT)))
    lines = [[Piece(f"{'recipe':<13}{target}")], [Piece(f"{'next':<13}kirsch compress {target}")]]
    terminal.result(lines, {"file": str(target)})
    return 0


def report(folder: Path, terminal: Terminal) -> int:
    """Write the report of a finished run again, from its metrics."""
    from kirsch.recipes import manifest, run_folder
    from kirsch.report import render

    metrics = _metrics(folder)
    altered = manifest.altered_files(folder)
    damaged = [altered[name] for name in (METRICS, files.MANIFEST) if name in altered]
    if damaged:
        raise CheckpointError(
            f"The report of {folder} cannot be written, because the metrics of the run are damaged.",
            f"{damaged[0]}.",
            f"Restore the metrics: {run_folder.how_to_continue(folder)}",
        )
    target = folder / REPORT
    manifest.update_file(folder, REPORT, render(metrics))
    terminal.result([[Piece(f"{'report':<13}{target}")]], {"report": str(target)})
    return 0


def verify(folder: Path, terminal: Terminal) -> int:
    """Compare the files of a run with their stored hashes, and return the exit code.

    Raises:
        LoadError: the folder is not a run folder.
        CheckpointError: files are damaged, missing, or not part of the run; the message names all of them.
    """
    from kirsch.recipes import integrity, run_folder

    checked = integrity.check(folder)
    if checked.problems:
        raise CheckpointError(
            f"The run {folder} is damaged:\n" + "\n".join(checked.problems),
            "",
            f"{run_folder.how_to_continue(folder)} restores the damaged files, or names the files to delete.",
        )
    content = {"run": str(folder), "sound": checked.finished, "finished": checked.finished, "steps": checked.steps}
    content |= {
        "done": checked.done,
        "uncovered": checked.uncovered,
        "files": checked.files,
        "folders": checked.folders,
    }
    if checked.finished:
        text = f"the sha256 of all {checked.files} files matches the manifest"
        terminal.result([[Piece(f"{'sound':<13}", "good"), Piece(f"{folder}: {text}")]], content)
        return 0
    progress = f"{len(checked.done)} of {len(checked.steps)} steps are done"
    compared = f"{figures.counted(checked.files, 'file')} in {figures.counted(checked.folders, 'folder')}"
    verified = f"{compared}: the sha256 of each matches the manifest of its folder"
    unverified = f"{', '.join(checked.uncovered)}: no hash is stored for them until the run ends"
    lines: list[Line] = [
        [
            Piece(f"{'not finished':<13}", "warning"),
            Piece(f"{folder}: {progress}; continue with {run_folder.how_to_continue(folder)}"),
        ],
        [Piece(f"{'verified':<13}", "good"), Piece(verified)],
        [Piece(f"{'not verified':<13}", "warning"), Piece(unverified)],
    ]
    terminal.result(lines, content)
    return NOT_REACHED


def _metrics(folder: Path) -> dict[str, Any]:
    from kirsch.recipes import run_folder
    from kirsch.report import read_metrics

    try:
        path = folder / METRICS
        if path.exists() and not path.is_file():  # reading a pipe would block
            fix = f"Delete or move it; then {run_folder.how_to_continue(folder)}"
            raise LoadError(f"{path} is not a file.", fix=fix)
        return read_metrics(path)
    except OSError as error:
        run_folder.require(folder)
        raise LoadError(
            f"{folder} has no {METRICS}.",
            f"{error.strerror}: the run is not finished.",
            f"Finish the run: {run_folder.how_to_continue(folder)}",
        ) from error
