"""What is written where: results, progress, and a line that lives while the work runs.

A line is made of pieces, each a text with a tone. Texts are written verbatim: a name in a model or a recipe can neither
color nor move anything, whatever it holds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from kirsch.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

TONES = {"": "", "good": "green", "doubt": "yellow", "bad": "red", "faint": "dim", "strong": "bold"}
"""What a piece means → how a terminal shows it. The text itself always says it too."""


WIDTH = 110
"""Lines that end in a column of their own are this wide, if the terminal is."""


class Piece(NamedTuple):
    """A part of a line.

    Args:
        text: written verbatim.
        tone: a key of `TONES`.
    """

    text: str
    tone: str = ""


Line = list[Piece]


class ClosedError(Exception):
    """The reader of the standard output has gone, as `head` does; there is nobody left to tell."""


@dataclass(frozen=True)
class Mode:
    """How a verb speaks.

    Args:
        json: one JSON object on the standard output; progress goes to the standard error.
        quiet: results only.
        debug: errors show their traceback.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False


def verbatim(text: str) -> str:
    r"""The text with everything that does not print, such as line breaks and escape sequences, as \n, \x1b, ..."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def plain(line: Iterable[Piece]) -> str:
    """A line without its tones, without spaces at its end."""
    return "".join(verbatim(text) for text, _ in line).rstrip()


class Terminal:
    """Where a verb writes.

    Args:
        mode: how it speaks.
        stdout, stderr: the process's own if left out.
    """

    def __init__(self, mode: Mode, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.mode = mode
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        self._people = self._stderr if mode.json else self._stdout
        self._consoles: dict[TextIO, Console | None] = {}
        self._live: Live | None = None

    @property
    def lively(self) -> bool:
        """Whether progress goes to a terminal, where a line can change."""
        return not self.mode.quiet and self._console(self._people) is not None

    @property
    def width(self) -> int:
        """Characters that a line of progress may have; `WIDTH` where it goes to no terminal."""
        console = self._console(self._people)
        return min(console.width, WIDTH) if console is not None else WIDTH

    def progress(self, *lines: Line) -> None:
        """Lines on what is going on; none when quiet."""
        if not self.mode.quiet:
            for line in lines:
                self._write(self._people, line)

    def result(self, lines: Iterable[Line], content: dict[str, Any]) -> None:
        """What was asked for: lines for people, or one JSON object."""
        if self.mode.json:
            self.give(content)
            return
        for line in lines:
            self._write(self._stdout, line)

    def give(self, content: dict[str, Any]) -> None:
        """A JSON object on the standard output, in one line."""
        # Escaped to ASCII: any encoding can carry it, and no name in it can steer the terminal.
        self._put(self._stdout, json.dumps(content, default=str) + "\n")

    def complain(self, *lines: Line) -> None:
        """Lines on the standard error, also when quiet."""
        for line in lines:
            self._write(self._stderr, line)

    def start(self, draw: Callable[[], Line], *, moves: bool = True) -> None:
        """Show a line below all others, until `stop`; nothing where no line can change.

        Args:
            draw: gives the line.
            moves: draw it anew four times a second, or only once.
        """
        self.stop()
        console = self._console(self._people)
        if console is None or self.mode.quiet:
            return
        from rich.live import Live

        def drawn() -> Text:
            text = _rich(draw())
            text.truncate(console.width, overflow="ellipsis")
            return text

        self._live = Live(
            get_renderable=drawn, console=console, transient=True, refresh_per_second=4, auto_refresh=moves
        )
        self._live.start(refresh=True)

    def stop(self) -> None:
        """Take the living line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def restore(self) -> None:
        """Show the cursor again, for those who end the process at once."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._people.write("\x1b[?25h\n")
                self._people.flush()

    def _console(self, stream: TextIO) -> Console | None:
        """Rich's view of a stream; None where it is no terminal that can color and move."""
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
            if error.errno in (errno.EPIPE, errno.EINVAL):  # Windows says EINVAL
                raise ClosedError from None
            raise OutputError("The standard output cannot be written.", f"{error.strerror or error}.") from error
        except ValueError as error:  # the model's code has closed it
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
