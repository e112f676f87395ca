"""Paths as the command line gives them, checked before any work."""

from __future__ import annotations

import errno
import os
import sys
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
    except ValueError as error:  # NUL, or characters that the file system's encoding lacks
        raise UsageError(f"{called} {shown!r} is not a path.", f"{error}.", "Give another name.") from error
    except OSError as error:
        if error.errno in IMPOSSIBLE:
            raise UsageError(
                f"{called} {shown!r} is not a path that a file can have.", f"{error.strerror}.", "Give a shorter name."
            ) from error
