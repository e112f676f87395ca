"""Schemas of JSON files as functions: each takes a value and its path in the file, and returns the valid value.

An invalid value raises a `ValueError` with the path, the expected and the found value, without a period at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kirsch.errors import nearest

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Check = Callable[[Any, str], Any]
"""(value, path of the value in the file) → the value."""

MAX_SHOWN_LENGTH = 60
"""Characters of a wrong value that a message repeats."""


def wrong(path: str, expected: str, found: Any) -> ValueError:
    """Return the error for an invalid value."""
    words = {dict: "an object", list: "a list", bool: str(found).lower(), type(None): "null"}.get(type(found))
    if words is None:
        words = f"{found!r}"
        words = words if len(words) <= MAX_SHOWN_LENGTH else f"{words[:MAX_SHOWN_LENGTH]}…"
    return ValueError(f"{path or 'the content'}: {expected} is expected, and {words} was found")


def anything(value: Any, _path: str) -> Any:
    """Accept any JSON."""
    return value


def flag(value: Any, path: str) -> Any:
    """Accept true or false."""
    if type(value) is not bool:
        raise wrong(path, "true or false", value)
    return value


def text(least: int = 0) -> Check:
    """Accept a text of at least `least` characters."""

    def check(value: Any, path: str) -> Any:
        if type(value) is not str or len(value) < least:
            raise wrong(path, "a text that is not empty" if least else "a text", value)
        return value

    return check


def integer(least: int, most: int = 2**63 - 1) -> Check:
    """Accept a whole number within limits; true and false are not numbers."""

    def check(value: Any, path: str) -> Any:
        if type(value) is not int or not least <= value <= most:
            above = type(value) is int and value > most
            limits = f"from {least:,} to {most:,}" if above or most < 2**63 - 1 else f"of at least {least:,}"
            raise wrong(path, f"a whole number {limits}", value)
        return value

    return check


def number(
    least: float = -math.inf, above: float = -math.inf, below: float = math.inf, most: float = math.inf
) -> Check:
    """Accept a finite number with least <= number <= most and above < number < below."""
    limits = [f"of at least {least:g}"] if least > -math.inf else []
    limits += [f"above {above:g}"] if above > -math.inf else []
    limits += [f"below {below:g}"] if below < math.inf else []
    limits += [f"of at most {most:g}"] if most < math.inf else []

    def check(value: Any, path: str) -> Any:
        fits = type(value) in (int, float) and math.isfinite(value) and least <= value <= most and above < value < below
        if not fits:
            raise wrong(path, f"a finite number {' and '.join(limits)}".strip(), value)
        return value

    return check


def one_of(choices: Collection[Any]) -> Check:
    """Accept one of several texts or numbers. The type must be equal, too: true is not 1."""

    def check(value: Any, path: str) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            shown = ", ".join(str(choice) for choice in choices)
            raise wrong(path, f"one of {shown}" if len(choices) > 1 else shown, value)
        return value

    return check


def nullable(inner: Check) -> Check:
    """Accept null, or a value of another schema."""
    return lambda value, path: None if value is None else inner(value, path)


def either(*choices: Check) -> Check:
    """Accept a value of one of several schemas. If the value fits none, the error of the last schema is raised."""

    def check(value: Any, path: str) -> Any:
        for choice in choices[:-1]:
            try:
                return choice(value, path)
            except ValueError:
                continue
        return choices[-1](value, path)

    return check


def array(inner: Check, *, least: int = 0, most: int = 2**63 - 1) -> Check:
    """Accept a list of `least` to `most` items that all fit a schema."""

    def check(value: Any, path: str) -> Any:
        if type(value) is not list:
            raise wrong(path, "a list", value)
        if not least <= len(value) <= most:
            limit = f"at least {least}" if len(value) < least else f"at most {most}"
            raise ValueError(f"{path}: {limit} items are expected, and {len(value)} were found")
        return [inner(item, f"{path}[{index}]") for index, item in enumerate(value)]

    return check


def mapping(inner: Check, keys: Collection[str] | None = None) -> Check:
    """Accept an object whose values all fit a schema. If `keys` is given, other keys are refused."""

    def check(value: Any, path: str) -> Any:
        if type(value) is not dict:
            raise wrong(path, "an object", value)
        for key in value if keys is not None else ():
            if key not in (keys or ()):
                raise _unknown_key(path, key, keys or ())
        return {key: inner(item, _child_path(path, key)) for key, item in value.items()}

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None, *, more: bool = False) -> Check:
    """Accept an object with named fields.

    Args:
        required: schema of each field that must be present.
        optional: schema of each field that may be missing.
        more: whether other fields are accepted as well.
    """
    fields = {**required, **(optional or {})}

    def check(value: Any, path: str) -> Any:
        if type(value) is not dict:
            raise wrong(path, "an object", value)
        for key in value:
            if key not in fields and not more:
                raise _unknown_key(path, key, fields)
        for key in required:
            if key not in value:
                raise ValueError(f"{_child_path(path, key)} is missing")
        return {
            key: fields[key](item, _child_path(path, key)) if key in fields else item for key, item in value.items()
        }

    return check


def _child_path(path: str, key: str) -> str:
    """Return the path of a field; a key that is not an identifier is quoted."""
    shown = key if key.isidentifier() else repr(key if len(key) <= MAX_SHOWN_LENGTH else f"{key[:MAX_SHOWN_LENGTH]}…")
    return f"{path}.{shown}" if path else shown


def _unknown_key(path: str, key: str, known: Collection[str]) -> ValueError:
    close = nearest(key, known)
    suggestion = f" ({close[0].lower()}{close[1:]})" if close else ""
    return ValueError(f"{_child_path(path, key)} is not a known key{suggestion}")
