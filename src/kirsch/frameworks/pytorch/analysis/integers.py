"""Integers that remember their origin through arithmetic, and record how the model's code uses them."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.fx import interpreter

from kirsch.frameworks.pytorch.analysis.guards import compares, guards, guards_in_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType

PACKAGES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[3]))
"""Folders of PyTorch and Kirsch; code in other folders is the user's."""

INTERPRETER = interpreter.__file__
"""The file that runs the operations of `torch.fx` graphs."""

MAX_DEPTH = 100
"""Largest depth of nested computations that is recorded. Computing the sum of a long loop again would exceed the
recursion limit of Python."""


@dataclass(frozen=True)
class LostOrigin:
    """A traced integer that became a plain number, and the line of code: "file.py:12"."""

    number: TracedInt
    source: str


@dataclass(frozen=True)
class Comparison:
    """A comparison with a traced integer.

    Args:
        left, right: the operands.
        compare: function that compares two integers.
        result: the result before any cut.
        source: the line of code, "" for an operation of a graph.
        chooses: whether the comparison only selects between branches that both return a result. Otherwise the model's
            code raises an exception if the result of the comparison changes.
    """

    left: int
    right: int
    compare: Callable[[int, int], bool]
    result: bool
    source: str
    chooses: bool = False

    @property
    def equal(self) -> bool:
        """Return whether the comparison states that both operands are equal."""
        return (self.compare, self.result) in ((operator.eq, True), (operator.ne, False))


class TracedInt(int):
    """An integer that can be computed again for other values of its leaves: attributes and sizes of tensors.

    The origin is lost if the result of an operation is not an integer, as in `width ** -0.5`, in a conversion such as
    `int(width)`, in a negation, and in computations that are nested more deeply than `MAX_DEPTH`. After a cut, the code
    would still use the old value. Each such operation is recorded in `events`.
    """

    compute: Callable[[Mapping[object, int]], int]
    leaves: tuple[tuple[object, int], ...]
    events: list[LostOrigin | Comparison]
    depth: int

    def __new__(
        cls,
        value: int,
        compute: Callable[[Mapping[object, int]], int],
        leaves: tuple[tuple[object, int], ...],
        events: list[LostOrigin | Comparison],
        depth: int = 0,
    ) -> Self:
        """Create an integer.

        Args:
            value: the value before any cut.
            compute: function from the values of the leaves to the value of the integer.
            leaves: each leaf with its value before any cut.
            events: list that lost origins and comparisons are appended to.
            depth: number of nested computations between the integer and its leaves.
        """
        created = super().__new__(cls, value)
        created.compute = compute
        created.leaves = leaves
        created.events = events
        created.depth = depth
        return created

    @classmethod
    def leaf(cls, value: int, leaf: object, events: list[LostOrigin | Comparison]) -> TracedInt:
        """Return an integer that is itself a leaf."""
        return cls(value, lambda values: values.get(leaf, value), ((leaf, value),), events)

    def lose(self) -> None:
        """Record that the integer becomes a plain number, with the line of the model's code."""
        frame = sys._getframe(1)  # noqa: SLF001 - `inspect.stack` is far too slow here
        while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGES):
            frame = frame.f_back
        self.events.append(LostOrigin(self, _line(frame)))

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int.__int__(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedInt:
        return self


def _line(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _arithmetic(name: str) -> Callable[[TracedInt, Any], Any]:
    plain = getattr(int, name)

    def method(self: TracedInt, other: Any) -> Any:
        result = plain(self, other)
        depth = 1 + max(self.depth, other.depth if isinstance(other, TracedInt) else 0)
        if type(result) is not int or depth > MAX_DEPTH:
            if result is not NotImplemented or isinstance(other, float):  # a tensor operand is recorded as a call
                for number in (self, other):
                    if isinstance(number, TracedInt):
                        number.lose()
            return result
        left = self.compute
        right = other.compute if isinstance(other, TracedInt) else lambda _values: other
        leaves = dict(self.leaves) | (dict(other.leaves) if isinstance(other, TracedInt) else {})
        return TracedInt(
            result, lambda values: plain(left(values), right(values)), tuple(leaves.items()), self.events, depth
        )

    return method


def _losing(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: TracedInt, *others: Any) -> Any:
        self.lose()
        return plain(self, *others)

    return method


def _comparing(name: str) -> Callable[..., Any]:
    plain, compare = getattr(int, f"__{name}__"), getattr(operator, name)

    def method(self: TracedInt, other: Any) -> Any:
        result = plain(self, other)
        if result is NotImplemented:
            return result
        frame = sys._getframe(1)  # noqa: SLF001 - as above
        path = frame.f_code.co_filename
        if path == INTERPRETER and guards_in_graph(frame):
            self.events.append(Comparison(self, other, compare, result, ""))
        elif not path.startswith(PACKAGES) and guards(frame, result, compares=True):
            self.events.append(Comparison(self, other, compare, result, _line(frame)))
        elif not path.startswith(PACKAGES) and compares(frame):
            self.events.append(Comparison(self, other, compare, result, _line(frame), chooses=True))
        return result

    return method


def _bool(self: TracedInt) -> bool:
    result = int.__bool__(self)
    frame = sys._getframe(1)  # noqa: SLF001 - as above
    if not frame.f_code.co_filename.startswith(PACKAGES) and guards(frame, result, compares=False):
        self.events.append(Comparison(self, 0, operator.ne, result, _line(frame)))
    return result


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow", "truediv"):
    for _side in ("", "r"):
        setattr(TracedInt, f"__{_side}{_name}__", _arithmetic(f"__{_side}{_name}__"))
for _name in ("int", "float", "neg", "abs", "round", "divmod", "rdivmod"):
    setattr(TracedInt, f"__{_name}__", _losing(f"__{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(TracedInt, f"__{_name}__", _comparing(_name))
setattr(TracedInt, "__bool__", _bool)  # noqa: B010 - mypy rejects a direct assignment
setattr(TracedInt, "__hash__", int.__hash__)  # noqa: B010 - likewise
