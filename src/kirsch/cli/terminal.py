"""Output of the command: results, progress, errors, and a status line."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from kirsch.errors import OutputError
from kirsch.tables import lines, plain, verbatim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from kirsch.tables import Line, Part

TONES = {"": "", "good": "green", "warning": "yellow", "bad": "red", "faint": "dim", "strong": "bold"}
"""Meaning of a piece → style on a terminal. The text has the same information."""


WIDTH = 110
"""Width of lines with a last column at the right end, if the terminal is wide enough."""


class ClosedError(Exception):
    """The reader of the standard output has closed it, as `head` does."""


@dataclass(frozen=True)
class Mode:
    """Output mode of a subcommand.

    Args:
        json: one JSON object on the standard output; progress goes to the standard error.
        quiet: results only.
        debug: errors show their traceback.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False


class Terminal:
    """Output of a subcommand.

    Args:
        mode: output mode.
        stdout, stderr: streams; None uses those of the process.
    """

    def __init__(self, mode: Mode, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.mode = mode
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        self._progress_stream = self._stderr if mode.json else self._stdout
        self._consoles: dict[TextIO, Console | None] = {}
        self._live: Live | None = None

    @property
    def is_interactive(self) -> bool:
        """Whether progress goes to a terminal that can update a line."""
        return not self.mode.quiet and self._console(self._progress_stream) is not None

    @property
    def width(self) -> int:
        """Largest width of a line of progress in characters; `WIDTH` without a terminal."""
        console = self._console(self._progress_stream)
        return min(console.width, WIDTH) if console is not None else WIDTH

    def progress(self, *lines: Line) -> None:
        """Write lines on the progress, except in quiet mode."""
        if not self.mode.quiet:
            for line in lines:
                self._write(self._progress_stream, line)

    def result(self, parts: Iterable[Part], content: dict[str, Any]) -> None:
        """Write the result: lines and tables of text, or one JSON object in JSON mode."""
        if self.mode.json:
            self.write_json(content)
            return
        for line in lines(parts):
            self._write(self._stdout, line)

    def write_json(self, content: dict[str, Any]) -> None:
        """Write a JSON object to the standard output, in one line."""
        # ASCII can be written in any encoding, and has no control characters of a terminal.
        self._put(self._stdout, json.dumps(content, default=str) + "\n")

    def write_error(self, *lines: Line) -> None:
        """Write lines to the standard error, also in quiet mode."""
        for line in lines:
            self._write(self._stderr, line)

    def start_status(self, draw: Callable[[], Line], *, refresh: bool = True) -> None:
        """Show a status line below all other lines until `stop_status`, if the terminal can update a line.

        Args:
            draw: returns the line.
            refresh: update the line four times a second, instead of drawing it once.
        """
        self.stop_status()
        console = self._console(self._progress_stream)
        if console is None or self.mode.quiet:
            return
        from rich.live import Live

        def render() -> Text:
            text = _rich(draw())
            text.truncate(console.width, overflow="ellipsis")
            return text

        self._live = Live(
            get_renderable=render, console=console, transient=True, refresh_per_second=4, auto_refresh=refresh
        )
        self._live.start(refresh=True)

    def stop_status(self) -> None:
        """Remove the status line."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def restore_cursor(self) -> None:
        """Show the cursor again, before the process ends at once."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._progress_stream.write("\x1b[?25h\n")
                self._progress_stream.flush()

    def _console(self, stream: TextIO) -> Console | None:
        """Return a rich console for a stream; None if the stream is not a terminal with colors and cursor movement."""
        if stream not in self._consoles:
            self._consoles[stream] = _console(stream) if stream.isatty() else None
        return self._consoles[stream]

    def _write(self, stream: TextIO, line: Line) -> None:
        console = self._console(stream)
        if console is None:
            self._put(stream, plain(line) + "\n")
        else:
            console.print(_rich(line), soft_wrap=True)

    def _put(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
            stream.flush()
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EINVAL):  # Windows raises EINVAL
                raise ClosedError from None
            raise OutputError("The standard output cannot be written.", f"{error.strerror or error}.") from error
        except ValueError as error:  # code of the model has closed the stream
            raise OutputError("The standard output cannot be written.", f"{error}.") from error


def _console(stream: TextIO) -> Console | None:
    from rich.console import Console

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    return None if console.is_dumb_terminal else console


def _rich(line: Line) -> Text:
    from rich.text import Text

    text = Text(end="")
    for content, tone in line:
        text.append(verbatim(content), TONES[tone])
    text.rstrip()
    text.end = "\n"
    return text
