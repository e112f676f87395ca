"""Lines of progress on a stream, and a status line below them on a terminal or in a notebook."""

from __future__ import annotations

import contextlib
import sys
import time
from functools import cached_property
from typing import TYPE_CHECKING, TextIO

from kirsch.tables import plain, verbatim

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from kirsch.tables import Line

TONES = {"": "", "good": "green", "warning": "yellow", "bad": "red", "faint": "dim", "strong": "bold"}
"""Style on a terminal for each tone of a `kirsch.tables.Piece`. The text alone has the same information."""

WIDTH = 110
"""Width of lines with a right-aligned last column, unless the terminal is narrower."""

UPDATES = 4
"""Updates of the status line per second."""


class Display:
    """Lines on a stream, and a status line below them if the stream can update a line.

    Args:
        stream: stream that is written; flushed after each line.
        notebook: whether the stream is the output of a notebook cell, where a carriage return updates a line, but
            nothing moves the cursor up.
    """

    def __init__(self, stream: TextIO, *, notebook: bool = False) -> None:
        self.stream = stream
        self._notebook = notebook
        self._live: Live | None = None
        self._draw: Callable[[], Line] | None = None  # returns the status line of a notebook
        self._drawn, self._drawn_at = "", 0.0

    @cached_property
    def _console(self) -> Console | None:
        """Console of a terminal that can move the cursor; None for other streams."""
        return None if self._notebook or not self.stream.isatty() else _console(self.stream)

    @property
    def is_interactive(self) -> bool:
        """Whether the stream can update a line."""
        return self._console is not None or self._notebook

    @property
    def width(self) -> int:
        """Largest width of a line in characters; `WIDTH` without a terminal."""
        return min(self._console.width, WIDTH) if self._console is not None else WIDTH

    def progress(self, *lines: Line) -> None:
        """Write lines, above the status line if there is one."""
        for line in lines:
            if self._console is not None:
                self._console.print(_rich(line), soft_wrap=True)
                continue
            self._erase()
            self.stream.write(plain(line) + "\n")
            self.stream.flush()

    def start_status(self, draw: Callable[[], Line], *, refresh: bool = True) -> None:
        """Show a status line below all other lines until `stop_status`, if the stream can update a line.

        Args:
            draw: function that returns the line.
            refresh: whether a terminal updates the line `UPDATES` times a second; otherwise the line is drawn once. In
                a notebook, `refresh_status` updates the line.
        """
        self.stop_status()
        if self._notebook:
            self._draw = draw
            self.refresh_status()
            return
        console = self._console
        if console is None:
            return
        from rich.live import Live  # noqa: PLC0415 - not needed without a terminal

        def render() -> Text:
            text = _rich(draw())
            text.truncate(console.width, overflow="ellipsis")
            return text

        self._live = Live(
            get_renderable=render,
            console=console,
            transient=True,
            refresh_per_second=UPDATES,
            auto_refresh=refresh,
            redirect_stdout=sys.stdout.isatty(),  # output to a file does not disturb the line
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start(refresh=True)

    def refresh_status(self) -> None:
        """Update the status line of a notebook, at most `UPDATES` times a second. A terminal needs no such call."""
        now = time.monotonic()
        if self._draw is None or (self._drawn and now - self._drawn_at < 1 / UPDATES):
            return
        text = plain(self._draw())[:WIDTH]
        self.stream.write("\r" + text.ljust(len(self._drawn)))
        self.stream.flush()
        self._drawn, self._drawn_at = text, now

    def stop_status(self) -> None:
        """Remove the status line."""
        self._erase()
        self._draw = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def restore_cursor(self) -> None:
        """Show the cursor again. Called before the process exits without cleanup."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self.stream.write("\x1b[?25h\n")
                self.stream.flush()

    def _erase(self) -> None:
        """Erase the status line of a notebook."""
        if self._drawn:
            self.stream.write("\r" + " " * len(self._drawn) + "\r")
            self._drawn = ""


def own_display() -> Display:
    """Return the display for a call from Python: the output of the notebook cell, or else the standard error."""
    if in_notebook():
        return Display(sys.stdout, notebook=True)
    return Display(sys.stderr)


def in_notebook() -> bool:
    """Return whether the code runs in a cell of a Jupyter notebook."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and hasattr(get_shell(), "kernel")  # IPython in a terminal has no kernel


def _console(stream: TextIO) -> Console | None:
    """Return a rich console for a terminal; None if the terminal has no colors and cursor movement."""
    from rich.console import Console  # noqa: PLC0415 - not needed without a terminal

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    return None if console.is_dumb_terminal else console


def _rich(line: Line) -> Text:
    from rich.text import Text  # noqa: PLC0415 - not needed without a terminal

    text = Text(end="")
    for content, tone in line:
        text.append(verbatim(content), TONES[tone])
    text.rstrip()
    text.end = "\n"
    return text
