"""Checks of the paths on the command line, before any work."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

PATHS = {
    "recipe": "RECIPE",
    "run": "RUN",
    "file": "FILE",
    "folder": "FOLDER",
    "output": "--output",
    "plan_file": "--plan",
    "pruned": "--pruned",
    "weights": "--weights",
    "model": "MODEL",
    "data": "--data",
}
"""Name on the command line of each parameter that is a path, or a reference such as file.py:callable."""

MAX_SHOWN_LENGTH = 60
"""Largest number of characters of a path that an error shows."""

IMPOSSIBLE = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
"""Errors of the system for a path that no file can have."""
NAME_MAX = 255
"""Largest length of a name in bytes on usual file systems."""


def check_paths(options: Mapping[str, Any]) -> None:
    """Raise an error for a path that no file can have.

    Args:
        options: values of the options of a subcommand, by parameter name.

    Raises:
        UsageError: no file can have the path; the message names the option.
    """
    for name, option in PATHS.items():
        text = options.get(name)
        if isinstance(text, str) and text:
            _check(text.rpartition(":")[0] or text if name in ("model", "data") else text, option)


def _check(text: str, option: str) -> None:
    shown = text if len(text) <= MAX_SHOWN_LENGTH else f"{text[:MAX_SHOWN_LENGTH]}… ({len(text)} characters)"
    if not text.isprintable() and any(0xD800 <= ord(char) <= 0xDFFF for char in text):  # noqa: PLR2004 - surrogates
        raise UsageError(
            f"{option} {shown!a} is not valid text.",
            f"Its bytes are not {sys.getfilesystemencoding()}; PyTorch and ONNX Runtime cannot open such a file.",
            "Rename the file, or set PYTHONUTF8=1 if the name is UTF-8 and the locale is not.",
        )
    number: int | None = None
    try:
        os.lstat(text)
    except ValueError as error:  # NUL, or characters outside the encoding of the file system
        raise UsageError(f"{option} {shown!r} is not a path.", f"{error}.", "Give another name.") from error
    except OSError as error:
        # If a parent folder does not exist yet, the system has not checked the rest of the path.
        too_long = any(len(os.fsencode(part)) > NAME_MAX for part in Path(text).parts)
        number = errno.ENAMETOOLONG if too_long else error.errno
    if number in IMPOSSIBLE:
        fix = "Give a shorter name." if number == errno.ENAMETOOLONG else "Give another name."
        raise UsageError(f"{option} {shown!r} is not a possible path.", f"{os.strerror(number)}.", fix)
