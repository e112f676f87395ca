"""Error output of the command: three lines or JSON, an exit code, and a stored traceback."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.cli.terminal import ClosedError
from kirsch.errors import KirschError, LoadError, MemoryShortageError, NumericError, OutputError, Stopped, error_text
from kirsch.failures import translate
from kirsch.files import write_text
from kirsch.tables import Line, Piece

if TYPE_CHECKING:
    from kirsch.cli.terminal import Terminal

TRACEBACK = "error.txt"
RUN = "run.json"
"""File that every run folder has."""
INPUT_FIX = "Lower the sizes of --input (the first is the batch), or use a smaller model."
RECIPE_FIX = "Lower data.batch_size of the recipe, or the number of samples."
MEMORY_FIXES = {
    "compress": RECIPE_FIX,
    "resume": RECIPE_FIX,
    "store": "Lower --batch-size, or the number of samples.",
}
"""Subcommand → fix for a lack of memory; `INPUT_FIX` for the other subcommands."""


def report_error(error: BaseException, terminal: Terminal, folder: Path | None = None, subcommand: str = "") -> int:
    """Write an error, as three lines on the standard error or as JSON on the standard output.

    Args:
        error: any exception. An exception that `failures.translate` does not know is reported as a bug of Kirsch.
        terminal: output.
        folder: folder of the run, if there is one; the traceback is written there.
        subcommand: the subcommand that failed; empty if the command line names none.

    Returns:
        The exit code.
    """
    if folder is not None and not os.path.isfile(folder / RUN):  # noqa: PTH113 - pathlib raises for an impossible path
        folder = None  # the folder was refused, and must not be written to
    doing = f"in kirsch {subcommand}" if subcommand else ""
    translated, path = translate(error, doing, MEMORY_FIXES.get(subcommand, INPUT_FIX)), None
    if translated is None:
        path = _store_traceback(error, folder)
        translated = _bug(error, path)
    elif folder is not None and isinstance(translated, (LoadError, NumericError, MemoryShortageError)):
        path = _store_traceback(error, folder)
    with contextlib.suppress(ClosedError, OutputError):  # nobody reads the output
        if terminal.mode.debug:
            terminal.write_error(*([Piece(line)] for line in _traceback(error).splitlines()))
        if not (terminal.mode.json and _write_json(terminal, as_json(translated, path))):
            terminal.write_error(*lines(translated))
    return translated.exit_code


def _write_json(terminal: Terminal, content: dict[str, Any]) -> bool:
    """Write an error as JSON, and return whether that worked: the standard output may be the cause of the error."""
    try:
        terminal.write_json({"error": content})
    except OutputError:
        return False
    return True


def lines(error: KirschError) -> list[Line]:
    """Return the lines on an error: what, why and fix, each with a label; further lines of a text are indented."""
    word, tone = ("stopped", "warning") if isinstance(error, Stopped) else ("error", "bad")
    result: list[Line] = []
    for label, label_tone, sentence in (
        (word, tone, error.what),
        ("why", "faint", error.why),
        ("fix", "faint", error.fix),
    ):
        first, *rest = sentence.split("\n")
        if sentence:
            result.append([Piece(f"{label:<8}", label_tone), Piece(first)])
            result += [[Piece(f"{'':8}{text}")] for text in rest]
    return result


def as_json(error: KirschError, traceback_path: Path | None = None) -> dict[str, Any]:
    """Return an error as JSON values."""
    return {
        "type": type(error).__name__,
        "what": error.what,
        "why": error.why,
        "fix": error.fix,
        "exit_code": error.exit_code,
        "traceback": None if traceback_path is None else str(traceback_path),
    }


def _bug(error: BaseException, path: Path | None) -> KirschError:
    return KirschError(
        f"A bug of Kirsch: {error_text(error)}",
        f"The traceback is in {path}." if path else "The traceback could not be written to a file.",
        "Report the bug with its traceback; --debug shows the traceback here.",
    )


def _store_traceback(error: BaseException, folder: Path | None) -> Path | None:
    """Write the traceback to the run folder, or to a temporary file; None if neither can be written."""
    content = _traceback(error)
    if folder is not None:
        try:
            write_text(folder / TRACEBACK, content)
        except OutputError:
            pass  # the folder may be the cause of the error
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
    return text.encode(errors="backslashreplace").decode()  # a path may have bytes that are not text
