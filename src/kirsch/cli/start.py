"""Entry point of the command. It imports only small modules, so that Ctrl-C works from the beginning."""

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
    """Run the command, and return the exit code.

    Args:
        arguments: command line without the program name. None: the command line of the process. In this case Ctrl-C
            may end the process at once.
    """
    owns_process = arguments is None
    # An ignored signal stays ignored.
    if owns_process and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_start)
    from kirsch.cli.app import run

    code = run(list(sys.argv[1:] if arguments is None else arguments))
    if owns_process:
        _prepare_exit(code)
    return code


def _prepare_exit(code: int) -> None:
    """Prepare the end of the process, so that nothing follows the result on the standard output."""
    from kirsch.cli.streams import redirect_stdout

    if "--json" in sys.argv:  # code of the model may still write
        redirect_stdout()
        sys.stdout = sys.stderr
    if code == INTERRUPTED:
        # If SIGINT arrived in C code during an import, Python would still end by this signal, although it was handled.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
