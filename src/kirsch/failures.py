"""Conversion of exceptions that other code raises: lack of memory, failures of the machine, errors in the user's code.

`translate` returns the Kirsch error for such an exception. Any other exception is a bug of Kirsch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sysconfig
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING

from kirsch.errors import KirschError, MemoryShortageError, ModelError, OutputError, RequirementError, error_text

if TYPE_CHECKING:
    from collections.abc import Iterator

KIRSCH_FOLDER = str(Path(__file__).parent) + os.sep
STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
INSTALLED_PACKAGE = re.compile(r"[/\\](?:site|dist)-packages[/\\](\w+)")

RUNTIMES = ("torch", "numpy", "scipy", "onnxruntime", "onnx", "onnxscript", "accelerate", "safetensors")
"""Packages that run models for Kirsch. Their exceptions are errors of the model only if the model's `forward` was
running."""

MEMORY_MESSAGES = re.compile(
    "can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc|bad allocation|"
    "failed to allocate|unable to allocate|ALLOC_FAILED|Storage size calculation overflowed|"
    "failed to map segment|array is too big",
    re.IGNORECASE,
)
"""Messages of PyTorch, CUDA, numpy, C++ and ONNX Runtime about a lack of memory."""

MACHINE_FIXES = {
    errno.ENOSPC: "Free space on the disk, or choose a folder on another one.",
    errno.EDQUOT: "Free space within your quota, or choose another folder.",
    errno.EROFS: "Choose a folder on a disk that can be written.",
    errno.EIO: "Check the disk.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 4096.",
    errno.ENFILE: "Close other programs: the machine cannot open more files.",
}
"""Fix of each operating system error whose cause is not in the code that was running, such as a full disk."""

MACHINE_MESSAGES = {
    errno.ENOSPC: re.compile("No space left on device|StorageFull"),
    errno.EMFILE: re.compile("Too many open files"),
}
"""Messages of libraries that do not raise OSError for these errors."""

WORKER_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)')
"""A frame in the text of an exception that a worker process passed on."""


def translate(error: BaseException, doing: str = "", memory_fix: str = "") -> KirschError | None:
    """Return the Kirsch error to raise in place of an exception; None if the exception is a bug of Kirsch.

    Args:
        error: any exception.
        doing: the activity of Kirsch, such as "in the stage 'teacher'".
        memory_fix: the fix if memory is lacking, as a sentence that names the number to lower.
    """
    shortage = next((cause for cause in _causes(error) if lacks_memory(cause)), None)
    if shortage is not None and not isinstance(error, MemoryShortageError):
        return MemoryShortageError(
            f"The memory is not sufficient{_after(doing)}.",
            error_text(shortage),
            memory_fix or "Use a machine with more memory.",
        )
    if isinstance(error, KirschError):
        return error
    return _machine_error(error, doing) or _user_code_error(error, doing) or _system_error(error, doing)


@contextlib.contextmanager
def during(doing: str, memory_fix: str = "") -> Iterator[None]:
    """Translate the exceptions that other code raises within the block; see `translate`."""
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # sys.exit in the user's code is an error, too
        translated = translate(error, doing, memory_fix)
        if translated is None or translated is error:
            raise
        raise translated from error


def location(error: BaseException) -> str:
    """Return where the user's code raised the exception, as "nets.py:12, in forward"; empty if unknown.

    Of the frames after the last frame of Kirsch, this is the innermost one in the user's own files. If there is none,
    it is the innermost one in an installed package other than `RUNTIMES`.
    """
    frames = [(frame.filename, frame.lineno, frame.name) for frame in extract_tb(error.__traceback__)]
    last = max((number for number, frame in enumerate(frames) if frame[0].startswith(KIRSCH_FOLDER)), default=-1)
    worker_frames = [(file, int(line), name) for file, line, name in WORKER_FRAME.findall(_text(error))]
    candidates = frames[last + 1 :] + worker_frames
    if isinstance(error, SyntaxError) and error.filename:
        candidates.append((error.filename, error.lineno or 0, ""))
    foreign = [frame for frame in candidates if _is_user_file(frame[0])]
    user_written = [frame for frame in foreign if not INSTALLED_PACKAGE.search(frame[0])]
    if not foreign:
        return ""
    file, line, name = (user_written or foreign)[-1]
    return f"{Path(file).name}:{line}{f', in {name}' if name.isidentifier() else ''}"


def error_with_location(error: BaseException) -> str:
    """Return type, first line, location and root cause of an exception of the user's code, in sentences."""
    where = "" if isinstance(error, SyntaxError) else location(error)  # the message of a SyntaxError names its line
    sentence = f"{error_text(error).rstrip('.')} ({where})." if where else error_text(error)
    *_, root = _causes(error)
    return sentence if root is error else f"{sentence} It was raised from {error_text(root)}"


def _after(doing: str) -> str:
    return f" {doing}" if doing else ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the exception and the chain of its causes."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def lacks_memory(error: BaseException) -> bool:
    """Return whether an exception reports a lack of memory."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    foreign = isinstance(error, Exception) and not isinstance(error, KirschError)
    return foreign and MEMORY_MESSAGES.search(_text(error)) is not None


def _machine_error(error: BaseException, doing: str) -> KirschError | None:
    """Return the error for a failure in `MACHINE_FIXES`, such as a full disk, whichever code was running."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and isinstance(error, Exception):
        number = next((number for number, text in MACHINE_MESSAGES.items() if text.search(_text(error))), None)
    if number not in MACHINE_FIXES:
        return None
    what = f"The work cannot continue{_after(doing)}: {os.strerror(number)}."
    return OutputError(what, error_text(error), MACHINE_FIXES[number])


def _user_code_error(error: BaseException, doing: str) -> KirschError | None:
    """Return the error for a failure in the user's code or in the package of a model."""
    frames = extract_tb(error.__traceback__)
    last = max((number for number, frame in enumerate(frames) if frame.filename.startswith(KIRSCH_FOLDER)), default=-1)
    ran_model = any("_call_impl" in frame.name for frame in frames[last + 1 :])
    where = location(error)
    if not where and not ran_model:
        return None
    fix = "Repair the code at that line; --debug shows the full traceback."
    return ModelError(
        f"The code of the model or the data failed{_after(doing)}.",
        error_with_location(error),
        fix if where else "Check that the model runs on these inputs: model(*inputs).",
    )


def _system_error(error: BaseException, doing: str) -> KirschError | None:
    """Return the error for a refused request to the operating system, a warning raised as an error, or a failed import.

    A failed import of a module of Kirsch is a bug, for which None is returned.
    """
    if isinstance(error, OSError):
        name = f"{os.fsdecode(error.filename)!r} cannot be used" if isinstance(error.filename, str | bytes) else ""
        what = f"{name or 'The operating system refused a request'}{_after(doing)}."
        return RequirementError(what, error_text(error), "Check the path and its permissions.")
    if isinstance(error, Warning):
        return RequirementError(
            f"A warning was raised as an error{_after(doing)}.",
            error_text(error),
            "Remove python -W error, PYTHONWARNINGS=error, or warnings.simplefilter in your code.",
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("kirsch"):
        package = f"The package {error.name}" if error.name else "A package"
        fix = "kirsch doctor lists what is installed; reinstall the package."
        return RequirementError(f"{package} cannot be imported{_after(doing)}.", error_text(error), fix)
    return None


def _is_user_file(file: str) -> bool:
    """Return whether a file belongs neither to Kirsch, nor to Python, nor to a package that runs models for Kirsch."""
    if file.startswith(KIRSCH_FOLDER) or not Path(file).is_absolute():  # such as "<string>", and compiled Cython
        return False
    package = INSTALLED_PACKAGE.search(file)
    return package[1] not in RUNTIMES if package else not file.startswith(STANDARD_LIBRARY)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a foreign __str__ may raise anything
        return ""
