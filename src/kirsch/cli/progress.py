"""A run as it is seen: a head, one line a stage, and in between a line that lives, or one line an epoch."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from kirsch.cli.terminal import WIDTH, Line, Piece
from kirsch.report import figures
from kirsch.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.cli.terminal import Terminal

WIDTHS = (13, 11, 12)
"""Columns of a stage's first cells: quality, MACs, parameters. What follows takes the room that it needs."""

BAR = 24
"""Characters of a bar."""

TIMING = "measure"
"""The stage that times."""


class Progress:
    """Listens to the events of a run and shows them; see `kirsch.recipes.runner`.

    Args:
        terminal: where to write.
        clock: seconds.
    """

    def __init__(self, terminal: Terminal, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = terminal
        self._clock = clock
        self._stage = Running()
        self._shown = {
            "start": self._start,
            "stage_start": self._stage_start,
            "epoch": self._epoch,
            "stage_end": self._stage_end,
            "stage_kept": self._stage_end,
            "note": self._note,
            "doubt": self._note,
            "end": self._end,
        }

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event; those that are for the record alone are passed over."""
        show = self._shown.get(event["event"])
        if show is not None:
            show(event)

    def _start(self, event: dict[str, Any]) -> None:
        self._terminal.progress(*head(event))

    def _stage_start(self, event: dict[str, Any]) -> None:
        self._stage = Running(event["number"], event["key"], self._clock())
        if event["key"] == TIMING:  # a line that moves would take its time from what is timed
            self._terminal.start(lambda: still(self._stage), moves=False)
        else:
            self._terminal.start(lambda: running(self._stage, self._clock()))

    def _epoch(self, event: dict[str, Any]) -> None:
        self._stage.epoch = event
        self._stage.seen += 1
        if not self._terminal.lively:
            self._terminal.progress(epoch(event))

    def _stage_end(self, event: dict[str, Any]) -> None:
        self._terminal.stop()
        self._terminal.progress(stage(event, self._terminal.width))

    def _note(self, event: dict[str, Any]) -> None:
        self._terminal.progress([Piece("   "), Piece("note", "doubt"), Piece(f"       {event['text']}")])

    def _end(self, _event: dict[str, Any]) -> None:
        self._terminal.progress([])  # the verdict is a result, and follows


class Running:
    """The stage that is at work.

    Args:
        number, key: of the stage.
        since: when it began, in seconds of the clock.
    """

    def __init__(self, number: int = 0, key: str = "", since: float = 0.0) -> None:
        self.number = number
        self.key = key
        self.since = since
        self.epoch: dict[str, Any] | None = None
        self.seen = 0  # epochs of this process: a run that goes on has done others before


def head(event: dict[str, Any]) -> list[Line]:
    """What runs, where, and what for."""
    run = [Piece(f"kirsch {__version__}", "strong"), Piece(f" · {event['name']} · run {event['run']}")]
    goal = [[Piece("goal  "), Piece(event["goal"])]] if event["goal"] else []
    return [run, *goal, []]


def stage(event: dict[str, Any], width: int = WIDTH) -> Line:
    """A finished stage: what it did, what came out, and, so that they stand below each other, how long it took."""
    cells = [str(cell) for cell in event["cells"]]
    columns = [f"{_aligned(cell):<{reach}}" for cell, reach in zip(cells, WIDTHS, strict=False)]
    text = "  ".join([f"{event['number']:>2} {event['key']:<10} {event['did']:<13}", *columns])
    text = "   ".join([text.rstrip(), *filter(None, cells[len(WIDTHS) :])])
    seconds = "kept" if event["event"] == "stage_kept" else figures.seconds(event["seconds"])
    return [Piece(text), Piece(f"{seconds:>{max(width - len(text), len(seconds) + 3)}}", "faint")]


def _aligned(cell: str) -> str:
    """A cell whose number is written to the width of three digits and a point, so that units stand below each other."""
    number = re.match(r"[\d.]+(?= |$)", cell)
    return cell if number is None else cell[: number.end()].rjust(4) + cell[number.end() :]


def epoch(event: dict[str, Any]) -> Line:
    """A finished epoch, as a line of its own."""
    length = len(str(event["epochs"]))
    parts = [f"epoch {event['epoch']:>{length}}/{event['epochs']}", f"loss {figures.digits(event['loss']):<6}"]
    if event.get("accuracy") is not None:
        parts.append(figures.percent(event["accuracy"]))
    return [
        Piece("   "),
        Piece(f"{event['stage']:<10} "),
        Piece("   ".join([*parts, figures.seconds(event["seconds"])])),
    ]


def still(stage: Running) -> Line:
    """The stage that times, in a line that keeps still."""
    return [Piece(f"{stage.number:>2} {stage.key:<10} "), Piece("timing; nothing moves meanwhile", "faint")]


def running(stage: Running, now: float) -> Line:
    """The stage that is at work: a bar, the metric now, the time that is left by the epochs so far."""
    line = [Piece(f"{stage.number:>2} {stage.key:<10} ")]
    passed = now - stage.since
    if stage.epoch is None:
        return [*line, Piece(f"at work for {figures.seconds(passed)}", "faint")]
    done, of = stage.epoch["epoch"], stage.epoch["epochs"]
    filled = round(BAR * done / max(of, 1))
    left = (of - done) * passed / max(stage.seen, 1)
    parts = [f" epoch {done}/{of}", f"loss {figures.digits(stage.epoch['loss'])}"]
    if stage.epoch.get("accuracy") is not None:
        parts.append(figures.percent(stage.epoch["accuracy"]))
    return [
        *line,
        Piece("━" * filled),
        Piece("━" * (BAR - filled), "faint"),
        Piece("   ".join(parts)),
        Piece(f"   {figures.seconds(left)} left", "faint"),
    ]


def verdict(event: dict[str, Any]) -> list[Line]:
    """Whether the goal is met, by what, and where the report is."""
    words, tone = ("goal met", "good") if event["met"] else ("goal missed", "bad")
    if not event["text"]:
        lines = [[Piece(f"{'goal':<13}"), Piece("none was set")]]
    else:
        lines = [[Piece(f"{words:<13}", tone), Piece(event["text"])]]
    if event.get("doubt"):
        lines.append([Piece(f"{'significance':<13}", "doubt"), Piece(event["doubt"])])
    lines.append([Piece(f"{'report':<13}"), Piece(event["report"])])
    lines.append([Piece(f"{'took':<13}"), Piece(figures.seconds(event["seconds"]))])
    return lines
