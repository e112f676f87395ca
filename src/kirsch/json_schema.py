"""Schemas of JSON files as functions: each takes a value and its path in the file, and gives the value back if it fits.

A value that does not fit is a `ValueError` that names the path, what was expected and what was found, without a point
at its end.
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

SHOWN = 60
"""Characters of a wrong value that a message repeats."""


def wrong(path: str, expected: str, found: Any) -> ValueError:
    """The error for a value that does not fit."""
    words = {dict: "an object", list: "a list", bool: str(found).lower(), type(None): "null"}.get(type(found))
    if words is None:
        words = f"{found!r}"
        words = words if len(words) <= SHOWN else f"{words[:SHOWN]}…"
    return ValueError(f"{path or 'the content'}: {expected} is expected, and {words} was found")


def anything(value: Any, _path: str) -> Any:
    """Any JSON."""
    return value


def flag(value: Any, path: str) -> Any:
    """A truth value."""
    if type(value) is not bool:
        raise wrong(path, "true or false", value)
    return value


def text(least: int = 0) -> Check:
    """A text of at least so many characters."""

    def check(value: Any, path: str) -> Any:
        if type(value) is not str or len(value) < least:
            raise wrong(path, "a text that is not empty" if least else "a text", value)
        return value

    return check


def whole(least: int, most: int = 2**63 - 1) -> Check:
    """A whole number within limits; true and false are not numbers."""

    def check(value: Any, path: str) -> Any:
        if type(value) is not int or not least <= value <= most:
            limits = f"of at least {least:,}" if most == 2**63 - 1 else f"from {least:,} to {most:,}"
            raise wrong(path, f"a whole number {limits}", value)
        return value

    return check


def number(
    least: float = -math.inf, above: float = -math.inf, below: float = math.inf, most: float = math.inf
) -> Check:
    """A finite number with least <= number <= most and above < number < below."""
    limits = [f"of at least {least:g}"] if least > -math.inf else []
    limits += [f"above {above:g}"] if above > -math.inf else []
    limits += [f"below {below:g}"] if below < math.inf else []
    limits += [f"of at most {most:g}"] if most < math.inf else []

    def check(value: Any, path: str) -> Any:
        fits = type(value) in (int, float) and math.isfinite(value) and least <= value <= most and above < value < below
        if not fits:
            raise wrong(path, " ".join(["a finite number", *limits]), value)
        return value

    return check


def one_of(known: Collection[Any]) -> Check:
    """One of some texts or numbers, of the same type: true is not 1."""

    def check(value: Any, path: str) -> Any:
        if not any(type(value) is type(other) and value == other for other in known):
            shown = ", ".join(str(other) for other in known)
            raise wrong(path, f"one of {shown}" if len(known) > 1 else shown, value)
        return value

    return check


def nullable(inner: Check) -> Check:
    """A value of another schema, or null."""
    return lambda value, path: None if value is None else inner(value, path)


def either(*choices: Check) -> Check:
    """A value that one of several schemas takes; the message is that of the last."""

    def check(value: Any, path: str) -> Any:
        for choice in choices[:-1]:
            try:
                return choice(value, path)
            except ValueError:
                continue
        return choices[-1](value, path)

    return check


def array(inner: Check, *, least: int = 0, most: int = 2**63 - 1) -> Check:
    """A list whose items all fit a schema."""

    def check(value: Any, path: str) -> Any:
        if type(value) is not list:
            raise wrong(path, "a list", value)
        if not least <= len(value) <= most:
            limit = f"at least {least}" if len(value) < least else f"at most {most}"
            raise ValueError(f"{path}: {limit} items are expected, and {len(value)} were found")
        return [inner(item, f"{path}[{place}]") for place, item in enumerate(value)]

    return check


def mapping(inner: Check, names: Collection[str] | None = None) -> Check:
    """An object whose values all fit a schema; `names`: the keys that it may have."""

    def check(value: Any, path: str) -> Any:
        if type(value) is not dict:
            raise wrong(path, "an object", value)
        for name in value if names is not None else ():
            if name not in (names or ()):
                raise _unknown(path, name, names or ())
        return {name: inner(item, _below(path, name)) for name, item in value.items()}

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None, *, more: bool = False) -> Check:
    """An object with named parts.

    Args:
        required: parts that must be there.
        optional: parts that may be missing.
        more: whether it may have other parts as well.
    """
    parts = {**required, **(optional or {})}

    def check(value: Any, path: str) -> Any:
        if type(value) is not dict:
            raise wrong(path, "an object", value)
        for name in value:
            if name not in parts and not more:
                raise _unknown(path, name, parts)
        for name in required:
            if name not in value:
                raise ValueError(f"{_below(path, name)} is missing")
        return {name: parts[name](item, _below(path, name)) if name in parts else item for name, item in value.items()}

    return check


def _below(path: str, name: str) -> str:
    """The path of a part; a name that is not a plain word is quoted."""
    shown = name if name.isidentifier() else repr(name if len(name) <= SHOWN else f"{name[:SHOWN]}…")
    return f"{path}.{shown}" if path else shown


def _unknown(path: str, name: str, known: Collection[str]) -> ValueError:
    close = nearest(name, known)
    return ValueError(f"{_below(path, name)} is not a known key{f' ({close[0].lower()}{close[1:]})' if close else ''}")
