"""Output of the command: results, progress, errors, and a status line."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from kirsch.display import Display
from kirsch.errors import OutputError
from kirsch.tables import lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kirsch.tables import Line, Part


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
        self._stdout = Display(stdout or sys.stdout)
        self._stderr = Display(stderr or sys.stderr)
        self._display = self._stderr if mode.json else self._stdout  # for progress

    @property
    def is_interactive(self) -> bool:
        """Whether progress goes to a terminal that can update a line."""
        return not self.mode.quiet and self._display.is_interactive

    @property
    def width(self) -> int:
        """Largest width of a line of progress in characters."""
        return self._display.width

    def progress(self, *lines: Line) -> None:
        """Write lines that show progress, except in quiet mode."""
        if not self.mode.quiet:
            self._write(self._display, *lines)

    def result(self, parts: Iterable[Part], content: dict[str, Any]) -> None:
        """Write the result: lines and tables of text, or one JSON object in JSON mode."""
        if self.mode.json:
            self.write_json(content)
            return
        self._write(self._stdout, *lines(parts))

    def write_json(self, content: dict[str, Any]) -> None:
        """Write a JSON object to the standard output, in one line."""
        # `json.dumps` returns ASCII, which every encoding has, and escapes control characters
        with _write_errors("standard output"):
            self._stdout.stream.write(json.dumps(content, default=str) + "\n")
            self._stdout.stream.flush()

    def write_error(self, *lines: Line) -> None:
        """Write lines to the standard error, also in quiet mode."""
        self._write(self._stderr, *lines)

    def start_status(self, draw: Callable[[], Line], *, refresh: bool = True) -> None:
        """Show a status line as `Display.start_status` does, except in quiet mode."""
        if not self.mode.quiet:
            self._display.start_status(draw, refresh=refresh)

    def refresh_status(self) -> None:
        """Update the status line."""
        self._display.refresh_status()

    def stop_status(self) -> None:
        """Remove the status line."""
        self._display.stop_status()

    def restore_cursor(self) -> None:
        """Show the cursor again. Called before the process exits without cleanup."""
        self._display.restore_cursor()

    def _write(self, display: Display, *lines: Line) -> None:
        with _write_errors("standard error" if display is self._stderr else "standard output"):
            display.progress(*lines)


@contextlib.contextmanager
def _write_errors(stream: str) -> Iterator[None]:
    """Convert the errors of writing to a stream, such as "standard error".

    Raises:
        ClosedError: the reader has closed the stream.
        OutputError: the stream cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EINVAL):  # Windows raises EINVAL
            raise ClosedError from None
        raise OutputError(f"The {stream} cannot be written.", f"{error.strerror or error}.") from error
    except ValueError as error:  # code of the model has closed the stream
        raise OutputError(f"The {stream} cannot be written.", f"{error}.") from error
