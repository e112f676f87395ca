"""Paths as the command line gives them, checked before any work."""

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
"""Name of an option that holds a path, or a reference that may begin with one → how the command line calls it."""

SHOWN = 60
"""Characters of a path that an error repeats."""

IMPOSSIBLE = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
NAME_MAX = 255
"""Bytes of a name that the usual file systems allow."""


def check_paths(options: Mapping[str, Any]) -> None:
    """Refuse paths that no file can have.

    Args:
        options: of a verb, by the names of its parameters.

    Raises:
        UsageError: names the option and what is wrong.
    """
    for name, called in PATHS.items():
        text = options.get(name)
        if isinstance(text, str) and text:
            _check(text.rpartition(":")[0] or text if name in ("model", "data") else text, called)


def _check(text: str, called: str) -> None:
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"
    if not text.isprintable() and any(0xD800 <= ord(char) <= 0xDFFF for char in text):  # noqa: PLR2004 - surrogates
        raise UsageError(
            f"{called} {shown!a} is not valid text.",
            f"Its bytes are not {sys.getfilesystemencoding()}; PyTorch and ONNX Runtime cannot open such a file.",
            "Rename it, or set PYTHONUTF8=1 where the name is UTF-8 and the locale is not.",
        )
    try:
        os.lstat(text)
        long = False
    except ValueError as error:  # NUL, or characters that the file system's encoding lacks
        raise UsageError(f"{called} {shown!r} is not a path.", f"{error}.", "Give another name.") from error
    except OSError as error:
        # Where a folder on the way does not exist yet, the system has not looked at the rest.
        long = error.errno in IMPOSSIBLE or any(len(os.fsencode(part)) > NAME_MAX for part in Path(text).parts)
    if long:
        what = f"{called} {shown!r} is not a path that a file can have."
        raise UsageError(what, f"{os.strerror(errno.ENAMETOOLONG)}.", "Give a shorter name.")
