"""Preparation of the standard streams.

Closed streams are opened, and characters that a stream cannot encode are escaped. With --json, only the result is
written to the standard output.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

STDOUT, STDERR = 1, 2
"""File descriptors."""


def prepare_streams() -> None:
    """Open closed standard streams, and let all of them escape characters that they cannot encode."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process; no other file may get its descriptor
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - for the whole process
        with contextlib.suppress(AttributeError, ValueError):
            getattr(sys, name).reconfigure(errors="surrogateescape" if name == "stdin" else "backslashreplace")


def discard_stdout() -> None:
    """Discard the rest of the standard output, so that Python does not report an error at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def stdout_for_result() -> Iterator[TextIO]:
    """Yield a stream that writes to the standard output, and redirect all other output to the standard error.

    During the block, the output of Python code, C code and child processes is redirected.
    """
    original, duplicate = sys.stdout, _duplicate(STDOUT)
    result = original
    try:
        if duplicate is not None and _descriptor(original) == STDOUT:
            result = os.fdopen(os.dup(duplicate), "w", encoding=original.encoding, errors="backslashreplace")
        sys.stdout = sys.stderr
        original.flush()
        redirect_stdout()
        yield result
    finally:
        _flush(original)
        _flush_c()
        sys.stdout = original
        if duplicate is not None:
            os.dup2(duplicate, STDOUT)
            os.close(duplicate)
        if result is not original:
            with contextlib.suppress(OSError, ValueError):  # the reader has closed the stream
                result.close()


def redirect_stdout() -> None:
    """Redirect the standard output to the standard error, or to the null device if the standard error is closed."""
    try:
        os.dup2(STDERR, STDOUT)
    except OSError:
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            if null != STDOUT:
                os.dup2(null, STDOUT)
                os.close(null)


def _duplicate(descriptor: int) -> int | None:
    try:
        return os.dup(descriptor)
    except OSError:  # the descriptor is closed
        return None


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _flush(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.flush()


def _flush_c() -> None:
    """Flush the output buffers of the C library."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)
