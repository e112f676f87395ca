"""What a callable does, as plain values that a hash can be taken of.

Of a function: its name, its source, and what it encloses or has as defaults. Of an object: its class with the functions
and the values of it and its bases, and what pickling would keep of it: attributes, slots, items. Numbers, texts, arrays
and tensors are taken by value, a model by its weights and by the numbers, texts and callables that its modules hold.
What a callable reads from its module is not seen. What cannot be described is refused: two that differ in it would pass
for one.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import hashlib
import inspect
import json
import sys
import weakref
from dataclasses import fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.data.arrays import host
from kirsch.errors import ModelError, UsageError, name_of
from kirsch.frameworks.find import framework_of

if TYPE_CHECKING:
    from collections.abc import Mapping

OWN = "kirsch"
"""Frozen dataclasses of this package are their name and their fields: their source may become clearer."""

SETTLED = {*sys.stdlib_module_names, OWN, "numpy", "torch"}
"""Packages whose functions and classes are their names: what they do does not change with the user's code."""

POINTERS = "torch.utils.hooks"
"""What is held to take a hook away has a number of the process, and does nothing."""


class _UntoldError(Exception):
    """Something cannot be described; where it is held is added on the way up."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.called, self.path = name_of(type(value)), list[str]()


def described(value: Any) -> Any:
    """A value in JSON's types, equal for callables that do the same by all that can be seen.

    Raises:
        UsageError: it holds what cannot be described, such as an open file.
    """
    try:
        return _Telling().of(value)
    except _UntoldError as error:
        held = (
            f"holds a {error.called} as `{'.'.join(error.path)}`, which" if error.path else f"is a {error.called} and"
        )
        raise UsageError(
            f"{name_of(value)} {held} cannot be described.",
            "A store could not tell it from another that does something else.",
            "Let it hold numbers, texts, arrays and objects of these; what else it needs it may read from its module.",
        ) from error


def description(transform: Any) -> str:
    """Return what a transform does, as JSON to take a hash of."""
    return json.dumps(described(transform), sort_keys=True)


PLAIN = (bool, int, float, str)
SHOWN = (bytes, bytearray, complex, range, slice, type(...), np.dtype)
"""Types whose `repr` says all."""


class _Telling:
    """One description. What is met again is told the same once more, and what holds itself by how far up it is."""

    def __init__(self) -> None:
        self._within: list[Any] = []
        self._told: dict[int, tuple[Any, Any]] = {}  # with the value, so that its id is not given to another

    def of(self, value: Any) -> Any:
        """See `described`."""
        if value is None or isinstance(value, PLAIN):
            return value
        if isinstance(value, (np.ndarray, np.generic)):
            return self._of_array(np.asarray(value))
        if isinstance(value, SHOWN):
            return {"type": name_of(value), "value": repr(value)}
        if id(value) in self._told:
            return self._told[id(value)][1]
        up = next((far for far, other in enumerate(reversed(self._within)) if other is value), None)
        if up is not None:
            return {"up": up}
        self._within.append(value)
        found = self._of_whole(value)
        self._within.pop()
        if self._within and not isinstance(value, tuple) and not _own(value):  # short, however many hold it
            found = {"type": name_of(value), "sha256": _sha256(json.dumps(found, sort_keys=True).encode())}
        self._told[id(value)] = value, found
        return found

    def _held(self, name: str, value: Any) -> Any:
        try:
            return self.of(value)
        except _UntoldError as error:
            error.path.insert(0, name)
            raise

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._held(name, value) for name, value in values.items()}

    def _of_whole(self, value: Any) -> Any:
        """Of what may hold other things."""
        if isinstance(value, tuple) or type(value) is list:
            return [self._held(str(place), part) for place, part in enumerate(value)]
        if type(value) is dict:
            return [[self.of(key), self._held(str(key), part)] for key, part in value.items()]
        if type(value) in (set, frozenset):
            return {"set": sorted(json.dumps(self.of(part), sort_keys=True) for part in value)}
        if isinstance(value, type):
            return self._of_class(value)
        if isinstance(value, (FunctionType, MethodType, BuiltinFunctionType, functools.partial)):
            return self._of_callable(value)
        return self._of_thing(value)

    def _of_callable(self, value: Any) -> Any:
        if isinstance(value, FunctionType):
            return self._of_function(value)
        if isinstance(value, functools.partial):
            return {"partial": self.of((value.func, value.args, value.keywords))}
        if isinstance(value, MethodType):
            return {"method": self.of(value.__func__), "of": self._held("__self__", value.__self__)}
        return {"callable": name_of(value), "of": self._held("__self__", value.__self__)}

    def _of_thing(self, value: Any) -> Any:
        if hasattr(value, "detach") and hasattr(value, "numpy"):
            return self._of_tensor(value)
        if isinstance(value, ModuleType):
            return {"module": value.__name__}
        if isinstance(value, weakref.ReferenceType) or type(value).__module__ == POINTERS:
            return {"type": name_of(value)}
        if _own(value):
            return {"callable": name_of(value)} | self._named({f.name: getattr(value, f.name) for f in fields(value)})
        return self._of_model(value) if hasattr(value, "state_dict") else self._of_object(value)

    def _of_array(self, array: Any) -> Any:
        told = {"array": str(array.dtype), "shape": list(array.shape)}
        if array.dtype.hasobject:
            return told | {"values": [self.of(part) for part in array.ravel().tolist()]}
        return told | {"sha256": _sha256(array.tobytes())}

    def _of_tensor(self, tensor: Any) -> Any:
        kind = str(tensor.dtype)
        try:  # numpy has no floating numbers of 8 bits, nor those of 16 that end early; wider ones hold them all
            array = host(tensor.float() if "bfloat16" in kind or "float8" in kind else tensor)
        except (TypeError, RuntimeError) as error:
            raise _UntoldError(tensor) from error
        return {"tensor": kind, "value": self._of_array(array)}

    def _of_function(self, function: FunctionType) -> dict[str, Any]:
        told: dict[str, Any] = {"callable": name_of(function)}
        if _package(function) not in SETTLED:
            told["source"] = _source(function.__code__)
            if told["source"] is None or function.__name__ == "<lambda>":  # a line may have several
                told["code"] = _code(function.__code__)
        defaults = [self._held("defaults", function.__defaults__), self._held("defaults", function.__kwdefaults__)]
        return told | {"holds": [self._named(_enclosed(function)), *defaults, self._named(vars(function))]}

    def _of_class(self, cls: type) -> dict[str, Any]:
        """Its name, and its functions and values and those of its bases, as they are now."""
        return {"class": name_of(cls), "bases": [[name_of(base), self._named(_members(base))] for base in _bases(cls)]}

    def _of_model(self, value: Any) -> dict[str, Any]:
        try:
            framework = framework_of(value)
        except ModelError:
            return self._of_object(value)
        settings = [
            [path, name_of(type(module)), self._named({n: v for n, v in vars(module).items() if _setting(n, v)})]
            for path, module in value.named_modules()
        ]
        # Of its class the sources alone: decorators, which those of large libraries have many of, hold anything.
        code = [[name_of(base), _sources(base)] for base in _bases(type(value))]
        return {
            "model": name_of(value),
            "code": code,
            "weights": framework.inference.fingerprint(value),
            "settings": settings,
        }

    def _of_object(self, value: Any) -> dict[str, Any]:
        """Its class, and what pickling would keep of it."""
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None:  # what caches a function
            return {"type": name_of(type(value)), "of": self.of(wrapped)}
        try:
            reduced: Any = copyreg.dispatch_table.get(type(value))
            kept = value.__reduce_ex__(2) if reduced is None else reduced(value)
        except Exception as error:  # whatever an object's own code raises
            if callable(value) and hasattr(value, "__qualname__"):  # compiled
                return {"callable": name_of(value)}
            raise _UntoldError(value) from error
        if isinstance(kept, str):
            return {"object": kept, "class": self.of(type(value))}
        make, given, state, items, pairs = (*kept, None, None, None)[:5]
        if isinstance(state, tuple) and all(isinstance(part, dict | None) for part in state):  # attributes, and slots
            state = {name: part for held in state for name, part in (held or {}).items()}
        told = {"class": self.of(type(value)), "made": self.of((make, given)), "state": self.of(state)}
        return told | {"items": self.of(tuple(items or ())), "pairs": self.of(tuple(pairs or ()))}


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _own(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type) and _package(type(value)) == OWN


def _bases(cls: type) -> list[type]:
    """A class and those that it derives from, but for settled ones."""
    return [base for base in cls.__mro__ if _package(base) not in SETTLED]


def _sources(cls: type) -> dict[str, Any]:
    made = {name: member for name, member in _members(cls).items() if isinstance(member, FunctionType)}
    return {name: _source(function.__code__) for name, function in made.items()}


def _members(cls: type) -> dict[str, Any]:
    """The functions of a class, but for those that are generated, and its values."""
    found = {}
    for name, member in vars(cls).items():
        made = getattr(member, "__func__", getattr(member, "fget", getattr(member, "func", member)))
        if isinstance(made, FunctionType):
            if _package(made) not in SETTLED and made.__code__.co_filename != "<string>":
                found[name] = made
        elif not name.startswith("_") and not hasattr(type(member), "__get__"):
            found[name] = member
    return found


def _setting(name: str, value: Any) -> bool:
    """Whether an attribute of a module says how it computes: numbers, texts and callables, and some of these."""
    if isinstance(value, (tuple, list)):
        return all(_setting(name, part) for part in value)
    return name != "training" and not name.startswith("_") and (isinstance(value, (*PLAIN, Enum)) or callable(value))


def _enclosed(function: FunctionType) -> dict[str, Any]:
    """The variables of outer functions that a function uses, but for the class that `super()` stands in."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it is not filled yet
            found[name] = cell.cell_contents
    found.pop("__class__", None)
    return found


def _source(code: CodeType) -> str | None:
    """The sha256 of the source; None where there is none."""
    try:
        return _sha256(inspect.getsource(code).encode())
    except (OSError, TypeError):
        return None


def _code(code: CodeType) -> str:
    """The sha256 of compiled code, wherever it stands; another for another version of Python."""
    constants = [_code(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts]
    return _sha256(repr((code.co_code, code.co_names, code.co_varnames, constants)).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
