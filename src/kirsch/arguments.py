"""Argument checks of the public functions and classes, read from their annotations.

`@checked` compares each argument with its annotation before the function runs. An argument that does not fit raises a
`UsageError` with its name, the found value, the expected type and the fix. Values of an equivalent type are converted,
so that the function receives one type: a numpy integer becomes an int, a list for a `tuple[...]` becomes a tuple.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from kirsch.annotations import Between, Fix, Kind, OneOrMore, public_name, type_phrase, value_phrase
from kirsch.errors import UsageError, listing, nearest

T = TypeVar("T", bound=Callable[..., Any])


ABBREVIATIONS = {
    "T": "temperature",
    "bs": "batch_size",
    "ema": "ema_decay",
    "grad_clip": "max_grad_norm",
    "accumulation_steps": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "params": "parameters",
    "tau": "temperature",
    "wd": "weight_decay",
}
"""Usual abbreviations of arguments."""

SEQUENCES = (Sequence, AbstractSet, ValuesView)
"""Types that are accepted for a sequence: they have a length and can be iterated again."""


class MismatchError(Exception):
    """A value does not fit its annotation.

    Args:
        value: the argument, or the element of the argument that does not fit.
        expected: noun phrase for the expected type.
        fix: the fix, as a sentence; may be empty.
        close: whether the value nearly fits, for example a number out of range, or a list with one wrong element. If
            no member of a union accepts a value, the union raises the last error with `close=True`.
    """

    def __init__(self, value: Any, expected: str, fix: str, *, close: bool) -> None:
        super().__init__(expected)
        self.value, self.expected, self.fix, self.close = value, expected, fix, close
        self.path: tuple[Any, ...] = ()  # keys of the element in the argument, such as (0,) for its first element
        self.is_key = False  # whether the value is a key of the dict at this path


def checked(target: T) -> T:
    """Decorate a public function, method or dataclass so that its arguments are checked before it runs.

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
            maker = args[0] if args and next(iter(signature.parameters)) == "cls" else None
            raise _call_error(target, signature, kwargs, _hints(function, target), error, maker) from None
        bound.arguments |= _checked_arguments(target, signature, bound.arguments, _hints(function, target))
        return function(*bound.args, **bound.kwargs)

    if inspect.isclass(target):
        setattr(target, "__init__", call)  # noqa: B010 - mypy does not allow the assignment
        return target
    return typing.cast("T", call)


def check_arguments(target: Any, values: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of a class, converted to the types of their annotations.

    Raises:
        UsageError: an argument is unknown, missing, or does not fit its annotation.
    """
    signature = inspect.signature(target)
    try:
        bound = signature.bind(**values)
    except TypeError as error:
        raise _call_error(target, signature, values, hints, error) from None
    return dict(bound.arguments) | _checked_arguments(target, signature, bound.arguments, hints)


def _checked_arguments(
    target: Any, signature: inspect.Signature, values: Mapping[str, Any], hints: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments that have an annotation, converted to its type. One error names all wrong arguments."""
    converted, errors = {}, []
    for argument, hint in hints.items():
        if argument in values:
            try:
                converted[argument] = _checked_argument(target, signature.parameters[argument], values[argument], hint)
            except UsageError as error:
                errors.append(error)
    if errors:
        raise _merged(errors)
    return converted


@functools.cache
def _hints(function: Any, target: Any) -> dict[str, Any]:
    """Return the annotation of each argument. It is resolved at the first call, because a class may refer to itself."""
    annotations = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    namespace = {**function.__globals__, **({target.__name__: target} if inspect.isclass(target) else {})}
    return typing.get_type_hints(types.SimpleNamespace(__annotations__=annotations), namespace, include_extras=True)


def _call_error(
    target: Any,
    signature: inspect.Signature,
    keywords: Mapping[str, Any],
    hints: Mapping[str, Any],
    error: TypeError,
    maker: Any = None,
) -> UsageError:
    """Return the error for arguments that are unknown, missing or too many; `maker` is the class of a class method."""
    call, known = public_name(target), [name for name in signature.parameters if name not in ("self", "cls")]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    unknown = next((name for name in keywords if name not in known and not takes_any), None)
    if unknown is None:
        made_by = getattr(target, "made_by", "")
        by_constructor = not made_by or made_by.startswith(f"{call}(")
        fix = f"Its arguments are {_names_text(signature, known)}." if by_constructor else f"Write {made_by}."
        return UsageError(f"{call} was called with the wrong arguments: {error}.", fix=fix)
    if maker is not None and unknown in inspect.signature(maker).parameters:
        fix = f"Write {public_name(maker)}(..., {unknown}={_shown(keywords[unknown])})."
        return UsageError(f"{call} has no argument {unknown!r}.", listing(known), fix)
    refused: UsageError | None = target.refuse_argument(unknown) if hasattr(target, "refuse_argument") else None
    return refused or UsageError(
        f"{call} has no argument {unknown!r}.",
        listing(known),
        _meant_argument(unknown, keywords[unknown], known, hints) or "Leave it out.",
    )


def _names_text(signature: inspect.Signature, known: Sequence[str]) -> str:
    """Return the names of all arguments, and which of them are passed by name only."""
    named = [name for name in known if signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY]
    names = "them" if named == known else ", ".join(named)
    return ", ".join(known) + (f"; pass {names} by name" if named else "")


def _meant_argument(unknown: str, value: Any, known: Sequence[str], hints: Mapping[str, Any]) -> str:
    """Return a sentence that suggests the argument that was probably meant; empty if there is none.

    An unknown name may be an abbreviation, or a field of a class that another argument takes: `epochs` of
    `training=kirsch.Training(epochs=3)`.
    """
    name = ABBREVIATIONS.get(unknown, unknown)
    if name in known:
        return f"Did you mean {name!r}?"
    for argument, hint in hints.items():
        for kind in _classes_with_fields(hint):
            if name in inspect.signature(kind).parameters:
                return f"Write {argument}={public_name(kind)}({name}={_shown(value)})."
    return nearest(unknown, known)


def _shown(value: Any) -> str:
    """Return a plain value as code, and other values as "..."."""
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else "..."


def _classes_with_fields(hint: Any) -> list[Any]:
    """Option classes and dataclasses of Kirsch in an annotation, except those that users cannot construct."""
    if get_args(hint):
        return [kind for part in get_args(hint) for kind in _classes_with_fields(part)]
    has_fields = hasattr(hint, "model_fields") or hasattr(hint, "__dataclass_fields__")
    if not inspect.isclass(hint) or not has_fields or not hint.__module__.startswith("kirsch."):
        return []
    name = public_name(hint)  # skip classes that a function makes: users get a Graph from kirsch.trace
    return [hint] if getattr(hint, "made_by", name).startswith(name) else []


def _merged(errors: list[UsageError]) -> UsageError:
    """Return one error for all arguments that do not fit."""
    if len(errors) == 1:
        return errors[0]
    fixes = dict.fromkeys(error.fix for error in errors)
    return UsageError(" ".join(error.what for error in errors), fix=" ".join(fixes))


def _checked_argument(target: Any, parameter: inspect.Parameter, value: Any, hint: Any) -> Any:
    """Return an argument, converted to the type of its annotation."""
    try:
        if parameter.kind is parameter.VAR_KEYWORD:
            return {name: _element(item, hint, name) for name, item in value.items()}
        if parameter.kind is parameter.VAR_POSITIONAL:
            return tuple(_element(item, hint, index) for index, item in enumerate(value))
        return convert(value, hint)
    except MismatchError as error:
        path = "".join(f"[{key!r}]" for key in error.path)
        found = f"`{parameter.name}{path}` of {public_name(target)} is {value_phrase(error.value)}"
        found = f"A key of {found}" if error.is_key else found
        fix = error.fix or _example(target, parameter) or f"Give {type_phrase(hint)}."
        expected = "" if fix == f"Give {error.expected}." else f"; expected {error.expected}"
        raise UsageError(f"{found}{expected}.", fix=fix) from None


def _example(target: Any, parameter: inspect.Parameter) -> str:
    """Return a sentence with the default of an argument, or with a call that sets it; empty if there is neither."""
    if isinstance(parameter.default, (bool, int, float, str)):
        return f"The default is {parameter.name}={parameter.default!r}."
    made_by = getattr(target, "made_by", "")
    return f"Write {made_by}." if f"{parameter.name}=" in made_by else ""


# ------------------------------------------------------------------------------------------- one value, one annotation


def convert(value: Any, hint: Any) -> Any:
    """Return a value, converted to the type of an annotation.

    Raises:
        MismatchError: the value does not fit.
    """
    origin = get_origin(hint)
    conversion = CONVERSIONS.get(origin or hint)
    return conversion(value, hint) if conversion is not None else _instance(value, origin or hint)


def _annotated(value: Any, hint: Any) -> Any:
    hint, *extras = get_args(hint)
    try:
        value = convert(value, hint)
        for extra in extras:
            if isinstance(extra, Kind) and not extra.accepts(value):
                _refuse(value, extra.expected, extra.fix(value))
            if isinstance(extra, Between) and not extra.has(value):
                _refuse(value, f"{type_phrase(hint)} {extra.text(value)}", close=True)
            if isinstance(extra, OneOrMore) and isinstance(value, str):
                value = (value,)
    except MismatchError as error:
        error.fix = next((extra.text for extra in extras if isinstance(extra, Fix)), error.fix)
        raise
    return value


def _union(value: Any, hint: Any) -> Any:
    """Convert the value with the first member of the union that accepts it.

    If no member accepts the value, raise the last error with `close=True`, which names all ranges if the members are
    several ranges of numbers. Otherwise, raise an error that names all members.
    """
    closest: MismatchError | None = None
    fix, alternatives = "", sum(alternative is not type(None) for alternative in get_args(hint))
    for alternative in get_args(hint):
        if alternative is type(None) and value is not None:
            continue
        try:
            return convert(value, alternative)
        except MismatchError as error:
            by_text = isinstance(value, str) and hasattr(alternative, "of_text")
            if alternatives == 1 or inspect.isclass(value) or by_text:
                fix = error.fix or fix
            if error.close:
                closest = error
    if closest is not None and all(map(_is_range, get_args(hint))):
        closest = MismatchError(value, type_phrase(hint), closest.fix, close=True)
    raise closest or MismatchError(value, type_phrase(hint), fix, close=False)


def _is_range(hint: Any) -> bool:
    return get_origin(hint) is Annotated and any(isinstance(extra, Between) for extra in get_args(hint))


def _literal(value: Any, hint: Any) -> Any:
    choices = get_args(hint)
    for choice in choices:
        if (isinstance(choice, str) and isinstance(value, str) and value == choice) or (
            isinstance(choice, int) and _is_integer(value) and operator.index(value) == choice
        ):
            return choice
    close = nearest(value, [choice for choice in choices if isinstance(choice, str)]) if isinstance(value, str) else ""
    return _refuse(value, type_phrase(hint), close)


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or f"{type(value).__module__}.{type(value).__name__}" == "numpy.bool"


def _is_integer(value: Any) -> bool:
    """Return whether a value is a whole number. Arrays of one element are refused, although they have `__index__`."""
    return (not _is_boolean(value) and hasattr(value, "__index__") and not hasattr(value, "__array__")) or (
        isinstance(value, numbers.Integral) and not _is_boolean(value)
    )


def _boolean(value: Any, hint: Any) -> bool:
    return bool(value) if _is_boolean(value) else _refuse(value, type_phrase(hint))


def _integer(value: Any, hint: Any) -> int:
    return operator.index(value) if _is_integer(value) else _refuse(value, type_phrase(hint))


def _number(value: Any, hint: Any) -> float:
    if _is_boolean(value) or not isinstance(value, numbers.Real):
        _refuse(value, type_phrase(hint))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _refuse(value, "a finite number", close=True)
    return int(value) if isinstance(value, numbers.Integral) else number


def _text(value: Any, hint: Any) -> str:
    return str(value) if isinstance(value, str) else _refuse(value, type_phrase(hint))


def _path(value: Any, hint: Any) -> Path:
    is_path = isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    return Path(value) if is_path else _refuse(value, type_phrase(hint))


def _none(value: Any, hint: Any) -> None:
    return None if value is None else _refuse(value, type_phrase(hint))


def _sequence(value: Any, hint: Any) -> Any:
    """Return a sequence with converted elements; sets, ranges and views of dicts are accepted, text is not."""
    origin, kinds = get_origin(hint) or hint, list(get_args(hint)) or [Any]
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, SEQUENCES):
        _refuse(value, type_phrase(hint))
    if origin is not tuple or kinds[-1] is ...:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        _refuse(value, f"{type_phrase(hint)}, {len(kinds)} in all")
    items = [_element(item, kind, index) for index, (item, kind) in enumerate(zip(value, kinds, strict=True))]
    return items if origin is list or (origin is not tuple and isinstance(value, list)) else tuple(items)


def _iterable(value: Any, hint: Any) -> Any:
    """Return an iterable; the elements are checked only if iterating does not consume them."""
    if hasattr(value, "dtype"):  # iterating over an array would yield its rows
        _refuse(value, type_phrase(hint))
    once = hasattr(value, "__next__") or not isinstance(value, (*SEQUENCES, Mapping))
    return value if once and hasattr(value, "__iter__") else _sequence(value, hint)


def _mapping(value: Any, hint: Any) -> Any:
    if not isinstance(value, Mapping):
        _refuse(value, type_phrase(hint))
    key_kind, kind = get_args(hint) or (Any, Any)
    return {_key(key, key_kind): _element(item, kind, key) for key, item in value.items()}


def _key(value: Any, hint: Any) -> Any:
    try:
        return convert(value, hint)
    except MismatchError as error:
        error.is_key, error.close = True, True
        raise


def _element(value: Any, hint: Any, key: Any) -> Any:
    try:
        return convert(value, hint)
    except MismatchError as error:
        error.path, error.close = (key, *error.path), True
        raise


def _callable(value: Any, hint: Any) -> Any:
    """Return the callable if it takes as many arguments as its annotation states."""
    if not callable(value):
        _refuse(value, type_phrase(hint))
    parameters = (get_args(hint) or [...])[0]
    if parameters is not ... and not accepts_arguments(value, len(parameters)):
        phrase = f"{type_phrase(hint)} that takes {len(parameters)} argument{'s' * (len(parameters) != 1)}"
        _refuse(value, phrase, close=True)
    return value


def accepts_arguments(function: Callable[..., Any], count: int) -> bool:
    """Return whether the signature of a callable accepts `count` positional arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # some callables written in C have no signature
        return True
    return True


def _instance(value: Any, kind: Any) -> Any:
    """Return the value if it is an instance of the class.

    If the class is a Protocol with `__call__`, any callable is accepted. An array type accepts any array.
    """
    if isinstance(kind, TypeVar) or getattr(kind, "_is_protocol", False):
        return value if isinstance(kind, TypeVar) or "__call__" not in vars(kind) else _callable(value, kind)
    if kind.__name__ == "ndarray":  # arrays of any framework; the decorated function checks which ones it supports
        is_array = hasattr(value, "dtype") and len(getattr(value, "shape", ())) > 0
        return value if is_array else _refuse(value, type_phrase(kind))
    if isinstance(value, str) and hasattr(kind, "of_text"):
        _refuse(value, type_phrase(kind), kind.of_text(value))
    made_by = getattr(kind, "made_by", "")
    fix = f"Give {made_by}." if made_by else ""
    return value if isinstance(value, kind) else _refuse(value, type_phrase(kind), fix)


def _refuse(value: Any, expected: str, fix: str = "", *, close: bool = False) -> NoReturn:
    raise MismatchError(value, expected, fix, close=close)


CONVERSIONS: dict[Any, Callable[[Any, Any], Any]] = {
    Annotated: _annotated,
    Union: _union,
    types.UnionType: _union,
    Literal: _literal,
    Any: lambda value, _hint: value,
    object: lambda value, _hint: value,
    bool: _boolean,
    int: _integer,
    float: _number,
    str: _text,
    Path: _path,
    type(None): _none,
    Sequence: _sequence,
    tuple: _sequence,
    list: _sequence,
    Iterable: _iterable,
    Mapping: _mapping,
    dict: _mapping,
    Callable: _callable,
}
