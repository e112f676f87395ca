"""Example inputs in the file of a plan.

{"name": "", "shape": [2, 3], "dtype": "float32", "high": 0}     a tensor
{"name": "flag", "value": true}                                  true, false, a number, a text, or null
{"name": "", "kind": "list", "items": [...]}                     a "list", "tuple" or "dict" of the same
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kirsch.graph.graph import InputSpec, InputValue, NestedInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kirsch.graph.graph import Input

KINDS = ("list", "tuple", "dict")
"""Containers that a plan stores."""
TENSOR, VALUE, NESTED = ({"name", "shape", "dtype", "high"}, {"name", "value"}, {"name", "kind", "items"})
"""Fields of each kind of entry."""


def write(given: Input) -> dict[str, Any]:
    """Return an example input as JSON."""
    if isinstance(given, InputSpec):
        return {"name": given.name, "shape": list(given.shape), "dtype": given.dtype, "high": given.high}
    if isinstance(given, InputValue):
        return {"name": given.name, "value": given.value}
    return {"name": given.name, "kind": given.kind, "items": [write(item) for item in given.items]}


def read(entry: Any) -> Input:
    """Return the example input of `write`.

    Raises:
        ValueError: the entry is none; says which field is wrong.
    """
    fields = set(entry) if isinstance(entry, dict) else set()
    if fields not in (TENSOR, VALUE, NESTED):
        forms = "; ".join(", ".join(sorted(form)) for form in (TENSOR, VALUE, NESTED))
        raise ValueError(f"the input {entry!r} has other fields than one of: {forms}")
    name = _required(entry, "name", str, "text")
    if fields == TENSOR:
        shape = _required(entry, "shape", list, "a list")
        wrong = [size for size in shape if type(size) is not int or size < 0]
        if wrong:
            raise ValueError(f"'shape' has {wrong[0]!r}, which is not a whole number of at least 0")
        dtype, high = _required(entry, "dtype", str, "text"), _required(entry, "high", int, "a whole number")
        return InputSpec(name, tuple(shape), dtype, high)
    if fields == VALUE:
        return InputValue(name, _value(entry["value"]))
    kind, items = entry["kind"], tuple(map(read, _required(entry, "items", list, "a list")))
    if kind not in KINDS:
        raise ValueError(f"'kind' has {kind!r}, which is not one of {', '.join(KINDS)}")
    names = [item.name for item in items]
    if kind == "dict" and len(set(names)) < len(names):
        raise ValueError(f"the input {name!r} is a dict with a key twice: {', '.join(names)}")
    return NestedInput(name, kind, items)


def _required(entry: dict[str, Any], field: str, kind: type, words: str) -> Any:
    if type(entry[field]) is not kind:
        raise ValueError(f"{field!r} has {entry[field]!r}, which is not {words}")
    return entry[field]


def _value(value: Any) -> Any:
    if not storable(value):
        raise ValueError(f"'value' has {value!r}, which is not a flag, a finite number, a text or null")
    return value


def storable(value: Any) -> bool:
    """Return whether a value that is neither a tensor nor a container can be stored as it is."""
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def tensors(given: Iterable[Input]) -> Iterator[InputSpec]:
    """Yield the tensors in example inputs, in their order."""
    for item in given:
        if isinstance(item, InputSpec):
            yield item
        elif isinstance(item, NestedInput):
            yield from tensors(item.items)
