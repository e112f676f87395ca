"""Checks of keyword arguments that are stored as data, against the annotations of the function that takes them."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from typing import TYPE_CHECKING, Any

from kirsch.annotations import value_phrase
from kirsch.arguments import MismatchError, convert

if TYPE_CHECKING:
    from collections.abc import Mapping


def wrong_types(function: Any, options: Mapping[str, Any], owner: str) -> list[str]:
    """Return one clause for each option whose value does not fit its annotation.

    Args:
        function: function or dataclass that takes the options by keyword.
        options: values by name; names that the function does not have are not checked.
        owner: noun phrase for the messages, such as "the loss 'kd'".
    """
    function, found = inspect.unwrap(function), []
    for name, value in options.items():
        try:
            convert(value, _annotation(function, name))
        except MismatchError as error:
            path = "".join(f"[{key!r}]" for key in error.path)
            found.append(f"`{name}{path}` of {owner} is {value_phrase(error.value)}; expected {error.expected}")
    return found


def _annotation(function: Any, name: str) -> Any:
    """Return the annotation of a parameter; `Any` if there is none, or if its names are not known at runtime.

    A module may import names for type checkers only; those of `typing` and `collections.abc` are known anyway.
    """
    module = inspect.getmodule(function)
    names = {**vars(typing), **vars(collections.abc), **(vars(module) if module else {})}
    hints = types.SimpleNamespace(__annotations__={name: inspect.get_annotations(function).get(name, Any)})
    try:
        return typing.get_type_hints(hints, names, include_extras=True)[name]
    except (NameError, TypeError):
        return Any
