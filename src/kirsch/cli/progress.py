"""Progress of a run: a header, one line per step, and a status line or one line per epoch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.recipes.layout import step_line
from kirsch.tables import Line, Piece
from kirsch.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.cli.terminal import Terminal

BAR = 24
"""Width of a bar in characters."""

TIMED_STEP = "measure"
"""The step that measures latency."""


class Progress:
    """Show the events of a run; see `kirsch.recipes.runner`.

    Args:
        terminal: output.
        clock: returns the time in seconds.
    """

    def __init__(self, terminal: Terminal, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = terminal
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
        self._terminal.progress(*header_lines(event))

    def _step_start(self, event: dict[str, Any]) -> None:
        self._step = RunningStep(event["number"], event["key"], self._clock())
        if event["key"] == TIMED_STEP:  # updates of the line would disturb the measurement
            self._terminal.start_status(lambda: timing_line(self._step), refresh=False)
        else:
            self._terminal.start_status(lambda: status_line(self._step, self._clock()))

    def _epoch(self, event: dict[str, Any]) -> None:
        self._step.epoch = event
        self._step.epochs_here += 1
        if not self._terminal.is_interactive:
            self._terminal.progress(epoch_line(event))

    def _step_end(self, event: dict[str, Any]) -> None:
        self._terminal.stop_status()
        self._terminal.progress(step_line(event, self._terminal.width))

    def _note(self, event: dict[str, Any]) -> None:
        self._terminal.progress([Piece("   "), Piece("note", "warning"), Piece(f"       {event['text']}")])

    def _end(self, _event: dict[str, Any]) -> None:
        self._terminal.progress([])  # the verdict is a result, and is written at the end


class RunningStep:
    """The current step.

    Args:
        number, key: of the step.
        since: start of the step, in seconds of the clock.
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
        Piece(f"{event['step']:<10} "),
        Piece("   ".join([*parts, figures.seconds(event["seconds"])])),
    ]


def timing_line(step: RunningStep) -> Line:
    """Return the status line of the step that measures latency, which is not updated."""
    return [Piece(f"{step.number:>2} {step.key:<10} "), Piece("measuring latency; this line is not updated", "faint")]


def status_line(step: RunningStep, now: float) -> Line:
    """Return the status line of the current step: a bar, the last metrics, and the remaining time."""
    line = [Piece(f"{step.number:>2} {step.key:<10} ")]
    passed = now - step.since
    if step.epoch is None:
        return [*line, Piece(f"running for {figures.seconds(passed)}", "faint")]
    done, total = step.epoch["epoch"], step.epoch["epochs"]
    filled = round(BAR * done / max(total, 1))
    left = (total - done) * passed / max(step.epochs_here, 1)
    parts = [f" epoch {done}/{total}", f"loss {figures.digits(step.epoch['loss'])}"]
    if step.epoch.get("accuracy") is not None:
        parts.append(figures.percent(step.epoch["accuracy"]))
    return [
        *line,
        Piece("━" * filled),
        Piece("━" * (BAR - filled), "faint"),
        Piece("   ".join(parts)),
        Piece(f"   {figures.seconds(left)} left", "faint"),
    ]
