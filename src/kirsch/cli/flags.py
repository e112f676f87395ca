"""Flags of subcommands, made from the options of the Python function of the same name, and limits of a goal."""

# typer reads the annotations when a subcommand is registered: no `from __future__ import annotations` here.
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from kirsch.errors import UsageError
from kirsch.graph.cost_names import WORDS
from kirsch.options import Options


def with_flags(options: type[Options], *, limits: bool = False) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return a decorator that replaces the parameter `**options` of a subcommand with flags.

    There is a flag for each option that is not yet a parameter.

    Args:
        options: the class of the options.
        limits: whether there is also a flag for each limit of a goal.
    """

    def replace(function: Callable[..., int]) -> Callable[..., int]:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        flags = [_flag(options, name) for name in options.model_fields if name not in signature.parameters]
        parameters = [*own, *(map(_limit_flag, WORDS) if limits else []), *flags]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # read by inspect.signature
        return function

    return replace


def given_limits(flags: Mapping[str, Any]) -> dict[str, float]:
    """Return the limits of a goal whose flags are given."""
    return {name: flags[name] for name in WORDS if flags[name] is not None}


def given_options(flags: Mapping[str, Any], options: type[Options]) -> dict[str, Any]:
    """Return the options whose flags are given.

    Raises:
        UsageError: a flag that takes one value is repeated, or a weight is not a number.
    """
    given = {name: value for name, value in flags.items() if name not in WORDS and value is not None and value != []}
    return {name: _value(options, name, value) for name, value in given.items()}


def _limit_flag(name: str) -> inspect.Parameter:
    """Return the flag of the limit of a cost."""
    flag = typer.Option(f"--{name}", help=f"Limit of the {WORDS[name]}, as a fraction of the original: 0.5.")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[float | None, flag]
    )


def _flag(options: type[Options], name: str) -> inspect.Parameter:
    field = options.model_fields[name]
    kinds = _types(field.annotation)
    text = str(field.description)
    text = f"{text[0].upper()}{text[1:]}"
    default = field.default
    if default not in (None, False, ()):
        text += f"; default: {' '.join(map(str, default)) if isinstance(default, tuple) else default}"
    kind: Any
    if tuple in kinds:
        kind = list[float]
        text += "; may be repeated"
    elif kinds & {Sequence, Mapping}:
        kind = list[str]
        text += "; may be repeated"
        text += f"{', also' * (kinds != {Mapping})} as {_key(name)}=NUMBER" if Mapping in kinds else ""
    else:
        (kind,) = kinds
    # The default is None, so that a flag with the default of the option is known to be given.
    word = name.replace("_", "-")
    is_choice = kind is bool and field.default is None  # both values differ from the default
    flag = typer.Option(f"--{word}" + f"/--no-{word}" * is_choice, help=f"{text}.", show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, flag]
    )


def _types(annotation: Any) -> set[Any]:
    """Return the types in an annotation except None; for a `Literal`, the types of its values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(value) for value in arguments}
    if origin in (Union, types.UnionType):
        return set().union(*map(_types, arguments))
    if origin is Annotated:
        return _types(arguments[0])
    return {origin or annotation} - {type(None)}


def _value(options: type[Options], name: str, value: Any) -> Any:
    """Convert the value of a flag to the value of its option. Texts of the form KIND=NUMBER become a dict."""
    if not isinstance(value, list):
        return value
    kinds, flag = _types(options.model_fields[name].annotation), f"--{name.replace('_', '-')}"
    if Mapping in kinds and any("=" in text for text in value):
        pairs = [text.rpartition("=") for text in value]
        return {key: _number(number, text, name) for text, (key, _, number) in zip(value, pairs, strict=True)}
    if kinds & {Sequence, tuple}:
        return value
    if len(value) > 1:
        raise UsageError(f"{flag} is given {len(value)} times.", fix=f"Give one value, or {flag} {_key(name)}=NUMBER.")
    if kinds == {Mapping}:
        raise UsageError(f"{flag} {value[0]}: the number is missing.", fix=f"Write {flag} {_EXAMPLES[name]}.")
    return int(value[0]) if value[0].isascii() and value[0].isdigit() else value[0]  # `kirsch.plan` checks other texts


_EXAMPLES = {"kinds": "head=2", "round_to": "head=2", "keep": "layer4.*=0.5", "class_weights": "3=5"}
"""Example of a value of the form KEY=NUMBER for each flag that takes such values."""


def _key(name: str) -> str:
    return {"keep": "LAYER", "class_weights": "CLASS"}.get(name, "KIND")


def _number(text: str, given: str, name: str) -> float:
    try:
        return int(text) if text.isascii() and text.isdigit() else float(text)
    except ValueError:
        flag = f"--{name.replace('_', '-')}"
        fix = f"Write {_key(name)}=NUMBER, such as {_EXAMPLES[name]}."
        raise UsageError(f"{flag} {given}: {text!r} is not a number.", fix=fix) from None
