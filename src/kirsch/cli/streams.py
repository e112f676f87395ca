"""The standard streams of the process: present, able to take any text, and with --json kept for the one result."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

STDOUT, STDERR = 1, 2
"""Numbers of the file descriptors."""


def prepare_streams() -> None:
    """Make the standard streams able to take any text: present, and with a way to write what they cannot encode."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us; a file of ours must not get its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - for the whole process
        with contextlib.suppress(AttributeError, ValueError):
            getattr(sys, name).reconfigure(errors="surrogateescape" if name == "stdin" else "backslashreplace")


def forsake_stdout() -> None:
    """Send the rest of the standard output nowhere, so that Python does not complain about it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def stdout_for_result() -> Iterator[TextIO]:
    """The standard output, to which nothing but what is written to the stream that is yielded goes.

    As long as the block runs, everything else that is written to the standard output goes to the standard error:
    what Python code prints, what C code writes, and what child processes write.
    """
    own, kept = sys.stdout, _duplicate(STDOUT)
    result = own
    try:
        if kept is not None and _number(own) == STDOUT:
            result = os.fdopen(os.dup(kept), "w", encoding=own.encoding, errors="backslashreplace")
        sys.stdout = sys.stderr
        own.flush()
        redirect_stdout()
        yield result
    finally:
        _flush(own)
        _flush_c()
        sys.stdout = own
        if kept is not None:
            os.dup2(kept, STDOUT)
            os.close(kept)
        if result is not own:
            with contextlib.suppress(OSError, ValueError):  # its reader has gone
                result.close()


def redirect_stdout() -> None:
    """Let the file descriptor of the standard output lead to the standard error, or nowhere where that is closed."""
    try:
        os.dup2(STDERR, STDOUT)
    except OSError:
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != STDOUT:
                os.dup2(nowhere, STDOUT)
                os.close(nowhere)


def _duplicate(number: int) -> int | None:
    try:
        return os.dup(number)
    except OSError:  # closed
        return None


def _number(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _flush(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.flush()


def _flush_c() -> None:
    """Write out what C code has printed and its library still holds."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)
