"""The start of the command. It imports nothing that takes long, so that Ctrl-C is answered from the first moment on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

from kirsch.cli.interrupts import INTERRUPTED, end_at_start

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code.

    Args:
        arguments: of the command line, without the name of the program. If left out, those of the process, which then
            belongs to the command: Ctrl-C ends it at once where nothing can be lost.
    """
    whole = arguments is None
    if whole and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # one that is ignored stays ignored
        signal.signal(signal.SIGINT, end_at_start)
    from kirsch.cli.app import run

    code = run(list(sys.argv[1:] if arguments is None else arguments))
    if whole:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """Prepare the end of the process: its result is written, and nothing follows it on the standard output."""
    from kirsch.cli.streams import redirect_stdout

    if "--json" in sys.argv:  # the model's code may still write something
        redirect_stdout()
        sys.stdout = sys.stderr
    if code == INTERRUPTED:
        # Python would end by the signal itself where an import of C code has met it, whatever became of it then.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
