"""Constraints in the annotations of public arguments, and noun phrases for types and values in errors."""

from __future__ import annotations

import inspect
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

FORMAT_LIMIT = 2**31
"""Limits of this number or more come from number formats, such as 2**53. An error shows such a limit only if the value
exceeds it."""

MAX_VALUE_LENGTH = 40
"""Largest number of characters of a value that an error shows."""


@dataclass(frozen=True)
class Kind:
    """A check that a type cannot express, such as a model of any framework.

    Args:
        expected: noun phrase for errors, such as "a model".
        accepts: function that returns whether a value is of this kind.
        fix: function that returns the fix for a value that is not of this kind, as a sentence.
    """

    expected: str
    accepts: Callable[[Any], bool]
    fix: Callable[[Any], str]


@dataclass(frozen=True)
class Between:
    """The range of a number. pydantic reads this annotation, too, and then refuses booleans and texts.

    Args:
        least, most: limits; they belong to the range unless `exclusive` names them.
        exclusive: the limits that do not belong to the range: "least", "most" or "both".
    """

    least: float = -math.inf
    most: float = math.inf
    exclusive: Literal["", "least", "most", "both"] = field(default="", kw_only=True)

    def has(self, value: float) -> bool:
        """Return whether a number is in the range."""
        least, most = self.exclusive in ("least", "both"), self.exclusive in ("most", "both")
        return self.least <= value <= self.most and not (
            (least and value == self.least) or (most and value == self.most)
        )

    def text(self, value: float | None = None) -> str:
        """Return the range as part of a noun phrase; limits of number formats appear only if `value` exceeds them."""
        if self.exclusive:
            lower = "of at least" if self.exclusive == "most" else "above"
            upper = "up to" if self.exclusive == "least" else "below"
            return f"{lower} {self.least:g}" + (f" and {upper} {self.most:g}" if self.most < FORMAT_LIMIT else "")
        if self.most >= FORMAT_LIMIT and (value is None or value < self.most):
            return f"of at least {self.least:g}"
        return f"between {self.least:g} and {self.most:g}"

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Return the schema of a number within the range, for pydantic."""
        limits = {
            "gt" if self.exclusive in ("least", "both") else "ge": self.least,
            "lt" if self.exclusive in ("most", "both") else "le": self.most,
        }
        finite = {name: limit for name, limit in limits.items() if math.isfinite(limit)}
        return {**handler(source), "strict": True, **finite}


@dataclass(frozen=True)
class OneOrMore:
    """Mark an argument that takes one text or several. One text becomes a tuple; in pydantic, a list does as well."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Return the schema of one text or several, for pydantic."""
        convert = {"type": "no-info", "function": lambda value: (value,) if isinstance(value, str) else tuple(value)}
        return {"type": "function-after", "function": convert, "schema": handler(source)}


@dataclass(frozen=True)
class Fix:
    """The fix that an error suggests, as a sentence."""

    text: str


Count = Annotated[int, Between(1, 2**53)]
"""A whole number of at least 1."""

FEWEST_ROUNDS = 6
"""Smallest number of rounds of a latency measurement.

With five rounds, even the interval from the smallest to the largest ratio covers the median in only 94 % of cases.
"""

Rounds = Annotated[int, Between(FEWEST_ROUNDS, 2**53)]
"""Number of interleaved rounds of a latency measurement."""

Seed = Annotated[int, Between(0, 2**63 - 1)]
"""Seed of a random generator."""

Share = Annotated[float, Between(0, 1)]
"""A fraction or probability."""

AtLeastZero = Annotated[float, Between(0)]
"""A number of at least 0."""

Positive = Annotated[float, Between(0, exclusive="least")]
"""A number above 0."""

Fraction = Annotated[float, Between(0, 1, exclusive="both")]
"""A number above 0 and below 1."""

Names = Annotated[
    str | Sequence[str], OneOrMore(), Fix("Give one or several paths or patterns, such as ['fc', 'layer4.*'].")
]
"""One or several paths of modules, names of parameters, or patterns that match them."""


WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    bytes: "bytes",
    Path: "a path",
    type(None): "None",
    Any: "any object",
    Callable: "a callable",
    Mapping: "a dict",
    dict: "a dict",
    Sequence: "a list",
    Iterable: "a list",
    list: "a list",
    tuple: "a list",
}


def type_phrase(hint: Any) -> str:
    """Return a noun phrase for an annotation, such as "a whole number"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind = next((extra for extra in args[1:] if isinstance(extra, Kind)), None)
        span = next((f" {extra.text()}" for extra in args[1:] if isinstance(extra, Between)), "")
        return kind.expected if kind else type_phrase(args[0]) + span
    if origin is Callable or hint is Callable:
        return WORDS[Callable]
    if origin in (Union, types.UnionType):
        return _either([word for arg in args for word in _alternatives(arg)])
    if origin is Literal:
        return _either([repr(arg) for arg in args])
    kind = origin or hint
    noun = WORDS.get(kind) or _class_noun(kind)
    elements = [] if noun == "an array" else [type_phrase(arg) for arg in args if arg is not ...]
    entries = kind in (Mapping, dict)
    parts = (" to " if entries else " and ").join(map(plural, elements))
    return f"{noun} {'from' if entries else 'of'} {parts}" if elements else noun


def _alternatives(hint: Any) -> list[str]:
    """Return the noun phrases of one member of a union; a `Literal` has one for each of its values."""
    return [repr(arg) for arg in get_args(hint)] if get_origin(hint) is Literal else [type_phrase(hint)]


def _either(words: list[str]) -> str:
    """Join noun phrases by "or", with a comma before it if one of the phrases contains "or"."""
    *first, last = dict.fromkeys(words)
    nested = any(" or " in word for word in first)
    return f"{', '.join(first)}{',' * nested} or {last}" if first else last


def _class_noun(kind: Any) -> str:
    if kind.__name__ == "ndarray":
        return "an array"
    return f"a {public_name(kind)}" if kind.__module__.startswith("kirsch.") else with_article(kind.__name__)


def public_name(target: Any) -> str:
    """Return the name by which a user calls a function, class or method, such as "kirsch.Objective.kd"."""
    name, module = str(target.__qualname__), str(target.__module__)
    first, package = name.partition(".")[0], module.rpartition(".")[0]
    if first in sys.modules["kirsch"].__all__:
        module = "kirsch"
    elif first in getattr(sys.modules.get("kirsch.steps"), "__all__", ()):
        module = "kirsch.steps"
    elif first in getattr(sys.modules.get(package), "__all__", ()):
        module = package
    return f"{module}.{name.removesuffix('.__init__').removesuffix('.__call__')}"


def value_phrase(value: Any) -> str:
    """Return a noun phrase for a value: the type, with the value, shape or length if it is short."""
    kind = type(value)
    noun = with_article(
        kind.__name__ if kind.__module__ in ("builtins", "numpy") else f"{kind.__module__}.{kind.__qualname__}"
    )
    if value is None or isinstance(value, bool):
        noun = str(value)
    elif inspect.isclass(value):
        noun = f"the class {value.__qualname__}"
    elif inspect.isroutine(value):
        noun = f"the function {value.__name__}"
    elif isinstance(shape := getattr(value, "shape", None), tuple) and not isinstance(value, (float, str)):
        dtype = getattr(value, "dtype", None)
        noun += f" of dtype {dtype} and" if getattr(dtype, "kind", "f") in "OSU" else " of"
        noun += f" shape {tuple(shape)}"
    elif isinstance(value, (str, bytes)):
        noun = f"{value[:MAX_VALUE_LENGTH]!r}{'…' if len(value) > MAX_VALUE_LENGTH else ''}"
    elif isinstance(value, (float, complex)) or (isinstance(value, int) and abs(value) < 10**MAX_VALUE_LENGTH):
        noun = repr(value)
    elif isinstance(value, (list, tuple, dict, set, frozenset)):
        noun += f" with {len(value)} element{'s' * (len(value) != 1)}" if value else " without elements"
    return noun


def plural(noun: str) -> str:
    """Return the plural of a noun phrase: "a model or a list of text" → "models or lists of text"."""
    noun = re.sub(r"(^|, | or )an? (kirsch\.[\w.]+)", r"\1a \2 object", noun)
    return re.sub(r"(^|, | or )an? (.*?)(?= of | above | between | or |, |$)", r"\1\2s", noun)


def with_article(noun: str) -> str:
    """Return a noun with "a" or "an" before it."""
    return f"{'an' if noun[:1].lower() in 'aeio' or noun.startswith('nd') else 'a'} {noun}"


MaxDrop = Annotated[
    float,
    Between(0, 1, exclusive="most"),
    Fix("For a drop of at most one percentage point, write max_drop=0.01."),
]
"""A drop of accuracy, as a fraction."""
