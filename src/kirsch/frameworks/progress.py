"""Progress of a training run that is called from Python."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from kirsch.display import Display, own_display
from kirsch.frameworks.training import TrainingHooks
from kirsch.progress import TrainingProgress

if TYPE_CHECKING:
    from collections.abc import Callable


def shown_on(progress: bool | None) -> Display | None:
    """Return the display for the progress of a call; None if the progress is not shown.

    Args:
        progress: True shows the progress, False does not; None shows it on a terminal and in a notebook. Of several
            processes that are started by `torchrun`, only the first one shows it.
    """
    if progress is False or os.environ.get("RANK", "0") != "0":
        return None
    display = own_display()
    return display if progress or display.is_interactive else None


def with_progress(hooks: TrainingHooks | None, progress: bool | None) -> TrainingHooks:
    """Return hooks that show the progress of a training run and call the given hooks; see `shown_on`.

    If the progress is shown, warnings are printed as lines and are not Python warnings.
    """
    hooks, display = hooks or TrainingHooks(), shown_on(progress)
    if display is None:
        return hooks
    shown = TrainingProgress(display)
    return dataclasses.replace(
        hooks,
        event=_both(shown, hooks.event),
        batch=_both(shown.batch, hooks.batch),
        close=_both(shown.stop, hooks.close),
    )


def _both(first: Callable[..., None], second: Callable[..., None] | None) -> Callable[..., None]:
    """Return a function that calls both functions; the second may be None."""

    def call(*values: Any) -> None:
        first(*values)
        if second is not None:
            second(*values)

    return call
