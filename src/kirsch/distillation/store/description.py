"""Descriptions of transforms and callables, by which a store tells one from another.

Transforms of Kirsch describe themselves by their fields. A callable of the user declares a version, since its code does
not tell what it computes: it may call other code, or read values from its module.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import MethodType
from typing import Any

from kirsch.annotations import value_phrase
from kirsch.errors import UsageError, name_of

FIX = (
    'Set `version` after the definition of a function, f.version = "1", and self.version = "1" in the constructor of a '
    "class, or a class attribute of a dataclass. Change it whenever the result changes, also by a setting."
)


def description(value: Any) -> str | None:
    """Return a text that is the same for two callables if both have the same name, version and fields.

    Args:
        value: a transform of Kirsch, a callable of the user with a version, or None.

    Raises:
        UsageError: a callable of the user has no version, or a field of a dataclass cannot be described.
    """
    if value is None:
        return None
    if isinstance(value, MethodType):
        return f"{description(value.__self__)}.{value.__name__}"
    if not is_dataclass(value) or isinstance(value, type):
        return f"{name_of(value)} version {_version(value)}"
    names = [field.name for field in fields(value)]
    settings = ", ".join(f"{name}={_field(value, name, getattr(value, name))}" for name in names)
    if type(value).__module__.startswith("kirsch."):
        return f"{type(value).__qualname__}({settings})"
    return f"{name_of(value)}({settings}) version {_version(value)}"


def _field(owner: Any, name: str, value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_field(owner, name, item) for item in value)})"
    if callable(value):
        return str(description(value))
    raise UsageError(
        f"The field `{name}` of {name_of(owner)} is {value_phrase(value)}, which a store cannot describe.",
        fix="Use numbers, texts, transforms and tuples of these, or a class that is not a dataclass.",
    )


def _version(value: Any) -> str:
    """Return the version that a callable declares."""
    version = getattr(value, "version", None)
    if isinstance(version, bool) or not isinstance(version, (str, int)) or version == "":
        problem = "has no version"
        if version is not None:
            problem = f"has {value_phrase(version)} as version; expected a text or a whole number"
        raise UsageError(f"{name_of(value)} {problem}.", "A store recognizes it by its version, not by its code.", FIX)
    settings = [name for name in getattr(value, "__dict__", {}) if name != "version"]
    if settings and not is_dataclass(value) and isinstance(getattr(type(value), "version", None), (str, int)):
        raise UsageError(
            f"{name_of(value)} has the version {version!r} for all objects, which may differ in `{settings[0]}`.",
            "A store recognizes it by its version, not by its code.",
            f'Set self.version in the constructor, such as f"{version} {settings[0]}={{{settings[0]}}}".',
        )
    return str(version)
