"""What a callable does, as plain values that a hash can be taken of.

Of a function: its name, the sha256 of its source where that can be had, and what it encloses or has as defaults. Of an
object: the name and the source of its class, and its attributes. Numbers, texts and arrays are taken by value. What a
callable reads from its module is not seen, and of other objects the type alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

OWN = "kirsch."
"""Frozen dataclasses of this package are their name and their fields: their source may become clearer."""


def described(value: Any, within: tuple[Any, ...] = ()) -> Any:
    """A value in JSON's types, equal for callables that do the same by all that can be seen.

    Args:
        value: anything; a model is its class, since its weights have a hash of their own.
        within: the callables that it is held by, so that one which holds itself comes to an end.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [described(part, within) for part in value]
    if isinstance(value, dict):
        return [[described(key, within), described(part, within)] for key, part in value.items()]
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        return {"array": str(array.dtype), "shape": list(array.shape), "sha256": _sha256(array.tobytes())}
    if not callable(value) or hasattr(value, "state_dict") or any(value is other for other in within):
        return {"type": name_of(value)}
    return _of_callable(value, (*within, value))


def name_of(value: Any) -> str:
    """Module and name of a function or class, or of the class of anything else."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _of_callable(value: Any, within: tuple[Any, ...]) -> dict[str, Any]:
    named = {"callable": name_of(value)}
    if isinstance(value, functools.partial):
        given = [value.func, value.args, value.keywords]
        return {"partial": described(given, within)}
    if is_dataclass(value) and not isinstance(value, type) and type(value).__module__.startswith(OWN):
        return named | {field.name: described(getattr(value, field.name), within) for field in fields(value)}
    held = getattr(value, "__dict__", None)
    if inspect.ismethod(value):
        held = value.__self__ if callable(value.__self__) else getattr(value.__self__, "__dict__", None)
    elif inspect.isfunction(value):
        held = [_enclosed(value), value.__defaults__, value.__kwdefaults__]
    return named | {"source": _source(value), "holds": described(held, within)}


def _enclosed(function: Any) -> dict[str, Any]:
    """The variables of outer functions that a function uses."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it is not filled yet
            found[name] = cell.cell_contents
    return found


def _source(value: Any) -> str | None:
    """The sha256 of the source of a function, or of the class of an object; None where there is none."""
    try:
        return _sha256(inspect.getsource(value if hasattr(value, "__qualname__") else type(value)).encode())
    except (OSError, TypeError):
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
