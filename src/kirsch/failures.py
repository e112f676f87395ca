"""Errors that Kirsch did not raise: a lack of memory, the machine, or code of the user that fails.

`translated` says which of them an exception is. What is none of them is a bug of Kirsch.
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

from kirsch.errors import KirschError, MemoryShortageError, ModelError, OutputError, SurroundingsError, said

if TYPE_CHECKING:
    from collections.abc import Iterator

OWN = str(Path(__file__).parent) + os.sep
LIBRARY = sysconfig.get_path("stdlib") + os.sep
PACKAGE = re.compile(r"[/\\](?:site|dist)-packages[/\\](\w+)")

RUNTIMES = ("torch", "numpy", "scipy", "onnxruntime", "onnx", "onnxscript", "accelerate", "safetensors")
"""Packages that run a model for Kirsch: an exception from them is the model's fault only if they ran its forward."""

MEMORY = re.compile(
    "can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc|bad allocation|"
    "failed to allocate|unable to allocate|ALLOC_FAILED|Storage size calculation overflowed|"
    "failed to map segment|array is too big",
    re.IGNORECASE,
)
"""How PyTorch, CUDA, numpy, C++ and ONNX Runtime word that memory is lacking."""

MACHINE = {
    errno.ENOSPC: "Free space on the disk, or choose a folder on another one.",
    errno.EDQUOT: "Free space within your quota, or choose another folder.",
    errno.EROFS: "Choose a folder on a disk that can be written.",
    errno.EIO: "Check the disk.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 4096.",
    errno.ENFILE: "Close other programs: the machine has no file left to open.",
}
"""Numbers of operating system errors that no code is to blame for, with what to do."""

TEXTS = {
    errno.ENOSPC: re.compile("No space left on device|StorageFull"),
    errno.EMFILE: re.compile("Too many open files"),
}
"""How libraries that raise no OSError word them."""

IN_WORKER = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)')
"""A frame in the text of an exception that a worker process passed on."""


def translated(error: BaseException, doing: str = "", lower: str = "") -> KirschError | None:
    """The error to raise in place of an exception; None where the exception is a bug of Kirsch.

    Args:
        error: any exception.
        doing: what Kirsch was doing, such as "in the stage 'teacher'".
        lower: the number to lower where memory is lacking, as a sentence.
    """
    short = next((cause for cause in _causes(error) if lacks_memory(cause)), None)
    if short is not None and not isinstance(error, MemoryShortageError):
        return MemoryShortageError(
            f"The memory does not suffice{_after(doing)}.", said(short), lower or "Use a machine with more memory."
        )
    if isinstance(error, KirschError):
        return error
    return _of_machine(error, doing) or _of_user(error, doing) or _of_system(error, doing)


@contextlib.contextmanager
def during(doing: str, lower: str = "") -> Iterator[None]:
    """Raise an error of Kirsch for what other code raises within the block; see `translated`."""
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # sys.exit in a forward is an error, too
        known = translated(error, doing, lower)
        if known is None or known is error:
            raise
        raise known from error


def place(error: BaseException) -> str:
    """File, line and function of the user's code that raised, as "nets.py:12, in forward"; empty where there is none.

    The innermost frame after the last one of Kirsch counts; code of installed packages only where there is no other.
    """
    frames = [(frame.filename, frame.lineno, frame.name) for frame in extract_tb(error.__traceback__)]
    last = max((number for number, frame in enumerate(frames) if frame[0].startswith(OWN)), default=-1)
    candidates = frames[last + 1 :] + [(file, int(line), name) for file, line, name in IN_WORKER.findall(_text(error))]
    if isinstance(error, SyntaxError) and error.filename:
        candidates.append((error.filename, error.lineno or 0, ""))
    foreign = [frame for frame in candidates if _foreign(frame[0])]
    own = [frame for frame in foreign if not PACKAGE.search(frame[0])]
    if not foreign:
        return ""
    file, line, name = (own or foreign)[-1]
    return f"{Path(file).name}:{line}{f', in {name}' if name.isidentifier() else ''}"


def told(error: BaseException) -> str:
    """Type, first line and place of an exception of the user's code, and what it was raised from, in sentences."""
    where = "" if isinstance(error, SyntaxError) else place(error)  # a SyntaxError names its line itself
    sentence = f"{said(error).rstrip('.')} ({where})." if where else said(error)
    *_, root = _causes(error)
    return sentence if root is error else f"{sentence} It was raised from {said(root)}"


def _after(doing: str) -> str:
    return f" {doing}" if doing else ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those that it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is lacking."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    foreign = isinstance(error, Exception) and not isinstance(error, KirschError)
    return foreign and MEMORY.search(_text(error)) is not None


def _of_machine(error: BaseException, doing: str) -> KirschError | None:
    """The error for a full disk and the like, whoever ran into it."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and isinstance(error, Exception):
        number = next((number for number, text in TEXTS.items() if text.search(_text(error))), None)
    if number not in MACHINE:
        return None
    what = f"The work cannot go on{_after(doing)}: {os.strerror(number)}."
    return OutputError(what, said(error), MACHINE[number])


def _of_user(error: BaseException, doing: str) -> KirschError | None:
    """The error for code of the user, or of a model's package, that fails."""
    frames = extract_tb(error.__traceback__)
    last = max((number for number, frame in enumerate(frames) if frame.filename.startswith(OWN)), default=-1)
    ran_model = any("_call_impl" in frame.name for frame in frames[last + 1 :])
    where = place(error)
    if not where and not ran_model:
        return None
    fix = "Repair the code at that place; --debug shows the whole traceback."
    return ModelError(
        f"The code of the model or the data failed{_after(doing)}.",
        told(error),
        fix if where else "Check that the model runs on these inputs: model(*inputs).",
    )


def _of_system(error: BaseException, doing: str) -> KirschError | None:
    """The error for what the operating system refuses, and for warnings and imports that fail in other packages."""
    if isinstance(error, OSError):
        name = f"{os.fsdecode(error.filename)!r} cannot be used" if isinstance(error.filename, str | bytes) else ""
        what = f"{name or 'The operating system refused a request'}{_after(doing)}."
        return SurroundingsError(what, said(error), "Check the path and its permissions.")
    if isinstance(error, Warning):
        return SurroundingsError(
            f"A warning was made an error{_after(doing)}.",
            said(error),
            "Leave out python -W error or PYTHONWARNINGS=error, or warnings.simplefilter in your code.",
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("kirsch"):
        package = f"The package {error.name}" if error.name else "A package"
        fix = "kirsch doctor lists what is installed; install the package anew."
        return SurroundingsError(f"{package} cannot be imported{_after(doing)}.", said(error), fix)
    return None


def _foreign(file: str) -> bool:
    """Whether a file belongs neither to Kirsch, nor to Python, nor to a package that runs models for Kirsch."""
    if file.startswith(OWN) or not Path(file).is_absolute():  # such as "<string>", and what Cython compiled
        return False
    package = PACKAGE.search(file)
    return package[1] not in RUNTIMES if package else not file.startswith(LIBRARY)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the exception is not ours, and so is its __str__
        return ""
