"""Handling of Ctrl-C: the process ends at once during startup; a running command gets KeyboardInterrupt."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

INTERRUPTED = 130
MESSAGE = "The command was stopped by SIGINT."
LOADERS = tuple(
    os.path.join(*parts)  # noqa: PTH118 - ends of paths
    for parts in (("frameworks", "find.py"), ("recipes", "models.py"), ("kirsch", "references.py"))
)
"""Path endings of the Kirsch files that import frameworks, models and data sources."""
AS_JSON = f'{{"error": {{"type": "Interrupted", "what": "{MESSAGE}", "exit_code": {INTERRUPTED}}}}}\n'


@contextlib.contextmanager
def interruptible(stdout: TextIO) -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within the block, and end the process at once after the block.

    During the import of a framework or of the model's file, Ctrl-C ends the process at once, too, because a
    KeyboardInterrupt in C++ code of the import would abort the process.

    Args:
        stdout: stream for the JSON error, with --json, if Ctrl-C ends the process during an import.
    """
    received = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if _is_importing(frame):
            end_at_start(number, frame, stdout.fileno())
        raise KeyboardInterrupt

    installed = signal.getsignal(signal.SIGINT) is end_at_start
    try:
        if installed:
            signal.signal(signal.SIGINT, interrupt)
        yield
    except Exception:
        if received:  # C code of an import may replace the KeyboardInterrupt
            raise KeyboardInterrupt from None
        raise
    finally:
        if installed:
            signal.signal(signal.SIGINT, _end)


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a frame belongs to the import of a framework or of the model's file."""
    files = []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    return any(file.startswith("<frozen importlib") for file in files) and any(file.endswith(LOADERS) for file in files)


def end_at_start(_number: int, _frame: FrameType | None, stdout: int = 1) -> None:
    """End the process during startup, when nothing needs to be cleaned up."""
    as_json = "--json" in sys.argv
    with contextlib.suppress(OSError):
        os.write(stdout if as_json else 2, (AS_JSON if as_json else f"stopped {MESSAGE}\n").encode())
    os._exit(INTERRUPTED)


def _end(_number: int, _frame: FrameType | None) -> None:
    """End the process after the result is written."""
    os._exit(INTERRUPTED)
