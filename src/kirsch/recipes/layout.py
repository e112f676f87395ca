"""Lines on the steps and the goal of a run, for the terminal and for `print`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.tables import Line, Piece

if TYPE_CHECKING:
    from collections.abc import Mapping

WIDTHS = (13, 11, 12)
"""Widths of the first cells of a step: quality, MACs, parameters. Further cells have no fixed width."""


def step_line(event: Mapping[str, Any], width: int = 0) -> Line:
    """Return the line of a finished step: result, cells in columns, and the duration at the right end.

    Args:
        event: "number", "key", "did", "cells" and "seconds" of the step, and whether it was kept ("event").
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
    """Return the lines on the goal, its significance, the report and the duration."""
    words, tone = ("goal met", "good") if event["met"] else ("goal missed", "bad")
    if not event["text"]:
        lines = [[Piece(f"{'goal':<13}"), Piece("none was set")]]
    else:
        lines = [[Piece(f"{words:<13}", tone), Piece(event["text"])]]
    if event.get("significance"):
        lines.append([Piece(f"{'significance':<13}", "warning"), Piece(event["significance"])])
    lines.append([Piece(f"{'report':<13}"), Piece(event["report"])])
    lines.append([Piece(f"{'took':<13}"), Piece(figures.seconds(event["seconds"]))])
    return lines
