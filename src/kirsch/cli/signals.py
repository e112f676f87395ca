"""Stop requests by signals: the first signal lets the run save a checkpoint, the second ends the process at once."""

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

ERRORS: dict[str, type[Stopped]] = {"SIGINT": Interrupted, "SIGTERM": Preempted, "SIGHUP": Preempted}
"""Error for each signal, by name. Some systems do not have all of these signals."""


class Stop:
    """Stop request. A call returns the error that ends the run, or None.

    Args:
        folder: folder of the run, named in the error.
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
        """Return the error that ends the run; None as long as no signal was received."""
        return self._error

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """Handle a signal; see `signal.signal`."""
        name = signal.Signals(number).name
        kind = ERRORS[name]
        if self._error is not None:
            self._at_once()
            self._end(kind.exit_code)
        self._error = kind(
            f"The run {self._folder} was stopped by {name}.",
            "All finished steps are saved.",
            f"Continue with: kirsch resume {shlex.quote(str(self._folder))}",
        )


@contextlib.contextmanager
def stop_on_signals(folder: Path, at_once: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """Yield a `Stop` that receives the signals during the block.

    Ignored signals stay ignored, as `nohup` and shells with background processes expect.
    """
    stop = Stop(folder, at_once)
    numbers = [getattr(signal, name) for name in ERRORS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    handled = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in handled:
        signal.signal(number, stop.receive)
    try:
        yield stop
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
