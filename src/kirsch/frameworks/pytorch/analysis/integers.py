"""Integers that remember where they came from, through arithmetic, and note what is asked of them."""

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
"""Where the code lies that is not the user's."""

INTERPRETER = interpreter.__file__
"""What runs the operations of graphs."""


@dataclass(frozen=True)
class Lost:
    """A traced integer that became a plain number, and the line of code: "file.py:12"."""

    number: TracedInt
    source: str


@dataclass(frozen=True)
class Compared:
    """A comparison of two integers, of which one at least has a past.

    Args:
        left, right: what is compared.
        compare: of two integers.
        result: today's.
        source: the line of code, "" for an operation of a graph.
        chooses: whether it only chooses between two ways; the model's code raises if any other turns out otherwise.
    """

    left: int
    right: int
    compare: Callable[[int, int], bool]
    result: bool
    source: str
    chooses: bool = False

    @property
    def equal(self) -> bool:
        """Whether it says that both are equal."""
        return (self.compare, self.result) in ((operator.eq, True), (operator.ne, False))


class TracedInt(int):
    """An integer that knows how to compute itself again from its leaves.

    Where that knowledge ends, as in `width ** -0.5`, it enters itself in the list `lost`: what is left of the model's
    code then holds today's value, wherever it goes.
    """

    compute: Callable[[Mapping[object, int]], int]
    leaves: tuple[tuple[object, int], ...]
    lost: list[Lost | Compared]
    depth: int

    def __new__(
        cls,
        value: int,
        compute: Callable[[Mapping[object, int]], int],
        leaves: tuple[tuple[object, int], ...],
        lost: list[Lost | Compared],
        depth: int = 0,
    ) -> Self:
        """An integer of this value with this past; `depth` computations lie between it and its leaves."""
        made = super().__new__(cls, value)
        made.compute = compute
        made.leaves = leaves
        made.lost = lost
        made.depth = depth
        return made

    @classmethod
    def leaf(cls, value: int, leaf: object, lost: list[Lost | Compared]) -> TracedInt:
        """An integer that is a leaf itself."""
        return cls(value, lambda values: values.get(leaf, value), ((leaf, value),), lost)

    def lose(self) -> None:
        """Note that a plain number is made of it, and at which line of the model's code."""
        frame = sys._getframe(1)  # noqa: SLF001 - the one way to a caller's line that costs next to nothing
        while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGES):
            frame = frame.f_back
        self.lost.append(Lost(self, _line(frame)))

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int.__int__(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedInt:
        return self


def _line(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


DEEPEST = 100
"""Computations on computations that are remembered; redoing a sum over a long loop would exhaust the stack."""


def _arithmetic(name: str) -> Callable[[TracedInt, Any], Any]:
    plain = getattr(int, name)

    def method(self: TracedInt, other: Any) -> Any:
        result = plain(self, other)
        depth = 1 + max(self.depth, other.depth if isinstance(other, TracedInt) else 0)
        if type(result) is not int or depth > DEEPEST:
            if result is not NotImplemented or isinstance(other, float):  # a tensor's turn is seen as a call
                for number in (self, other):
                    if isinstance(number, TracedInt):
                        number.lose()
            return result
        theirs = other.compute if isinstance(other, TracedInt) else lambda _values: other
        leaves = dict(self.leaves) | (dict(other.leaves) if isinstance(other, TracedInt) else {})
        mine = self.compute
        past = tuple(leaves.items())
        return TracedInt(result, lambda values: plain(mine(values), theirs(values)), past, self.lost, depth)

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
            self.lost.append(Compared(self, other, compare, result, ""))
        elif not path.startswith(PACKAGES) and guards(frame, result, compares=True):
            self.lost.append(Compared(self, other, compare, result, _line(frame)))
        elif not path.startswith(PACKAGES) and compares(frame):
            self.lost.append(Compared(self, other, compare, result, _line(frame), chooses=True))
        return result

    return method


def _true(self: TracedInt) -> bool:
    result = int.__bool__(self)
    frame = sys._getframe(1)  # noqa: SLF001 - as above
    if not frame.f_code.co_filename.startswith(PACKAGES) and guards(frame, result, compares=False):
        self.lost.append(Compared(self, 0, operator.ne, result, _line(frame)))
    return result


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow", "truediv"):
    for _side in ("", "r"):
        setattr(TracedInt, f"__{_side}{_name}__", _arithmetic(f"__{_side}{_name}__"))
for _name in ("int", "float", "neg", "abs", "round", "divmod", "rdivmod"):
    setattr(TracedInt, f"__{_name}__", _losing(f"__{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(TracedInt, f"__{_name}__", _comparing(_name))
setattr(TracedInt, "__bool__", _true)  # noqa: B010 - for mypy, as those above
setattr(TracedInt, "__hash__", int.__hash__)  # noqa: B010 - likewise
