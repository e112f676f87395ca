"""How a verb ends when it fails: three lines, an exit code, and a traceback where it can be found again."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.cli.terminal import Line, Piece
from kirsch.errors import KirschError, LoadError, NumericError, OutputError, Stopped
from kirsch.files import write_text

if TYPE_CHECKING:
    from kirsch.cli.terminal import Terminal

TRACEBACK = "error.txt"
RUN = "run.json"
"""What makes a folder that of a run."""


def tell(error: BaseException, terminal: Terminal, folder: Path | None = None) -> int:
    """Say what went wrong, as three lines on the standard error or as JSON on the standard output.

    Args:
        error: anything that a verb raised. What Kirsch did not raise on purpose is a bug of ours.
        terminal: where to write.
        folder: of the run, if there is one; a traceback goes there.

    Returns:
        The exit code.
    """
    if folder is not None and not (folder / RUN).is_file():
        folder = None  # a folder that was refused is not ours to write to
    kept = None
    if not isinstance(error, KirschError):
        kept = _keep_traceback(error, folder)
        known = _bug(error, kept)
    else:
        known = error
        if folder is not None and isinstance(error, (LoadError, NumericError)):
            kept = _keep_traceback(error, folder)
    if terminal.mode.debug:
        sys.stderr.write(_traceback(error))
    if terminal.mode.json:
        terminal.give({"error": as_json(known, kept)})
    else:
        terminal.complain(*lines(known))
    return known.exit_code


def lines(error: KirschError) -> list[Line]:
    """What happened, why, and what to do, each with its word; a sentence that breaks goes on below itself."""
    word, tone = ("stopped", "doubt") if isinstance(error, Stopped) else ("error", "bad")
    said: list[Line] = []
    for head, shown, sentence in ((word, tone, error.what), ("why", "faint", error.why), ("do", "faint", error.mend)):
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
        "mend": error.mend,
        "exit_code": error.exit_code,
        "traceback": None if kept is None else str(kept),
    }


def _bug(error: BaseException, kept: Path | None) -> KirschError:
    text = str(error).strip().split("\n")[0]
    return KirschError(
        f"A bug of ours: {type(error).__name__}{': ' if text else ''}{text}",
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
