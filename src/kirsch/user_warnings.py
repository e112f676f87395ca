"""Warnings that show the line of the user's code, not a line of Kirsch."""

from __future__ import annotations

import inspect
import warnings


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Emit a warning that points to the innermost line of code outside the package."""
    frame = inspect.currentframe()
    level = 0
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "kirsch":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level + 1)
