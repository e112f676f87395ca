"""Argument checks of the public functions and classes, read from their annotations.

`@checked` compares each argument with its annotation before the function runs. What does not fit is a `UsageError` that
names the argument, says what was given, and what to give instead. Values of an equivalent type are converted, so that
the code behind it sees one type: a numpy integer becomes an int, a list for a `tuple[...]` becomes a tuple.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from kirsch.annotations import Between, Fix, Kind, OneOrMore, described, expected
from kirsch.errors import UsageError, listing, nearest

T = TypeVar("T", bound=Callable[..., Any])


class _MismatchError(Exception):
    """A value does not fit its annotation.

    Args:
        value: the argument, or the part of it that does not fit.
        expected: noun phrase.
        fix: sentence that says what to give; may be empty.
        close: the type is right and the value is not, so that of several alternatives this is the one that was meant.
    """

    def __init__(self, value: Any, expected: str, fix: str, *, close: bool) -> None:
        super().__init__(expected)
        self.value, self.expected, self.fix, self.close = value, expected, fix, close
        self.where = ""  # the part of the argument, such as "[0]"


def checked(target: T) -> T:
    """Decorate a public function, method or dataclass, so that its arguments are checked before it runs.

    Calls raise:
        UsageError: an argument is unknown, missing, or does not fit its annotation.
    """
    function: Any = vars(target)["__init__"] if inspect.isclass(target) else target
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise _wrong_call(target, signature, kwargs, error) from None
        wrong: list[UsageError] = []
        for argument, hint in _hints(function, target).items():
            if argument in bound.arguments:
                parameter, value = signature.parameters[argument], bound.arguments[argument]
                try:
                    bound.arguments[argument] = _argument(target, parameter, value, hint)
                except UsageError as error:
                    wrong.append(error)
        if wrong:
            raise _together(wrong)
        return function(*bound.args, **bound.kwargs)

    if inspect.isclass(target):
        setattr(target, "__init__", call)  # noqa: B010 - mypy does not allow the assignment
        return target
    return typing.cast("T", call)


def public_name(target: Any) -> str:
    """Return the name by which a user calls a function, class or method, such as "kirsch.Objective.kd"."""
    name, module = str(target.__qualname__), str(target.__module__)
    first, package = name.partition(".")[0], module.rpartition(".")[0]
    if first in sys.modules["kirsch"].__all__:
        module = "kirsch"
    elif first in getattr(sys.modules[package], "__all__", ()):
        module = package
    return f"{module}.{name.removesuffix('.__init__').removesuffix('.__call__')}"


@functools.cache
def _hints(function: Any, target: Any) -> dict[str, Any]:
    """Annotations by argument. They are resolved at the first call, since a class may name itself."""
    annotations = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    known = {**function.__globals__, **({target.__name__: target} if inspect.isclass(target) else {})}
    return typing.get_type_hints(types.SimpleNamespace(__annotations__=annotations), known, include_extras=True)


def _wrong_call(target: Any, signature: inspect.Signature, given: Mapping[str, Any], error: TypeError) -> UsageError:
    """Return the error for arguments that are unknown, missing or too many."""
    call, known = public_name(target), [name for name in signature.parameters if name != "self"]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    unknown = next((name for name in given if name not in known and not takes_any), None)
    if unknown is None:
        return UsageError(
            f"{call} was called with the wrong arguments: {error}.", fix=f"Its arguments are {', '.join(known)}."
        )
    refused: UsageError | None = target.refuse_argument(unknown) if hasattr(target, "refuse_argument") else None
    return refused or UsageError(
        f"{call} has no argument {unknown!r}.", listing(known), nearest(unknown, known) or "Leave it out."
    )


def _together(wrong: list[UsageError]) -> UsageError:
    """Return one error for all arguments that do not fit."""
    if len(wrong) == 1:
        return wrong[0]
    fixes = dict.fromkeys(error.fix for error in wrong)
    return UsageError(" ".join(error.what for error in wrong), fix=" ".join(fixes))


def _argument(target: Any, parameter: inspect.Parameter, value: Any, hint: Any) -> Any:
    """Return an argument as its annotation wants it."""
    try:
        if parameter.kind is parameter.VAR_KEYWORD:
            return {name: _part(part, hint, f"[{name!r}]") for name, part in value.items()}
        if parameter.kind is parameter.VAR_POSITIONAL:
            return tuple(_part(part, hint, f"[{place}]") for place, part in enumerate(value))
        return convert(value, hint)
    except _MismatchError as error:
        found = f"`{parameter.name}{error.where}` of {public_name(target)} is {described(error.value)}"
        fix = error.fix or _usual(target, parameter) or f"Give {expected(hint)}."
        wanted = "" if fix == f"Give {error.expected}." else f"; expected {error.expected}"
        raise UsageError(f"{found}{wanted}.", fix=fix) from None


def _usual(target: Any, parameter: inspect.Parameter) -> str:
    """Return the sentence that shows an ordinary value of an argument; empty where there is none to show."""
    if isinstance(parameter.default, (bool, int, float, str)):
        return f"The default is {parameter.name}={parameter.default!r}."
    made_by = getattr(target, "made_by", "")
    return f"Write {made_by}." if f"{parameter.name}=" in made_by else ""


# ------------------------------------------------------------------------------------------- one value, one annotation


def convert(value: Any, hint: Any) -> Any:
    """Return a value as an annotation wants it.

    Raises:
        _MismatchError: it does not fit.
    """
    origin = get_origin(hint)
    convert_to = CONVERSIONS.get(origin or hint)
    return convert_to(value, hint) if convert_to is not None else _instance(value, origin or hint)


def _annotated(value: Any, hint: Any) -> Any:
    hint, *extras = get_args(hint)
    try:
        value = convert(value, hint)
        for extra in extras:
            if isinstance(extra, Kind) and not extra.accepts(value):
                _refuse(value, extra.expected, extra.fix(value))
            if isinstance(extra, Between) and not extra.least <= value <= extra.most:
                _refuse(value, f"{expected(hint)} {extra.text(value)}", close=True)
            if isinstance(extra, OneOrMore) and isinstance(value, str):
                value = (value,)
    except _MismatchError as error:
        error.fix = next((extra.text for extra in extras if isinstance(extra, Fix)), error.fix)
        raise
    return value


def _union(value: Any, hint: Any) -> Any:
    """Return the value as the first alternative takes it; the error is that of the alternative that came closest."""
    closest: _MismatchError | None = None
    fix, alternatives = "", sum(alternative is not type(None) for alternative in get_args(hint))
    for alternative in get_args(hint):
        if alternative is type(None) and value is not None:
            continue
        try:
            return convert(value, alternative)
        except _MismatchError as error:
            fix = error.fix or fix if alternatives == 1 or inspect.isclass(value) else ""
            if error.close:
                closest = error
    raise closest or _MismatchError(value, expected(hint), fix, close=False)


def _literal(value: Any, hint: Any) -> Any:
    known = get_args(hint)
    for one in known:
        if (isinstance(one, str) and isinstance(value, str) and value == one) or (
            isinstance(one, int) and _is_whole(value) and operator.index(value) == one
        ):
            return one
    close = nearest(value, [str(one) for one in known]) if isinstance(value, str) else ""
    return _refuse(value, expected(hint), close)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or f"{type(value).__module__}.{type(value).__name__}" == "numpy.bool"


def _is_whole(value: Any) -> bool:
    """Return whether a value is a whole number; tensors and arrays, which have an index if they are of one, are not."""
    return (not _is_flag(value) and hasattr(value, "__index__") and not hasattr(value, "__array__")) or (
        isinstance(value, numbers.Integral) and not _is_flag(value)
    )


def _flag(value: Any, hint: Any) -> bool:
    return bool(value) if _is_flag(value) else _refuse(value, expected(hint))


def _whole(value: Any, hint: Any) -> int:
    return operator.index(value) if _is_whole(value) else _refuse(value, expected(hint))


def _number(value: Any, hint: Any) -> float:
    if _is_flag(value) or not isinstance(value, numbers.Real):
        _refuse(value, expected(hint))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _refuse(value, "a finite number", close=True)
    return int(value) if isinstance(value, numbers.Integral) else number


def _text(value: Any, hint: Any) -> str:
    return str(value) if isinstance(value, str) else _refuse(value, expected(hint))


def _path(value: Any, hint: Any) -> Path:
    is_path = isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    return Path(value) if is_path else _refuse(value, expected(hint))


def _nothing(value: Any, hint: Any) -> None:
    return None if value is None else _refuse(value, expected(hint))


def _elements(value: Any, hint: Any) -> Any:
    """Return a sequence whose elements fit; sets, ranges and views of a dict count as sequences, text does not."""
    origin, kinds = get_origin(hint) or hint, list(get_args(hint)) or [Any]
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, (Sequence, AbstractSet)):
        _refuse(value, expected(hint))
    if origin is not tuple or kinds[-1] is ...:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        _refuse(value, f"{expected(hint)}, {len(kinds)} in all")
    parts = [_part(part, kind, f"[{place}]") for place, (part, kind) in enumerate(zip(value, kinds, strict=True))]
    return parts if origin is list or (origin is not tuple and isinstance(value, list)) else tuple(parts)


def _iterable(value: Any, hint: Any) -> Any:
    """Return an iterable; its elements are checked only where looking does not use them up."""
    if hasattr(value, "dtype"):  # an array would be taken row by row
        _refuse(value, expected(hint))
    once = hasattr(value, "__next__") or not isinstance(value, (Sequence, AbstractSet, Mapping, str, bytes))
    return value if once and hasattr(value, "__iter__") else _elements(value, hint)


def _entries(value: Any, hint: Any) -> Any:
    if not isinstance(value, Mapping):
        _refuse(value, expected(hint))
    key_kind, kind = get_args(hint) or (Any, Any)
    return {_part(key, key_kind, " has a key that"): _part(part, kind, f"[{key!r}]") for key, part in value.items()}


def _part(value: Any, hint: Any, where: str) -> Any:
    try:
        return convert(value, hint)
    except _MismatchError as error:
        error.where, error.close = where + error.where, True
        raise


def _function(value: Any, hint: Any) -> Any:
    """Return a callable that takes as many arguments as its annotation has."""
    if not callable(value):
        _refuse(value, expected(hint))
    taken = (get_args(hint) or [...])[0]
    if taken is not ... and not takes(value, len(taken)):
        wanted = f"{expected(hint)} that takes {len(taken)} argument{'s' * (len(taken) != 1)}"
        _refuse(value, wanted, close=True)
    return value


def takes(function: Callable[..., Any], count: int) -> bool:
    """Return whether a callable can be called with so many positional arguments, as far as its signature says."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # some callables written in C have no signature
        return True
    return True


def _instance(value: Any, kind: Any) -> Any:
    """Return an instance of a class; of a protocol of callables any callable, of an array type any array."""
    if isinstance(kind, TypeVar) or getattr(kind, "_is_protocol", False):
        return value if isinstance(kind, TypeVar) or "__call__" not in vars(kind) else _function(value, kind)
    if kind.__name__ == "ndarray":  # arrays of a framework as well; the function says which it takes
        is_array = hasattr(value, "dtype") and len(getattr(value, "shape", ())) > 0
        return value if is_array else _refuse(value, expected(kind))
    if isinstance(value, str) and hasattr(kind, "of_text"):
        _refuse(value, expected(kind), kind.of_text(value))
    made_by = getattr(kind, "made_by", "")
    return value if isinstance(value, kind) else _refuse(value, expected(kind), f"Give {made_by}." if made_by else "")


def _refuse(value: Any, wanted: str, fix: str = "", *, close: bool = False) -> NoReturn:
    raise _MismatchError(value, wanted, fix, close=close)


CONVERSIONS: dict[Any, Callable[[Any, Any], Any]] = {
    Annotated: _annotated,
    Union: _union,
    types.UnionType: _union,
    Literal: _literal,
    Any: lambda value, _hint: value,
    object: lambda value, _hint: value,
    bool: _flag,
    int: _whole,
    float: _number,
    str: _text,
    Path: _path,
    type(None): _nothing,
    Sequence: _elements,
    tuple: _elements,
    list: _elements,
    Iterable: _iterable,
    Mapping: _entries,
    dict: _entries,
    Callable: _function,
}
