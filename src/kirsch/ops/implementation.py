"""Implementations of the array operations, and the choice of the implementation for an array."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kirsch.errors import UsageError
from kirsch.registry import Registry

MODULES = {"numpy": "kirsch.ops.numpy_arrays", "torch": "kirsch.frameworks.pytorch.ops"}
"""Module with the operations, by the package that defines the array type; imported when such an array is first used."""

IMPLEMENTATIONS: Registry[Any] = Registry("ops")
"""Objects with the functions of `kirsch.ops.operations`, for further libraries. A key is the package of an array type.

In place of `channel_axis`, an object has `CHANNEL_AXIS`, the axis of the channels of maps. Its functions take `like` as
the second positional argument, not as a keyword.
"""

_OF_TYPE: dict[type, Any] = {}


def implementation_of(array: Any) -> Any:
    """Return the operations for an array: an object with one function for each operation.

    Raises:
        UsageError: no implementation is registered for arrays of this type.
    """
    kind = type(array)
    if kind not in _OF_TYPE:
        load_implementation(kind)
    return _OF_TYPE[kind]


def load_implementation(*array_types: type) -> None:
    """Import the operations for some array types now, because a compiler cannot trace the import.

    Raises:
        UsageError: no implementation is registered for arrays of such a type.
    """
    _OF_TYPE.update({kind: _find(kind) for kind in array_types})


def _find(kind: type) -> Any:
    packages = dict.fromkeys(base.__module__.partition(".")[0] for base in kind.__mro__ if base is not object)
    known = set(IMPLEMENTATIONS)
    for package in packages:
        if package in known:
            return IMPLEMENTATIONS[package]
        if package in MODULES:
            return import_module(MODULES[package])
    raise UsageError(f"A loss got an object of type {kind.__qualname__}.", fix="Pass numpy arrays or PyTorch tensors.")
