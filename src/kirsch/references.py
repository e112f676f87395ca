"""Load the callable that a reference in a recipe or on the command line names.

A reference has the form `package.module:callable` or `file.py:callable`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.errors import KirschError, LoadError, UnknownNameError, error_text
from kirsch.failures import error_with_location

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

FAILURES = (Exception, SystemExit)
"""Exceptions that a user's file may raise. A script may call sys.exit, and Kirsch must not end with the
exit code of the script."""


def is_valid_text(name: Any) -> bool:
    """Return whether a value is a string that UTF-8 can encode; lone surrogates cannot be encoded."""
    return isinstance(name, str) and name.encode(errors="replace").decode() == name


@contextlib.contextmanager
def preserved_process_state() -> Iterator[None]:
    """Restore the working folder and the warning filters after code of the user has run."""
    folder = Path.cwd()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.chdir(folder)


def resolve(reference: str, *, base: Path | None = None) -> Callable[[], Any]:
    """Return the callable that a reference names, from a module or a file."""
    kind, _, name = reference.rpartition(":")
    module = _from_file((base or Path()) / kind) if kind.endswith(".py") else _module(kind)
    if not callable(getattr(module, name, None)):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        unknown = UnknownNameError(f"callable of {kind} named", name, public)
        raise LoadError(unknown.what, unknown.why, unknown.fix)
    maker: Callable[[], Any] = getattr(module, name)
    return maker


def _module(name: str) -> ModuleType:
    try:
        with preserved_process_state():
            return importlib.import_module(name)
    except KirschError:
        raise
    except ModuleNotFoundError as error:
        raise LoadError(
            f"The module {name!r} cannot be imported.", f"{error}.", "Install it, or give a file: file.py:callable."
        ) from error
    except FAILURES as error:
        raise LoadError(f"The module {name!r} fails.", error_with_location(error), "Fix the module.") from error


def _from_file(path: Path) -> ModuleType:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            what = f"The file {path.name} does not exist in the folder {path.resolve().parent}."
            raise LoadError(what, fix="Check the path.") from error
        raise LoadError(f"The file {path} cannot be read.", error_text(error), "Check the path.") from error
    if not is_valid_text(str(path.resolve())):
        raise LoadError(
            f"The path of the file {str(path.resolve())!r} is not valid text.",
            "PyTorch records the source file of each operation, and cannot read such a path.",
            "Rename the file or folder.",
        )
    # The name depends on path and content: two files called model.py are two modules, and a file that has changed is
    # loaded again, so that the loaded code is the code that `source_hash` describes.
    identity = hashlib.sha256(str(path.resolve()).encode() + content)
    name = f"kirsch_user_{path.stem}_{identity.hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"The file {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    parent = str(path.resolve().parent)
    sys.path.insert(0, parent)  # the file may import modules beside it
    try:
        with preserved_process_state():
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KirschError) or not isinstance(error, FAILURES):
            raise
        raise LoadError(f"The file {path} fails.", error_with_location(error), "Fix the file.") from error
    finally:
        with contextlib.suppress(ValueError):  # the file may have removed the entry
            sys.path.remove(parent)
    return module


def source_hash(reference: str, *, base: Path | None = None) -> str:
    """Return a hash of the file that a reference names; for other references, the reference itself."""
    kind = reference.rpartition(":")[0]
    path = (base or Path()) / kind
    is_file = kind.endswith(".py") and os.path.isfile(path)  # noqa: PTH113 - false for a name that no file can have
    return hashlib.sha256(path.read_bytes()).hexdigest() if is_file else reference
