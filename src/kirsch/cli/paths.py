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
"""Parameter with a path, or with a reference that may begin with a path → its name on the command line."""

MAX_SHOWN_LENGTH = 60
"""Characters of a path that an error repeats."""

IMPOSSIBLE = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
NAME_MAX = 255
"""Largest length of a name in bytes on usual file systems."""


def check_paths(options: Mapping[str, Any]) -> None:
    """Refuse impossible paths.

    Args:
        options: of a subcommand, by parameter name.

    Raises:
        UsageError: a path is impossible; the message names the option.
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
            "Rename it, or set PYTHONUTF8=1 where the name is UTF-8 and the locale is not.",
        )
    try:
        os.lstat(text)
        impossible = False
    except ValueError as error:  # NUL, or characters outside the encoding of the file system
        raise UsageError(f"{option} {shown!r} is not a path.", f"{error}.", "Give another name.") from error
    except OSError as error:
        # If a parent folder does not exist yet, the system has not checked the rest of the path.
        impossible = error.errno in IMPOSSIBLE or any(len(os.fsencode(part)) > NAME_MAX for part in Path(text).parts)
    if impossible:
        what = f"{option} {shown!r} is not a possible path."
        raise UsageError(what, f"{os.strerror(errno.ENAMETOOLONG)}.", "Give a shorter name.")
