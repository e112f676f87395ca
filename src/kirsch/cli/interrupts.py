"""Ctrl-C: it ends the process at once at the start, and raises KeyboardInterrupt while a command runs."""

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
WHAT = "The command was stopped by SIGINT."
LOADERS = (os.path.join("frameworks", "port.py"), os.path.join("recipes", "models.py"))  # noqa: PTH118 - ends of paths
"""Files of Kirsch that import what other people wrote."""
AS_JSON = f'{{"error": {{"type": "Interrupted", "what": "{WHAT}", "exit_code": {INTERRUPTED}}}}}\n'


@contextlib.contextmanager
def interruptible(stdout: TextIO) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt within the block, which puts in order what is at work, and ends at once after.

    While a framework or the model's file is being imported it ends at once, too: C++ code, which then runs, aborts the
    process where it meets the exception.

    Args:
        stdout: where a result in JSON goes.
    """
    received = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if _imports(frame):
            end_at_start(number, frame, stdout.fileno())
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGINT) is end_at_start
    try:
        if ours:
            signal.signal(signal.SIGINT, interrupt)
        yield
    except Exception:
        if received:  # what C code makes of the exception where it was met in an import
            raise KeyboardInterrupt from None
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, _end)


def _imports(frame: FrameType | None) -> bool:
    """Whether a frame belongs to the import of a framework or of the model's file."""
    files = []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    return any(file.startswith("<frozen importlib") for file in files) and any(file.endswith(LOADERS) for file in files)


def end_at_start(_number: int, _frame: FrameType | None, stdout: int = 1) -> None:
    """End the process, before anything that would have to be put in order is at work."""
    as_json = "--json" in sys.argv
    with contextlib.suppress(OSError):
        os.write(stdout if as_json else 2, (AS_JSON if as_json else f"stopped {WHAT}\n").encode())
    os._exit(INTERRUPTED)


def _end(_number: int, _frame: FrameType | None) -> None:
    """End the process, whose result is written."""
    os._exit(INTERRUPTED)
