"""Progress of a run: a header, one line per stage, and a status line or one line per epoch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.recipes.layout import stage_line
from kirsch.tables import Line, Piece
from kirsch.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.cli.terminal import Terminal

BAR = 24
"""Width of a bar in characters."""

TIMED_STAGE = "measure"
"""The stage that measures latency."""


class Progress:
    """Show the events of a run; see `kirsch.recipes.runner`.

    Args:
        terminal: output.
        clock: returns the time in seconds.
    """

    def __init__(self, terminal: Terminal, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = terminal
        self._clock = clock
        self._stage = RunningStage()
        self._handlers = {
            "start": self._start,
            "stage_start": self._stage_start,
            "epoch": self._epoch,
            "stage_end": self._stage_end,
            "stage_kept": self._stage_end,
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
        self._terminal.progress(*header_lines(event))

    def _stage_start(self, event: dict[str, Any]) -> None:
        self._stage = RunningStage(event["number"], event["key"], self._clock())
        if event["key"] == TIMED_STAGE:  # updates of the line would disturb the measurement
            self._terminal.start_status(lambda: timing_line(self._stage), refresh=False)
        else:
            self._terminal.start_status(lambda: status_line(self._stage, self._clock()))

    def _epoch(self, event: dict[str, Any]) -> None:
        self._stage.epoch = event
        self._stage.epochs_here += 1
        if not self._terminal.is_interactive:
            self._terminal.progress(epoch_line(event))

    def _stage_end(self, event: dict[str, Any]) -> None:
        self._terminal.stop_status()
        self._terminal.progress(stage_line(event, self._terminal.width))

    def _note(self, event: dict[str, Any]) -> None:
        self._terminal.progress([Piece("   "), Piece("note", "warning"), Piece(f"       {event['text']}")])

    def _end(self, _event: dict[str, Any]) -> None:
        self._terminal.progress([])  # the verdict is a result, and is written at the end


class RunningStage:
    """The current stage.

    Args:
        number, key: of the stage.
        since: start of the stage, in seconds of the clock.
    """

    def __init__(self, number: int = 0, key: str = "", since: float = 0.0) -> None:
        self.number = number
        self.key = key
        self.since = since
        self.epoch: dict[str, Any] | None = None
        self.epochs_here = 0  # epochs of this process; a resumed run has epochs of earlier processes


def header_lines(event: dict[str, Any]) -> list[Line]:
    """Return the lines with name, folder and goal of the run."""
    run = [Piece(f"kirsch {__version__}", "strong"), Piece(f" · {event['name']} · run {event['run']}")]
    goal = [[Piece("goal  "), Piece(event["goal"])]] if event["goal"] else []
    return [run, *goal, []]


def epoch_line(event: dict[str, Any]) -> Line:
    """Return the line of a finished epoch."""
    length = len(str(event["epochs"]))
    parts = [f"epoch {event['epoch']:>{length}}/{event['epochs']}", f"loss {figures.digits(event['loss']):<6}"]
    if event.get("accuracy") is not None:
        parts.append(figures.percent(event["accuracy"]))
    return [
        Piece("   "),
        Piece(f"{event['stage']:<10} "),
        Piece("   ".join([*parts, figures.seconds(event["seconds"])])),
    ]


def timing_line(stage: RunningStage) -> Line:
    """Return the status line of the stage that measures latency, which is not updated."""
    return [Piece(f"{stage.number:>2} {stage.key:<10} "), Piece("measuring latency; this line is not updated", "faint")]


def status_line(stage: RunningStage, now: float) -> Line:
    """Return the status line of the current stage: a bar, the last metrics, and the remaining time."""
    line = [Piece(f"{stage.number:>2} {stage.key:<10} ")]
    passed = now - stage.since
    if stage.epoch is None:
        return [*line, Piece(f"running for {figures.seconds(passed)}", "faint")]
    done, total = stage.epoch["epoch"], stage.epoch["epochs"]
    filled = round(BAR * done / max(total, 1))
    left = (total - done) * passed / max(stage.epochs_here, 1)
    parts = [f" epoch {done}/{total}", f"loss {figures.digits(stage.epoch['loss'])}"]
    if stage.epoch.get("accuracy") is not None:
        parts.append(figures.percent(stage.epoch["accuracy"]))
    return [
        *line,
        Piece("━" * filled),
        Piece("━" * (BAR - filled), "faint"),
        Piece("   ".join(parts)),
        Piece(f"   {figures.seconds(left)} left", "faint"),
    ]
