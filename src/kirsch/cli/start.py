"""The start of the command. It imports nothing that takes long, so that Ctrl-C is answered from the first moment on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

INTERRUPTED = 130
WHAT = "The command was stopped by SIGINT."
AS_JSON = f'{{"error": {{"type": "Interrupted", "what": "{WHAT}", "exit_code": {INTERRUPTED}}}}}\n'


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code.

    Args:
        arguments: of the command line, without the name of the program. If left out, those of the process, which then
            belongs to the command: it ends at once where nothing can be lost.
    """
    whole = arguments is None
    if whole and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # one that is ignored stays ignored
        signal.signal(signal.SIGINT, _end_at_start)
    from kirsch.cli.app import run

    if whole and signal.getsignal(signal.SIGINT) is _end_at_start:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run(list(sys.argv[1:] if arguments is None else arguments))
    finally:
        if whole and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end)
        if whole and "--json" in sys.argv:
            _leave_stdout()


def _end_at_start(_number: int, _frame: FrameType | None) -> None:
    """End the process, before anything that would have to be put in order is at work."""
    as_json = "--json" in sys.argv
    with contextlib.suppress(OSError):
        os.write(1 if as_json else 2, (AS_JSON if as_json else f"stopped {WHAT}\n").encode())
    os._exit(INTERRUPTED)


def _end(_number: int, _frame: FrameType | None) -> None:
    """End the process, whose result is written."""
    os._exit(INTERRUPTED)


def _leave_stdout() -> None:
    """What the model's code writes while the process ends does not follow the result on the standard output."""
    from kirsch.cli.streams import redirect_stdout

    redirect_stdout()
    sys.stdout = sys.stderr
