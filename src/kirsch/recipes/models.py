"""Models by reference: `package.module:callable`, `file.py:callable`, `timm:NAME`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.errors import LoadError, ModelError, UnknownNameError, UsageError
from kirsch.frameworks.port import framework_of, pytorch

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


FAILURES = (Exception, SystemExit)
"""What a user's file may raise; one that is also a script may call sys.exit, and that code is no exit code of ours."""


def build(reference: str, *, base: Path | None = None, seed: int = 0, weights: str = "random") -> Any:
    """The model that a reference names.

    Args:
        reference: "package.module:callable", "file.py:callable" or "timm:NAME". The callable takes no arguments and
            gives the model, with its weights if it has any.
        base: folder that files are relative to; the working folder if left out.
        seed: of random initial weights.
        weights: of timm models: "random", "pretrained" (downloaded by timm), or a safetensors file.

    Raises:
        UsageError: the reference has another form.
        LoadError: there is no such file, module, callable or model.
        ModelError: the callable fails, or gives something that is no model.
    """
    kind, colon, name = reference.rpartition(":")
    if not colon or not kind or not name:
        raise UsageError(
            f"{reference!r} names no model.",
            "Its form is package.module:callable, file.py:callable or timm:NAME.",
            "For example timm:resnet18.",
        )
    if kind == "timm":
        from_file = weights not in ("random", "pretrained")
        model = pytorch().seeded(lambda: pytorch().from_hub("timm", name, pretrained=weights == "pretrained"), seed)
        if from_file:
            pytorch().load_weights(model, Path(weights))
        return model
    maker = resolve(reference, base=base)
    try:
        model = pytorch().seeded(maker, seed)
    except LoadError:
        raise
    except FAILURES as error:
        raise ModelError(f"{reference} failed.", f"{type(error).__name__}: {error}.", "Mend the callable.") from error
    framework_of(model)  # something that is no model is named here
    return model


def resolve(reference: str, *, base: Path | None = None) -> Callable[[], Any]:
    """The callable that a reference names, by module or file."""
    kind, _, name = reference.rpartition(":")
    module = _from_file((base or Path()) / kind) if kind.endswith(".py") else _module(kind)
    if not callable(getattr(module, name, None)):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        unknown = UnknownNameError(f"callable of {kind} named", name, public)
        raise LoadError(unknown.what, unknown.why, unknown.mend)
    found: Callable[[], Any] = getattr(module, name)
    return found


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LoadError(
            f"The module {name!r} cannot be imported.", f"{error}.", "Install it, or give a file: file.py:callable."
        ) from error
    except FAILURES as error:
        raise LoadError(f"The module {name!r} fails.", f"{type(error).__name__}: {error}.", "Mend it.") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise LoadError(f"The file {path} does not exist.", mend="Check the path; it is relative to the recipe.")
    # A name of its own for each path and content: two files called model.py are two modules, and a file that was
    # changed since it was loaded is another one, so that what runs is what `source_hash` is of.
    identity = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes())
    name = f"kirsch_user_{path.stem}_{identity.hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"The file {path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))  # so that it can import its neighbors
    try:
        spec.loader.exec_module(module)
    except FAILURES as error:
        del sys.modules[name]
        raise LoadError(f"The file {path} fails.", f"{type(error).__name__}: {error}.", "Mend it.") from error
    finally:
        sys.path.pop(0)
    return module


def source_hash(reference: str, *, base: Path | None = None) -> str:
    """A hash that changes when the file behind a reference changes; the reference itself for anything else."""
    kind = reference.rpartition(":")[0]
    path = (base or Path()) / kind
    return hashlib.sha256(path.read_bytes()).hexdigest() if kind.endswith(".py") and path.is_file() else reference


def example_shape(reference: str, model: Any, *, base: Path | None = None) -> tuple[int, ...] | None:
    """The shape of one sample batch, if the model says: `example_shape` on model or callable, or timm's default."""
    stated = getattr(model, "example_shape", None)
    if stated is None and not reference.startswith("timm:"):
        stated = getattr(resolve(reference, base=base), "example_shape", None)
    if stated is None and isinstance(getattr(model, "default_cfg", None), dict) and "input_size" in model.default_cfg:
        stated = (1, *model.default_cfg["input_size"])
    return tuple(int(size) for size in stated) if stated else None
