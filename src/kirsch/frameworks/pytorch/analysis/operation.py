"""One operation on its way through the analysis: its tensors, its constants, and where those came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kirsch.frameworks.pytorch.analysis.integers import TracedInt
from kirsch.frameworks.pytorch.analysis.provenance import SizeOf
from kirsch.graph import relations
from kirsch.graph.expression import Expression, Leaf, Size
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kirsch.frameworks.pytorch.analysis.integers import Compared
    from kirsch.frameworks.pytorch.analysis.provenance import Call
    from kirsch.graph.facts import Facts
    from kirsch.graph.labels import Axis

FOLLOWS: Final = object()
"""In place of a size: the framework computes it from the tensor itself, so it follows whatever is kept."""


@dataclass
class Step:
    """An operation with the labels of its arguments.

    Args:
        facts: gathers what the rule finds.
        name: of the operator, without overload: "conv2d".
        args, options: its arguments; tensors are `Tensor`s.
        shapes: of its results.
        call: the call of the user's code that it came from, None if that is unknown.
        labels_of: the labels of a size that the code read at run time; raises KeyError where they are unknown.
        macs: the multiply-accumulates of the operation as it stands.
        keeps_scale: whether the scale of an attention can stay what it is when a part of its width, an axis, goes.
        is_weight: whether a tensor is made of parameters and constants alone.
        softmax: see `kirsch.trace`.
        is_residual: whether an addition adds something to what it is computed from.
        batch: number of samples among the example inputs.
        settled: the integers of the call, by identity, that a rule has tied to an axis.
    """

    facts: Facts
    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    shapes: list[tuple[int, ...]]
    call: Call | None
    labels_of: Callable[[SizeOf], Axis]
    macs: Callable[[], int] = lambda: 0
    keeps_scale: Callable[[Axis], bool] = lambda _: True
    is_weight: Callable[[Tensor], bool] = lambda _: False
    softmax: str = "freeze"
    is_residual: Callable[[], bool] = lambda: False
    batch: int = 1
    settled: set[int] = field(default_factory=set)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first result."""
        return self.shapes[0]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        return self.args[position] if len(self.args) > position else self.options.get(name, default)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return list(_tensors((self.args, self.options)))

    def given(self, position: int, name: str) -> Any:
        """The same argument as the user's call gave it, with its provenance; None if the call is unknown."""
        if self.call is None:
            return None
        if len(self.call.arguments) > position:
            return self.call.arguments[position]
        return self.call.options.get(name)

    def freeze_all(self, reason: str) -> list[Tensor]:
        """Freeze whatever the operation touches; gives its results, without labels."""
        relations.freeze(self.facts, self.tensors(), reason)
        for tensor in self.tensors():
            self.facts.freeze(tensor.points, reason)
        self.facts.cost("macs", self.macs(), ())
        return [Tensor.of(shape) for shape in self.shapes]

    def follow(self, axis: Axis, given: Any, less: int = 0) -> Axis:
        """See to it that a size in the code can follow its axis; freeze the axis where it cannot.

        Args:
            axis: the labels whose number the size must equal; None where it must stay what it is.
            given: the size as the code gives it: an integer with or without provenance, -1, or `FOLLOWS`.
            less: how much less than the size it is, as the last position on the axis is 1 less.

        Returns:
            The labels to go on with.
        """
        if isinstance(given, TracedInt):
            self.settled.add(id(given))
        if axis is None:
            if isinstance(given, TracedInt):
                self.pin(given)
            return None
        if given is FOLLOWS or (type(given) is int and given == -1):
            return axis
        fits = isinstance(given, TracedInt) and given == len(axis) - less
        expression = self.expression(given) if fits else None
        if expression is not None:
            self.facts.demand(axis, expression, -less)
        elif isinstance(given, TracedInt):
            self.facts.freeze(axis, f"its size {given} comes from what cannot change", number=True)
        else:
            size = f"its size {given} is a number in the code" if isinstance(given, int) else "its size is fixed here"
            self.facts.freeze(axis, size, number=True)
        return axis

    def can_follow(self, given: Any) -> bool:
        """Whether a size in the code can follow an axis that changes."""
        return given is FOLLOWS or (isinstance(given, TracedInt) and self.expression(given) is not None)

    def activated(self, tensor: Tensor) -> None:
        """Note that something other than a linear map gave these values."""
        for axis in tensor.axes:
            self.facts.mark(axis, "activated")

    def pin(self, number: TracedInt) -> None:
        """Record that an integer of the code must stay what it is today."""
        expression = self.expression(number)
        if expression is not None:
            self.facts.pin(number, expression)

    def compared(self, found: Compared) -> None:
        """Hold the code to the answer that a comparison gives today.

        A size that equals an attribute demands that the attribute follows it; one that equals a number in the code is
        frozen. Any other answer is a condition that a plan has to meet.
        """
        sides = (found.left, found.right)
        expressions = [self.expression(side) if isinstance(side, TracedInt) else None for side in sides]
        if any(isinstance(side, TracedInt) and not self._known(side) for side in sides):
            return
        if found.chooses:
            self._condition(found, [e for e in expressions if e is not None])
            return
        first, second = expressions
        plain = [e.sizes[0] if e is not None and e.plain and e.sizes else None for e in expressions]
        if not found.equal:
            self._condition(found, [e for e in expressions if e is not None])
        elif plain[0] is not None and second is not None:
            self.facts.demand(plain[0], second)
        elif plain[1] is not None and first is not None:
            self.facts.demand(plain[1], first)
        elif first is not None and second is not None:
            self._condition(found, [first, second], must=True)
        else:
            for expression, other in ((first, sides[1]), (second, sides[0])):
                if expression is None:
                    continue
                if expression.plain and expression.sizes:
                    reason = f"its size is compared with {int(other)}, a number in the code"
                    self.facts.freeze(expression.sizes[0], reason, number=True)
                else:  # what an attribute has to do with a size can be solved for the attribute
                    must = expression.plain or bool(expression.sizes and expression.leaves)
                    self._condition(found, [expression], must=must)

    def _condition(self, found: Compared, parts: list[Expression], *, must: bool = False) -> None:
        if not parts:
            return
        leaves = dict(pair for part in parts for pair in part.leaves)
        sizes = {labels.tobytes(): labels for part in parts for labels in part.sizes}
        first, second = (
            self.expression(side) if isinstance(side, TracedInt) else None for side in (found.left, found.right)
        )

        def compute(values: Mapping[object, int]) -> int:
            left = int(found.left) if first is None else first.compute(values)
            right = int(found.right) if second is None else second.compute(values)
            return int(bool(found.compare(left, right)))

        whole = Expression(compute, tuple(leaves.items()), tuple(sizes.values()))
        if found.chooses:
            self.facts.choose(whole, holds=found.result)
        elif must:
            self.facts.pin(int(found.result), whole)
        else:
            self.facts.condition(whole, holds=found.result)

    def _known(self, number: TracedInt) -> bool:
        """Whether the tensors are known whose sizes an integer comes from."""
        for leaf, value in number.leaves:
            if isinstance(leaf, SizeOf):
                try:
                    labels = self.labels_of(leaf)
                except KeyError:
                    return False
                if labels is not None and len(labels) != value:
                    return False
        return True

    def expression(self, number: TracedInt) -> Expression | None:
        """An integer of the code as an expression over attributes and sizes; None if part of its past is unknown."""
        leaves: list[tuple[Leaf, int]] = []
        sizes: dict[SizeOf, Any] = {}
        for leaf, value in number.leaves:
            if isinstance(leaf, Leaf):
                leaves.append((leaf, value))
            elif isinstance(leaf, SizeOf):
                try:
                    labels = self.labels_of(leaf)
                except KeyError:
                    return None
                if labels is not None and len(labels) == value:
                    sizes[leaf] = labels
                elif labels is not None:
                    return None
        if not leaves and not sizes:
            return None

        def compute(values: Mapping[object, int]) -> int:
            known: dict[object, int] = {leaf: values[leaf] for leaf, _ in leaves if leaf in values}
            known |= {leaf: values[Size(labels.tobytes())] for leaf, labels in sizes.items()}
            return number.compute(known)

        return Expression(compute, tuple(leaves), tuple(sizes.values()), plain=not number.depth)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def axes_of(dims: Any, rank: int) -> list[int]:
    """Axes as an operator gives them (None or empty: all; negative: from the end), as positions."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return [int(dim) % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]


def unlabeled(tensor: Tensor, dims: Sequence[int]) -> int:
    """The product of the sizes of those of some axes that carry no labels."""
    return int(np.prod([tensor.shape[dim] for dim in dims if tensor.axes[dim] is None], initial=1))
