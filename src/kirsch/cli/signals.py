"""Being asked to stop: the first signal lets the work save a checkpoint, a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from typing import TYPE_CHECKING

from kirsch.errors import Interrupted, Preempted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    from kirsch.errors import Stopped

KINDS: dict[str, type[Stopped]] = {"SIGINT": Interrupted, "SIGTERM": Preempted, "SIGHUP": Preempted}
"""Signals by name, since not every system has each."""


class Stop:
    """Whether the work shall stop; calling it gives the error to raise, or None.

    Args:
        folder: of the run, for the sentence on how to go on.
        at_once: called before a second signal ends the process.
        end: ends the process with an exit code.
    """

    def __init__(
        self, folder: Path, at_once: Callable[[], None] = lambda: None, end: Callable[[int], None] = os._exit
    ) -> None:
        self._folder = folder
        self._at_once = at_once
        self._end = end
        self._error: Stopped | None = None

    def __call__(self) -> Stopped | None:
        """The error that ends the work; None as long as nobody has asked."""
        return self._error

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """Take a signal; see `signal.signal`."""
        name = signal.Signals(number).name
        kind = KINDS[name]
        if self._error is not None:
            self._at_once()
            self._end(kind.exit_code)
        self._error = kind(
            f"The run {self._folder} was stopped by {name}.",
            "What is finished is saved.",
            f"Go on with: kirsch resume {shlex.quote(str(self._folder))}",
        )


@contextlib.contextmanager
def watched(folder: Path, at_once: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """Signals are kept in a `Stop` as long as the block runs.

    A signal that is ignored stays ignored: `nohup` and shells that start a process in the background want it so.
    """
    stop = Stop(folder, at_once)
    numbers = [getattr(signal, name) for name in KINDS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    taken = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, stop.receive)
    try:
        yield stop
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
