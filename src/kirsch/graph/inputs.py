"""Example inputs as a plan stores them, and their entries in a plan file.

{"name": "", "shape": [2, 3], "dtype": "float32", "high": 0}     a tensor
{"name": "flag", "value": true}                                  true, false, a number, a string or null
{"name": "", "kind": "list", "items": [...]}                     a "list", "tuple" or "dict" of such entries
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True)
class InputSpec:
    """Description of an example input that is a tensor, without its values.

    Args:
        name: name of the keyword argument, or key of the dict that contains the tensor; "" for a positional argument
            and for an item of a list or tuple.
        shape: sizes of all axes, including the batch axis.
        dtype: "float32", "int64", ...
        high: largest value of an integer input, so that random inputs stay in range.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    high: int = 0


@dataclass(frozen=True)
class InputValue:
    """An example input that is a bool, a number, a string or None.

    Args:
        name: see `InputSpec`.
        value: the value itself.
    """

    name: str
    value: bool | int | float | str | None


@dataclass(frozen=True)
class NestedInput:
    """An example input that is a list, a tuple or a dict.

    Args:
        name: see `InputSpec`.
        kind: "list", "tuple" or "dict".
        items: the items of the container, in order.
    """

    name: str
    kind: str
    items: tuple[Input, ...]


Input: TypeAlias = InputSpec | InputValue | NestedInput
"""An example input as a plan stores it: tensors without values, all other inputs with their values."""

CONTAINERS = ("list", "tuple", "dict")
"""Kinds of containers in a plan."""
TENSOR, VALUE, NESTED = ({"name", "shape", "dtype", "high"}, {"name", "value"}, {"name", "kind", "items"})
"""Fields of each kind of entry."""


def write(example: Input) -> dict[str, Any]:
    """Return an example input as JSON."""
    if isinstance(example, InputSpec):
        return {"name": example.name, "shape": list(example.shape), "dtype": example.dtype, "high": example.high}
    if isinstance(example, InputValue):
        return {"name": example.name, "value": example.value}
    return {"name": example.name, "kind": example.kind, "items": [write(item) for item in example.items]}


def read(entry: Any) -> Input:
    """Return the example input of an entry, the inverse of `write`.

    Raises:
        ValueError: the entry is not valid. The message names the field.
    """
    fields = set(entry) if isinstance(entry, dict) else set()
    if fields not in (TENSOR, VALUE, NESTED):
        forms = "; ".join(", ".join(sorted(form)) for form in (TENSOR, VALUE, NESTED))
        raise ValueError(f"the fields of the input {entry!r} must be one of: {forms}")
    name = _required(entry, "name", str, "a string")
    if fields == TENSOR:
        shape = _required(entry, "shape", list, "a list")
        wrong = [size for size in shape if type(size) is not int or size < 0]
        if wrong:
            raise ValueError(f"'shape' contains {wrong[0]!r}, which is not an integer of at least 0")
        dtype, high = _required(entry, "dtype", str, "a string"), _required(entry, "high", int, "an integer")
        return InputSpec(name, tuple(shape), dtype, high)
    if fields == VALUE:
        return InputValue(name, _value(entry["value"]))
    kind, items = entry["kind"], tuple(map(read, _required(entry, "items", list, "a list")))
    if kind not in CONTAINERS:
        raise ValueError(f"'kind' is {kind!r}, which is not one of {', '.join(CONTAINERS)}")
    names = [item.name for item in items]
    if kind == "dict" and len(set(names)) < len(names):
        raise ValueError(f"the input {name!r} is a dict with a repeated key: {', '.join(names)}")
    return NestedInput(name, kind, items)


def _required(entry: dict[str, Any], field: str, kind: type, expected: str) -> Any:
    if type(entry[field]) is not kind:
        raise ValueError(f"{field!r} is {entry[field]!r}, which is not {expected}")
    return entry[field]


def _value(value: Any) -> Any:
    if not storable(value):
        raise ValueError(f"'value' is {value!r}, which is not a boolean, a finite number, a string or null")
    return value


def storable(value: Any) -> bool:
    """Return whether a plan can store a value that is neither a tensor nor a container."""
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def tensors(examples: Iterable[Input]) -> Iterator[InputSpec]:
    """Yield the tensors of example inputs in order, including those in containers."""
    for item in examples:
        if isinstance(item, InputSpec):
            yield item
        elif isinstance(item, NestedInput):
            yield from tensors(item.items)
