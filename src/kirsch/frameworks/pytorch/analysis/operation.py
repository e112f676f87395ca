"""One operation during the analysis: its labeled tensors, its constants, and the origin of its integers."""

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

    from kirsch.frameworks.pytorch.analysis.integers import Comparison
    from kirsch.frameworks.pytorch.analysis.provenance import UserCall
    from kirsch.graph.facts import Facts
    from kirsch.graph.labels import Axis

INFERRED: Final = object()
"""Stands for a size that the framework infers from the tensor, so that a cut needs no change in the code."""


@dataclass
class OperationContext:
    """An operation with the labels of its arguments.

    Args:
        facts: object that collects the relations that the rule of the operator states.
        name: name of the operator without its overload, such as "conv2d".
        args, options: positional and keyword arguments; each tensor is a `Tensor` with labels.
        shapes: shapes of the results.
        call: the call in the user's code that created the operation; None if it is unknown.
        labels_of: function that returns the labels of an axis whose size the code read; raises KeyError if they are
            unknown.
        macs: function that returns the multiply-accumulates of the operation before any cut.
        keeps_scale: function that returns whether an attention can keep its scale when a part of its width is removed.
        is_weight: function that returns whether a tensor is computed from parameters and constants only.
        is_selection: function that returns whether a tensor consists of matrices that indices select from a weight with
            three axes, such as those of experts.
        softmax: the option `softmax` of `kirsch.trace`.
        is_residual: function that returns whether an addition is residual.
        batch: number of samples in the example inputs.
        tied: `id` of each integer of the call that a rule has tied to the size of an axis.
    """

    facts: Facts
    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    shapes: list[tuple[int, ...]]
    call: UserCall | None
    labels_of: Callable[[SizeOf], Axis]
    macs: Callable[[], int] = lambda: 0
    keeps_scale: Callable[[Axis], bool] = lambda _: True
    is_weight: Callable[[Tensor], bool] = lambda _: False
    is_selection: Callable[[Tensor], bool] = lambda _: False
    softmax: str = "freeze"
    is_residual: Callable[[], bool] = lambda: False
    batch: int = 1
    tied: set[int] = field(default_factory=set)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first result."""
        return self.shapes[0]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by position or keyword."""
        return self.args[position] if len(self.args) > position else self.options.get(name, default)

    def tensors(self) -> list[Tensor]:
        """Return all tensors among the arguments."""
        return list(_tensors((self.args, self.options)))

    def traced_arg(self, position: int, name: str) -> Any:
        """Return an argument of the user's call, whose integers carry their origin; None if the call is unknown."""
        if self.call is None:
            return None
        if len(self.call.arguments) > position:
            return self.call.arguments[position]
        return self.call.options.get(name)

    def freeze_all(self, reason: str) -> list[Tensor]:
        """Freeze all axes of all arguments, and return the results without labels."""
        relations.freeze(self.facts, self.tensors(), reason)
        for tensor in self.tensors():
            self.facts.freeze(tensor.points, reason)
        self.facts.cost("macs", self.macs(), ())
        return [Tensor.of(shape) for shape in self.shapes]

    def tie_size(self, axis: Axis, size: Any, less: int = 0) -> Axis:
        """Require that a size in the code changes with its axis; freeze the axis if the size cannot change.

        Args:
            axis: labels of the axis with this size; None if the size must not change.
            size: the size as the code gives it: an integer with or without a known origin, -1, or `INFERRED`; None if
                it is unknown.
            less: the number of labels minus the size; 1 for the index of the last position.

        Returns:
            The labels of the axis, unchanged.
        """
        if isinstance(size, TracedInt):
            self.tied.add(id(size))
        if axis is None:
            if isinstance(size, TracedInt):
                self.pin(size)
            return None
        if size is INFERRED or (type(size) is int and size == -1):
            return axis
        fits = isinstance(size, TracedInt) and size == len(axis) - less
        expression = self.expression(size) if fits else None
        if expression is not None:
            self.facts.demand(axis, expression, -less)
        elif isinstance(size, TracedInt):
            reason = f"the size {size} of the axis is computed from values that cannot change"
            self.facts.freeze(axis, reason, number=True)
        elif isinstance(size, int):
            self.facts.freeze(axis, f"the size {size} of the axis is a number in the code", number=True)
        else:
            self.facts.freeze(axis, "the size of the axis is set by code that is not traced", number=True)
        return axis

    def can_tie(self, size: Any) -> bool:
        """Return whether a size in the code can change with an axis."""
        return size is INFERRED or (isinstance(size, TracedInt) and self.expression(size) is not None)

    def mark_activated(self, tensor: Tensor) -> None:
        """Mark the axes of a tensor as "activated": the tensor is not the output of a linear map."""
        for axis in tensor.axes:
            self.facts.mark(axis, "activated")

    def mark_weight(self, value: object, use: str) -> None:
        """Mark the axes of a value, if it is a tensor computed from parameters and constants only."""
        if isinstance(value, Tensor) and self.is_weight(value):
            for axis in value.axes:
                self.facts.mark(axis, use)

    def pin(self, number: TracedInt) -> None:
        """Require that an integer of the code keeps its value."""
        expression = self.expression(number)
        if expression is not None:
            self.facts.pin(number, expression)

    def add_comparison(self, comparison: Comparison) -> None:
        """Require that a comparison in the code keeps its result, unless it only chooses between branches.

        If a size must equal an attribute, the attribute must change with the size. If a size must equal a number in the
        code, the axis is frozen. Any other comparison is a condition on the plan. A comparison that only chooses is
        recorded, so that an error of the verification can name it.
        """
        sides = (comparison.left, comparison.right)
        expressions = [self.expression(side) if isinstance(side, TracedInt) else None for side in sides]
        if any(isinstance(side, TracedInt) and not self._known(side) for side in sides):
            return
        if comparison.chooses:
            self._condition(comparison, [e for e in expressions if e is not None])
            return
        left, right = expressions
        plain = [e.sizes[0] if e is not None and e.plain and e.sizes else None for e in expressions]
        if not comparison.equal:
            self._condition(comparison, [e for e in expressions if e is not None])
        elif plain[0] is not None and right is not None:
            self.facts.demand(plain[0], right)
        elif plain[1] is not None and left is not None:
            self.facts.demand(plain[1], left)
        elif left is not None and right is not None:
            self._condition(comparison, [left, right], must=True)
        else:
            for expression, number in ((left, sides[1]), (right, sides[0])):
                if expression is None:
                    continue
                if expression.plain and expression.sizes:
                    reason = f"the size of the axis is compared with {int(number)}, a number in the code"
                    self.facts.freeze(expression.sizes[0], reason, number=True)
                else:  # an expression of attributes and sizes can be solved for an attribute
                    must = expression.plain or bool(expression.sizes and expression.leaves)
                    self._condition(comparison, [expression], must=must)

    def _condition(self, comparison: Comparison, parts: list[Expression], *, must: bool = False) -> None:
        """Record a comparison as a choice if it only chooses, as a demand if `must`, and as a condition otherwise.

        `parts` are the operands that are known as expressions.
        """
        if not parts:
            return
        leaves = dict(pair for part in parts for pair in part.leaves)
        sizes = {labels.tobytes(): labels for part in parts for labels in part.sizes}
        left, right = (
            self.expression(side) if isinstance(side, TracedInt) else None
            for side in (comparison.left, comparison.right)
        )

        def compute(values: Mapping[object, int]) -> int:
            first = int(comparison.left) if left is None else left.compute(values)
            second = int(comparison.right) if right is None else right.compute(values)
            return int(bool(comparison.compare(first, second)))

        result = Expression(compute, tuple(leaves.items()), tuple(sizes.values()))
        if comparison.chooses:
            self.facts.choose(result, holds=comparison.result)
        elif must:
            self.facts.pin(int(comparison.result), result)
        else:
            self.facts.condition(result, holds=comparison.result)

    def _known(self, number: TracedInt) -> bool:
        """Return whether the labels are known for all tensor sizes from which an integer is computed."""
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
        """Return an integer of the code as an expression of attributes and sizes; None if a part is unknown."""
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


def dims_of(dims: Any, rank: int) -> list[int]:
    """Return the dimensions of an operator as non-negative indices; None or an empty list means all dimensions."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return [int(dim) % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]


def unlabeled_size(tensor: Tensor, dims: Sequence[int]) -> int:
    """Return the product of the sizes of the given axes that have no labels."""
    return int(np.prod([tensor.shape[dim] for dim in dims if tensor.axes[dim] is None], initial=1))
