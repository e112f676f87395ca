"""How a verb ends when it fails: three lines, an exit code, and a traceback where it can be found again."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.cli.terminal import ClosedError, Line, Piece
from kirsch.errors import KirschError, LoadError, MemoryShortageError, NumericError, OutputError, Stopped, error_text
from kirsch.failures import translate
from kirsch.files import write_text

if TYPE_CHECKING:
    from kirsch.cli.terminal import Terminal

TRACEBACK = "error.txt"
RUN = "run.json"
"""What makes a folder that of a run."""
LOWER_INPUT = "Lower the sizes of --input, the first of which is the batch, or take a smaller model."
LOWER = dict.fromkeys(("compress", "resume"), "Lower data.batch_size of the recipe, or the number of samples.") | {
    "store": "Lower --batch-size, or the number of samples."
}
"""Verb → the number to lower where memory is lacking; `LOWER_INPUT` for all others."""


def tell(error: BaseException, terminal: Terminal, folder: Path | None = None, verb: str = "") -> int:
    """Write what went wrong, as three lines on the standard error or as JSON on the standard output.

    Args:
        error: anything that a verb raised. What `kirsch.failures` cannot attribute to anything else is a bug of Kirsch.
        terminal: where to write.
        folder: of the run, if there is one; a traceback goes there.
        verb: that failed; empty for a command line that names none.

    Returns:
        The exit code.
    """
    if folder is not None and not os.path.isfile(folder / RUN):  # noqa: PTH113 - false for a path that no file can have
        folder = None  # a folder that was refused is not ours to write to
    known, kept = translate(error, f"in kirsch {verb}" if verb else "", LOWER.get(verb, LOWER_INPUT)), None
    if known is None:
        kept = _keep_traceback(error, folder)
        known = _bug(error, kept)
    elif folder is not None and isinstance(known, (LoadError, NumericError, MemoryShortageError)):
        kept = _keep_traceback(error, folder)
    with contextlib.suppress(ClosedError, OutputError):  # nobody is left to tell
        if terminal.mode.debug:
            terminal.complain(*([Piece(line)] for line in _traceback(error).splitlines()))
        if not (terminal.mode.json and _given(terminal, as_json(known, kept))):
            terminal.complain(*lines(known))
    return known.exit_code


def _given(terminal: Terminal, content: dict[str, Any]) -> bool:
    """Whether an error could be written to the standard output, which may be what failed."""
    try:
        terminal.give({"error": content})
    except OutputError:
        return False
    return True


def lines(error: KirschError) -> list[Line]:
    """What happened, why, and what to do, each with its word; a sentence that breaks goes on below itself."""
    word, tone = ("stopped", "doubt") if isinstance(error, Stopped) else ("error", "bad")
    said: list[Line] = []
    for head, shown, sentence in ((word, tone, error.what), ("why", "faint", error.why), ("do", "faint", error.fix)):
        first, *rest = sentence.split("\n")
        if sentence:
            said.append([Piece(f"{head:<8}", shown), Piece(first)])
            said += [[Piece(f"{'':8}{text}")] for text in rest]
    return said


def as_json(error: KirschError, kept: Path | None = None) -> dict[str, Any]:
    """An error for other programs."""
    return {
        "type": type(error).__name__,
        "what": error.what,
        "why": error.why,
        "fix": error.fix,
        "exit_code": error.exit_code,
        "traceback": None if kept is None else str(kept),
    }


def _bug(error: BaseException, kept: Path | None) -> KirschError:
    return KirschError(
        f"A bug of ours: {error_text(error)}",
        f"The traceback is in {kept}." if kept else "The traceback could not be written to a file.",
        "Report it with the traceback; --debug shows it here.",
    )


def _keep_traceback(error: BaseException, folder: Path | None) -> Path | None:
    """Write the traceback to the run folder, or to a temporary file; None if neither can be written."""
    content = _traceback(error)
    if folder is not None:
        try:
            write_text(folder / TRACEBACK, content)
        except OutputError:
            pass  # the folder may be what failed
        else:
            return folder / TRACEBACK
    try:
        with tempfile.NamedTemporaryFile("w", prefix="kirsch-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(content)
            return Path(file.name)
    except OSError:
        return None


def _traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    return text.encode(errors="backslashreplace").decode()  # a path may hold bytes that are no text
