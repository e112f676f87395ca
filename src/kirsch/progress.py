"""Progress of a training run and of a job: lines of epochs and steps, and a status line with a bar."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from kirsch import figures
from kirsch.tables import Line, Piece
from kirsch.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

BAR = 24
"""Largest width of a bar in characters."""

TIMED_STEP = "measure"
"""The step that measures latency."""

RESERVED = ("event", "step", "link", "epoch", "epochs", "loss", "terms", "gradient_shares", "learning_rate", "seconds")
"""Keys of an epoch event that are not metrics."""

MOST_METRICS = 4
"""Largest number of metrics in the line of an epoch."""


WIDTHS = (13, 11, 12)
"""Widths of the first cells in the line of a step: quality, MACs, parameters. Further cells have no fixed width."""


class Output(Protocol):
    """Output to which progress is written; `kirsch.display.Display` describes the methods."""

    @property
    def width(self) -> int: ...  # noqa: D102
    def progress(self, *lines: Line) -> None: ...  # noqa: D102
    def start_status(self, draw: Callable[[], Line], *, refresh: bool = True) -> None: ...  # noqa: D102
    def refresh_status(self) -> None: ...  # noqa: D102
    def stop_status(self) -> None: ...  # noqa: D102


class JobProgress:
    """Show the events of a job: a line for each step and for each epoch.

    If the output can update a line, a status line with a bar shows the progress of the running step.

    Args:
        output: where the events are shown.
        clock: function that returns the time in seconds.
    """

    def __init__(self, output: Output, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._step = RunningStep()
        self._handlers = {
            "start": self._start,
            "step_start": self._step_start,
            "epoch": self._epoch,
            "step_end": self._step_end,
            "step_kept": self._step_end,
            "note": self._note,
            "warning": self._note,
            "end": self._end,
        }

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event; events that are only stored are ignored."""
        handler = self._handlers.get(event["event"])
        if handler is not None:
            handler(event)

    def _start(self, event: dict[str, Any]) -> None:
        self._output.progress(*header_lines(event))

    def _step_start(self, event: dict[str, Any]) -> None:
        self._step = RunningStep(event["number"], event["key"], self._clock())
        if event["key"] == TIMED_STEP:  # updates of the line would disturb the measurement
            self._output.start_status(lambda: timing_line(self._step), refresh=False)
        else:
            self._output.start_status(lambda: status_line(self._step, self._clock(), self._output.width))

    def _epoch(self, event: dict[str, Any]) -> None:
        self._step.epoch = event
        self._step.epochs_here += 1
        self._output.progress(epoch_line(event))
        self._output.refresh_status()

    def _step_end(self, event: dict[str, Any]) -> None:
        self._output.stop_status()
        self._output.progress(step_line(event, self._output.width))

    def _note(self, event: dict[str, Any]) -> None:
        """Show a note or a warning, with the word of the event."""
        self._output.progress([Piece("   "), Piece(f"{event['event']:<11}", "warning"), Piece(event["text"])])

    def _end(self, _event: dict[str, Any]) -> None:
        self._output.progress([])  # the command writes the verdict to the standard output


class RunningStep:
    """The current step.

    Args:
        number, key: number and key of the step.
        since: start of the step, in seconds of the clock.
    """

    def __init__(self, number: int = 0, key: str = "", since: float = 0.0) -> None:
        self.number = number
        self.key = key
        self.since = since
        self.epoch: dict[str, Any] | None = None
        self.epochs_here = 0  # epochs of this process; a resumed run has epochs of earlier processes


class TrainingProgress:
    """Show the events of a training run: a line for each epoch, and a bar while an epoch runs.

    The bar is shown only on a terminal or in a notebook.

    Args:
        output: where the events are shown.
        clock: function that returns the time in seconds.
    """

    def __init__(self, output: Output, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._running: RunningEpoch | None = None
        self._warnings: set[str] = set()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show an event: the end of an epoch, or a warning whose text was not shown before."""
        if event["event"] == "epoch":
            self.stop()
            model = [Piece(f"model {event['link']}  ")] if "link" in event else []
            self._output.progress([*model, Piece(epoch_text(event))])
        elif event["event"] == "warning" and event["text"] not in self._warnings:
            self._warnings.add(event["text"])
            self._output.progress([Piece("warning", "warning"), Piece(f"  {event['text']}")])

    def batch(self, epoch: int, epochs: int, batch: int, batches: int | None) -> None:
        """Show that a batch is done.

        Args:
            epoch, epochs: number of the epoch, from 1, and number of epochs of the run.
            batch, batches: number of finished batches, and number of batches of the epoch; None if it is not known.
        """
        if self._running is None:
            self._running = running = RunningEpoch(epoch, epochs, batch, batches, since=self._clock(), first=batch)
            self._output.start_status(lambda: running_epoch_line(running, self._clock()))
        self._running.batch = batch
        self._output.refresh_status()

    def stop(self) -> None:
        """Remove the bar."""
        self._running = None
        self._output.stop_status()


class CountProgress:
    """Show a bar for a known number of equal parts of a call. A context manager: the bar is removed at its end.

    Args:
        output: where the bar is shown; None shows nothing.
        name: name of the call.
        total: number of parts.
        clock: function that returns the time in seconds.
    """

    def __init__(
        self, output: Output | None, name: str, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._output, self._name, self._total, self._clock = output, name, total, clock
        self._done, self._since = 0, clock()

    def __enter__(self) -> Self:
        """Show the bar."""
        if self._output is not None:
            self._output.start_status(self._line)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        if self._output is not None:
            self._output.stop_status()

    def advance(self) -> None:
        """Show that a part is done."""
        self._done += 1
        if self._output is not None:
            self._output.refresh_status()

    def _line(self) -> Line:
        line = [
            Piece(f"{self._name} "),
            *bar(self._done / max(self._total, 1)),
            Piece(f" {self._done}/{self._total}"),
        ]
        left = (self._total - self._done) * (self._clock() - self._since) / max(self._done, 1)
        return [*line, time_left(left)] if self._done else line


@dataclass
class RunningEpoch:
    """The current epoch of a training run.

    Args:
        epoch, epochs, batch, batches: see `TrainingProgress.batch`.
        since: clock time, in seconds, at which batch `first` was finished.
        first: number of the first batch that was finished in this process.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int | None
    since: float
    first: int


def running_epoch_line(running: RunningEpoch, now: float) -> Line:
    """Return the status line of the current epoch: a bar, the batches, and the remaining time of the epoch."""
    line = [Piece(f"epoch {running.epoch:>{len(str(running.epochs))}}/{running.epochs} ")]
    if running.batches is None:
        return [*line, Piece(f"  batch {running.batch}")]
    line += [*bar(running.batch / max(running.batches, 1)), Piece(f" {running.batch}/{running.batches}")]
    timed = running.batch - running.first
    return [*line, time_left((running.batches - running.batch) * (now - running.since) / timed)] if timed else line


def header_lines(event: dict[str, Any]) -> list[Line]:
    """Return the lines with name and folder of the run, and one line for each goal."""
    run = [Piece(f"kirsch {__version__}", "strong"), Piece(f" · {event['name']} · run {event['run']}")]
    return [run, *labeled("goal", "", [[Piece(text)] for text in event["goals"]], 6), []]


def labeled(label: str, tone: str, lines: Sequence[Line], width: int = 13) -> list[Line]:
    """Return lines with a label before the first one; the other lines are indented by the same width."""
    return [[Piece(f"{'' if number else label:<{width}}", tone), *line] for number, line in enumerate(lines)]


def epoch_line(event: Mapping[str, Any]) -> Line:
    """Return the line of a finished epoch of a step of a job."""
    return [Piece("   "), Piece(f"{event['step']:<10} "), Piece(epoch_text(event))]


def epoch_text(event: Mapping[str, Any]) -> str:
    """Return number, loss, metrics and duration of a finished epoch."""
    length = len(str(event["epochs"]))
    parts = [f"epoch {event['epoch']:>{length}}/{event['epochs']}", f"loss {figures.digits(event['loss']):<6}"]
    return "   ".join([*parts, *metric_texts(event), figures.seconds(event["seconds"])])


def metric_texts(event: Mapping[str, Any]) -> list[str]:
    """Return the accuracy of an epoch, or else the first `MOST_METRICS` other metrics with their names."""
    if event.get("accuracy") is not None:
        return [figures.percent(event["accuracy"])]
    metrics = [(name, value) for name, value in event.items() if name not in RESERVED and isinstance(value, float)]
    return [
        f"{name} {figures.percent(value) if name.endswith('accuracy') else figures.digits(value)}"
        for name, value in metrics[:MOST_METRICS]
    ]


def timing_line(step: RunningStep) -> Line:
    """Return the status line of the step that measures latency, which is not updated."""
    return [Piece(f"{step.number:>2} {step.key:<10} "), Piece("measuring latency; updates would disturb it", "faint")]


def status_line(step: RunningStep, now: float, width: int) -> Line:
    """Return the status line of the current step: a bar, the last metrics, and the remaining time.

    The bar is shorter if the line would be longer than `width` characters.
    """
    line = [Piece(f"{step.number:>2} {step.key:<10} ")]
    passed = now - step.since
    if step.epoch is None:
        return [*line, Piece(f"running for {figures.seconds(passed)}", "faint")]
    done, total = step.epoch["epoch"], step.epoch["epochs"]
    left = (total - done) * passed / max(step.epochs_here, 1)
    parts = [f" epoch {done}/{total}", f"loss {figures.digits(step.epoch['loss'])}", *metric_texts(step.epoch)]
    after = [Piece("   ".join(parts)), time_left(left)]
    space = width - sum(len(piece.text) for piece in [*line, *after])
    return [*line, *bar(done / max(total, 1), max(0, min(BAR, space))), *after]


def bar(fraction: float, width: int = BAR) -> Line:
    """Return a bar whose first part is filled."""
    filled = round(width * fraction)
    return [Piece("━" * filled), Piece("━" * (width - filled), "faint")]


def time_left(seconds: float) -> Piece:
    """Return the remaining time."""
    return Piece(f"   {figures.seconds(seconds)} left", "faint")


def step_line(event: Mapping[str, Any], width: int = 0) -> Line:
    """Return the line of a finished step: result, cells in columns, and the duration at the right end.

    Args:
        event: "number", "key", "did", "cells" and "seconds" of the step. If "event" is "step_kept", the word "kept"
            replaces the duration.
        width: least width of the line in characters.
    """
    cells = [str(cell) for cell in event["cells"]]
    columns = [f"{_aligned(cell):<{reach}}" for cell, reach in zip(cells, WIDTHS, strict=False)]
    text = "  ".join([f"{event['number']:>2} {event['key']:<10} {event['did']:<15}", *columns])
    text = "   ".join([text.rstrip(), *filter(None, cells[len(WIDTHS) :])])
    seconds = "kept" if event.get("event") == "step_kept" else figures.seconds(event["seconds"])
    return [Piece(text), Piece(f"{seconds:>{max(width - len(text), len(seconds) + 3)}}", "faint")]


def _aligned(cell: str) -> str:
    """Return a cell whose number is padded to four characters, so that units are aligned."""
    number = re.match(r"[\d.]+(?= |$)", cell)
    return cell if number is None else cell[: number.end()].rjust(4) + cell[number.end() :]


def verdict_lines(event: Mapping[str, Any]) -> list[Line]:
    """Return one line for each goal, and the lines on the significance, the report and the duration of all steps."""
    words, tone = ("goal met", "good") if event["met"] else ("goal missed", "bad")
    goals = [[Piece("" if item["met"] else "missed: ", "bad"), Piece(item["text"])] for item in event["items"]]
    lines = labeled(words, tone, goals) if goals else [[Piece(f"{'goal':<13}"), Piece("none was set")]]
    if event.get("significance"):
        lines.append([Piece(f"{'significance':<13}", "warning"), Piece(event["significance"])])
    lines.append([Piece(f"{'report':<13}"), Piece(event["report"])])
    lines.append([Piece(f"{'took':<13}"), Piece(figures.seconds(event["seconds"]))])
    return lines
