"""All errors that Kirsch raises on purpose.

KirschError                    exit code
├── UsageError                 2     a call, a goal, an option or a recipe is wrong
│   ├── GoalError                    the goal cannot be reached, or is not valid
│   ├── PlanError                    the plan does not fit the model, or is damaged
│   ├── RecipeError                  one or more lines of a recipe are wrong
│   ├── ShapeError                   two arrays do not fit together
│   └── UnknownNameError             no registry entry, module or group has this name
├── LoadError                  4     a model, data or checkpoint cannot be loaded
│   ├── ModelError                   the model cannot be built, copied or traced
│   ├── DataError                    the data is empty, damaged or out of range
│   ├── CheckpointError              there is no valid checkpoint
│   └── StoreError                   a store of teacher outputs is partial, stale or damaged
├── RequirementError           5     something outside the model is missing
│   ├── MissingExtraError            an optional package is not installed
│   ├── MemoryShortageError          the memory is not sufficient
│   └── OutputError                  the output folder cannot be written
├── NumericError               6     a numerical failure: NaN, constant outputs
│   └── VerificationError            the pruned model does not equal the masked original
└── Stopped                          the run was asked to stop; a checkpoint is saved
    ├── Preempted              75    by SIGTERM or SIGHUP
    └── Interrupted            130   by SIGINT
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_MESSAGE_LENGTH = 400
"""Largest number of characters that are repeated from the message of another error."""


NOT_REACHED = 3
"""Exit code of a command that ends without an error, while a goal is missed or the verified run is not finished."""


class KirschError(Exception):
    """Base class of the errors that Kirsch raises on purpose.

    Args:
        what: the problem, with the name of the object.
        why: the reason; may be empty.
        fix: what the user should do; may be empty.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(" ".join(part for part in (what, why, fix) if part))
        self.what = what
        self.why = why
        self.fix = fix


class UsageError(KirschError):
    """A call, a goal, an option or a recipe is wrong."""

    exit_code = 2


class GoalError(UsageError):
    """The goal cannot be reached, or is not valid."""


class PlanError(UsageError):
    """The plan does not fit the model, or is damaged."""


class RecipeError(UsageError):
    """One or more lines of a recipe are wrong."""


class ShapeError(UsageError):
    """Two arrays do not fit together."""


class UnknownNameError(UsageError):
    """No registry entry, module or group has this name.

    Args:
        kind: kind of the named object, such as "importance".
        name: the unknown name.
        known: the known names.
        most: number of known names that the message lists.
        argument: the argument that contains the name, such as "exclude".
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], most: int = 12, argument: str = "") -> None:
        names = sorted(known)
        fix = nearest(name, names) or ("Give one of these." if names else "Leave it out.")
        what = f"`{argument}` names the {kind} {name!r}, which does not exist." if argument else ""
        super().__init__(what or f"There is no {kind} {name!r}.", listing(names, most), fix)
        self.name = name


class LoadError(KirschError):
    """A model, data or checkpoint cannot be loaded."""

    exit_code = 4


class ModelError(LoadError):
    """The model cannot be built, copied or traced."""


class DataError(LoadError):
    """The data is empty, damaged or out of range."""


class CheckpointError(LoadError):
    """There is no valid checkpoint."""


class StoreError(LoadError):
    """A store of teacher outputs is partial, stale or damaged."""


class RequirementError(KirschError):
    """Something outside the model is missing."""

    exit_code = 5


class MissingExtraError(RequirementError):
    """An optional package is not installed.

    Args:
        package: the package that could not be imported.
        extra: the extra of Kirsch that installs it.
        purpose: what it is needed for, such as "to export to ONNX".
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"The package {package!r} is not installed.",
            f"It is needed {purpose}.",
            f'Run: pip install "kirsch[{extra}]"',
        )


class MemoryShortageError(RequirementError):
    """The memory is not sufficient."""


class OutputError(RequirementError):
    """The output folder cannot be written."""


class NumericError(KirschError):
    """A numerical failure: NaN, constant outputs."""

    exit_code = 6


class VerificationError(NumericError):
    """The pruned model does not equal the masked original."""


class Stopped(KirschError):  # noqa: N818 - not a failure: the user or the machine asked for it
    """The run was asked to stop; a checkpoint is saved."""


class Preempted(Stopped):
    """Stopped by SIGTERM or SIGHUP."""

    exit_code = 75


class Interrupted(Stopped):
    """Stopped by SIGINT."""

    exit_code = 130


def error_text(error: BaseException) -> str:
    """Return the type and the first line of an error from other code, as one sentence."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - a foreign __str__ may raise anything
        text = ""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if not first:
        return f"{type(error).__name__} without a message."
    shown = first if len(first) <= MAX_MESSAGE_LENGTH else f"{first[:MAX_MESSAGE_LENGTH]}…"
    return f"{type(error).__name__}: {shown.rstrip('.')}."


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the known name closest to `name`; empty if none is close.

    A name that contains a known name as a word is close, too, and so is the beginning of a known name: "attention head"
    suggests "head", and "onnx" suggests "onnxruntime".
    """
    names = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), names, n=1)
    words = re.split(r"[\s_-]+", name.lower())
    close = close or [other for other in names if other in words or (name and other.startswith(name.lower()))]
    return f"Did you mean {names[close[0]]!r}?" if close else ""


def listing(names: list[str], most: int = 12) -> str:
    """Return a sentence that lists the known names: the first `most`, and the number of the others."""
    if not names:
        return "No names are known."
    shown = ", ".join(names[:most])
    return f"Known: {shown}, and {len(names) - most} more." if len(names) > most else f"Known: {shown}."


def name_of(value: object) -> str:
    """Return the module and name of a function or class; for any other value, those of its class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
