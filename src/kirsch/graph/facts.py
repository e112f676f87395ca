"""Facts about labels, recorded from the operations of a model.

equality    two labels that are removed together;
freeze      a label that cannot be removed, with the reason;
grid        an array of labels, its *cells*, with one *marginal* label per index of each axis, like the row and column
            headers of a table. A cell is removed if and only if one of its marginals is removed. A reshape
            (C) -> (A, B) adds a grid, because only whole rows or columns of the C channels can be removed after it;
mark        the role of labels in an operation, such as heads of an attention or units of a recurrent state;
demand      an integer in the model's code that must equal the number of kept labels;
condition   a comparison in the model's code whose result must not change;
choice      a comparison that only chooses between two branches, so its result may change;
statistic   an operation that averages over a labeled axis, so its result depends on the number of kept labels;
floor       a minimum number of labels to keep;
cost term   the cost of an operation or parameter: a coefficient times the numbers of kept labels of some axes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.graph.expression import Expression
    from kirsch.graph.labels import Axis, Labels, Tensor


@dataclass(frozen=True)
class Operation:
    """An operation of the model, from which facts are recorded.

    Args:
        name: name of the operation, such as "aten.add".
        module: path of the module that runs the operation, "" for the model itself.
        source: line of the user's code, such as "file.py:12", or "".
        node: name of the operation's node in the framework's trace, or "".
    """

    name: str
    module: str = ""
    source: str = ""
    node: str = ""


INPUTS = "inputs of the model"
"""Owner of the memory of the example inputs, in place of the path of a module."""

UNUSED = "the traced forward pass does not use the parameter"
"""Reason of the freeze of a parameter or buffer that no operation reads."""


@dataclass(frozen=True)
class Freeze:
    """Labels that cannot be removed.

    Args:
        labels: the labels.
        reason: the reason in words.
        operation: the operation that freezes the labels.
        boundary: whether the labels belong to an input or output of the model.
        number: whether the reason is a number in the model's code. The traced program does not contain such numbers.
    """

    labels: Labels
    reason: str
    operation: Operation
    boundary: bool = False
    number: bool = False


@dataclass(frozen=True)
class Grid:
    """An array of cells. A cell is kept if and only if all its marginals are kept.

    Args:
        cells: labels of the cells, n axes.
        marginals: one array of labels per axis of `cells`.
        kind: kind of the reshape, such as "view" or "conv groups".
        operation: the operation that adds the grid.
    """

    cells: Labels
    marginals: tuple[Labels, ...]
    kind: str
    operation: Operation


@dataclass(frozen=True)
class Demand:
    """Requirement that `expression` equals the number of kept `labels` plus `constant`."""

    labels: Labels
    expression: Expression
    operation: Operation
    constant: int = 0

    @property
    def names(self) -> str:
        """Names of the attributes in the expression, for messages."""
        return ", ".join(f"`{leaf}`" for leaf, _ in self.expression.leaves) or "a size read at run time"


@dataclass(frozen=True)
class CostTerm:
    """A cost: `coefficient` times the product, over `factors`, of the numbers of kept labels.

    Args:
        quantity: "parameters", "macs", "activations", "size" or "memory"; see `kirsch.graph.cost.Cost`.
        owner: path of the module that the cost belongs to.
        coefficient: product of the sizes of the axes without labels; for "size" and "memory", times the bytes of a
            number.
        factors: label arrays of the other axes.
        life: for "memory", the positions of the operations that write a tensor first and read it last.
    """

    quantity: str
    owner: str
    coefficient: float
    factors: tuple[Labels, ...]
    life: tuple[int, int] = (0, 0)


@dataclass
class Facts:
    """All facts about one model, and the check that no operation loses a label.

    Attributes:
        count: number of labels, including label 0.
        left, right: pairs of label arrays whose labels are removed together, element by element.
        equated_by: operation that ties each pair.
        freezes, grids, demands, conditions, choices, terms: the facts of each kind, in the order of the operations.
        uncounted: operations whose multiply-accumulates cannot be counted; the cost terms have 0 for them.
        statistics: graph nodes of the operations with statistics over labeled axes.
        floors: label arrays, with the minimum number of labels to keep.
        marks: role → label arrays.
        operation: the operation that is being recorded.
        cause: the freeze because of which an input of this operation has no labels; None if no input lost its labels.
    """

    count: int = 1
    left: list[Labels] = field(default_factory=list)
    right: list[Labels] = field(default_factory=list)
    equated_by: list[Operation] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    demands: list[Demand] = field(default_factory=list)
    conditions: list[Demand] = field(default_factory=list)
    choices: list[Demand] = field(default_factory=list)
    terms: list[CostTerm] = field(default_factory=list)
    uncounted: list[Operation] = field(default_factory=list)
    statistics: set[str] = field(default_factory=set)
    floors: list[tuple[Labels, int]] = field(default_factory=list)
    marks: dict[str, list[Labels]] = field(default_factory=dict)
    operation: Operation = field(default_factory=lambda: Operation("parameter"))
    cause: Freeze | None = None
    _marginals: dict[tuple[tuple[int, ...], bytes], tuple[Labels, ...]] = field(default_factory=dict)
    _cells: dict[tuple[bytes, ...], Labels] = field(default_factory=dict)
    _operation_number: int = 0
    _touched: NDArray[np.int32] = field(default_factory=lambda: np.zeros(1024, np.int32))

    def fresh(self, size: int) -> Labels:
        """Return `size` new labels."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def equate(self, first: Axis, second: Axis) -> Axis:
        """Record that two axes are the same axis, index by index, and return the labels of that axis.

        An axis without labels cannot change. If only one axis has labels, they are frozen, and None is returned.

        Raises:
            ValueError: the axes differ in length.
        """
        if first is second or (first is None and second is None):
            return first
        if first is None or second is None:
            labels = first if second is None else second
            if self.cause is not None and labels is not None:  # the other axis lost its labels upstream
                self.touch(labels)
                self.freezes.append(replace(self.cause, labels=np.unique(labels)))
            else:
                self.freeze(labels, "the axis is coupled to a frozen axis")
            return None
        if len(first) != len(second):
            raise ValueError(f"axes of {len(first)} and {len(second)} cannot be equal")
        self.touch(first)
        self.touch(second)
        differs = first != second
        frozen = differs & ((first == 0) | (second == 0))
        if frozen.any():
            self.freeze(np.maximum(first[frozen], second[frozen]), "the index is coupled to a frozen index")
        tied = differs & ~frozen
        self.left.append(first if tied.all() else first[tied])
        self.right.append(second if tied.all() else second[tied])
        self.equated_by.append(self.operation)
        return first

    def freeze(self, axis: Axis, reason: str, *, boundary: bool = False, number: bool = False) -> None:
        """Record that the labels of an axis cannot be removed. For the arguments see `Freeze`."""
        if axis is None:
            return
        self.touch(axis)
        labels = np.unique(axis)
        labels = labels[labels > 0]
        if len(labels):
            self.freezes.append(Freeze(labels, reason, self.operation, boundary, number))

    def reduce(self, axis: Axis) -> None:
        """Record that the operation contracts an axis, sums over it, or selects only some of its indices."""
        if axis is not None:
            self.touch(axis)

    def demand(self, axis: Axis, expression: Expression, constant: int = 0) -> None:
        """Record that an integer in the model's code must equal the number of labels kept on an axis plus `constant`.

        If the integer is the last index of the axis, `constant` is -1.
        """
        if axis is not None:
            self.demands.append(Demand(axis, expression, self.operation, constant))

    def pin(self, number: int, expression: Expression) -> None:
        """Record that an integer in the model's code must keep the value `number`."""
        self.demands.append(Demand(np.zeros(0, np.int64), expression, self.operation, number))

    def condition(self, expression: Expression, *, holds: bool) -> None:
        """Record a comparison in the model's code whose result must stay `holds`.

        The value of `expression` is 1 if the comparison is true, else 0.
        """
        self.conditions.append(Demand(np.zeros(0, np.int64), expression, self.operation, int(holds)))

    def choose(self, expression: Expression, *, holds: bool) -> None:
        """Record a comparison that only chooses a branch.

        Its result may change. If the pruned model then fails, the error names the line of the comparison.
        """
        self.choices.append(Demand(np.zeros(0, np.int64), expression, self.operation, int(holds)))

    def mark(self, axis: Axis, use: str) -> None:
        """Record the role of an axis in an operation, such as "head". The kinds of units follow from these roles."""
        if axis is not None:
            self.marks.setdefault(use, []).append(axis)

    def statistic(self, axes: Sequence[Axis]) -> None:
        """Record that the operation computes a statistic over these axes, which depends on the kept labels."""
        if any(axis is not None for axis in axes):
            self.statistics.add(self.operation.node)

    def floor(self, axis: Axis, least: int) -> None:
        """Record that at least `least` labels of an axis must be kept."""
        if axis is not None:
            self.floors.append((axis, least))

    def cost(
        self,
        quantity: str,
        coefficient: float,
        factors: Sequence[Axis],
        owner: str = "",
        life: tuple[int, int] = (0, 0),
    ) -> None:
        """Record a cost. `coefficient` must include the sizes of axes without labels; `owner` defaults to the module.

        For the arguments see `CostTerm`.
        """
        labeled = tuple(axis for axis in factors if axis is not None)
        self.terms.append(CostTerm(quantity, owner or self.operation.module, float(coefficient), labeled, life))

    def split(self, cells: Labels, kind: str) -> tuple[Axis, ...]:
        """Return the labels of the new axes after a reshape (C) -> (A, B, ...).

        Args:
            cells: labels of the split axis, reshaped to the new axes.
            kind: kind of the reshape; see `Grid`.

        Returns:
            One label array per axis of `cells`; None for an axis along which all cells have the same label. If the
            labels vary along two or more axes, each of these axes gets new labels, and a grid relates the new labels to
            the cells. A second call with the same cells returns the same labels.
        """
        self.touch(cells.ravel())
        varies = [
            axis for axis in range(cells.ndim) if cells.shape[axis] > 1 and (cells != cells.take([0], axis)).any()
        ]
        axes: list[Axis] = [None] * cells.ndim
        if not varies:
            self.freeze(cells.ravel(), "all indices of the axis belong to one unit")
            return tuple(axes)
        varying = np.ascontiguousarray(cells[tuple(slice(None) if axis in varies else 0 for axis in range(cells.ndim))])
        if len(varies) == 1:
            axes[varies[0]] = varying
            return tuple(axes)
        key = (varying.shape, varying.tobytes())
        if key not in self._marginals:
            self._add_grid(varying, tuple(self.fresh(size) for size in varying.shape), kind)
        for axis, marginal in zip(varies, self._marginals[key], strict=True):
            axes[axis] = marginal
        return tuple(axes)

    def merge(self, axes: Sequence[Axis], sizes: Sequence[int], kind: str) -> Axis:
        """Return the labels of the merged axis after a reshape (A, B, ...) -> (A*B*...), the inverse of `split`.

        Args:
            axes: labels of the merged axes; an axis without labels repeats the labels of the others.
            sizes: sizes of the merged axes.
            kind: kind of the reshape; see `Grid`.
        """
        labeled = [axis for axis in axes if axis is not None]
        if not labeled:
            return None
        for axis in labeled:
            self.touch(axis)
        if len(labeled) == 1:
            cells = labeled[0]
        else:
            key = tuple(axis.tobytes() for axis in labeled)
            if key not in self._cells:
                shape = tuple(len(axis) for axis in labeled)
                self._add_grid(self.fresh(int(np.prod(shape))).reshape(shape), tuple(labeled), kind)
            cells = self._cells[key]
        shape = tuple(1 if axis is None else size for axis, size in zip(axes, sizes, strict=True))
        return np.ascontiguousarray(np.broadcast_to(cells.reshape(shape), tuple(sizes)).ravel())

    def _add_grid(self, cells: Labels, marginals: tuple[Labels, ...], kind: str) -> None:
        self._marginals[(cells.shape, cells.tobytes())] = marginals
        self._cells[tuple(marginal.tobytes() for marginal in marginals)] = cells
        self.grids.append(Grid(cells, marginals, kind, self.operation))

    def touch(self, labels: Labels) -> None:
        """Record that the current operation accounts for these labels."""
        if self.count > len(self._touched):
            grown = np.zeros(2 * self.count, np.int32)
            grown[: len(self._touched)] = self._touched
            self._touched = grown
        self._touched[labels] = self._operation_number

    def begin(self, operation: Operation, cause: Freeze | None = None) -> None:
        """Start an operation; the facts recorded next belong to it.

        `cause`: the freeze because of which an input of the operation has no labels; None if no input lost its labels.
        """
        self.operation = operation
        self.cause = cause
        self._operation_number += 1

    def lost(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Labels:
        """Return labels of the inputs that are not in the outputs and were not equated, frozen or reduced.

        If the rule of an operator drops a label, the groups are wrong and nothing else shows it, so the caller must
        raise an error.
        """
        for tensor in outputs:
            for axis in tensor.axes:
                if axis is not None:
                    self.touch(axis)
        labeled = [axis for tensor in inputs for axis in tensor.axes if axis is not None]
        if not labeled:
            return np.zeros(0, np.int64)
        self.touch(np.zeros(1, np.int64))  # label 0 cannot be lost
        lost: Labels = np.unique(
            np.concatenate([axis[self._touched[axis] != self._operation_number] for axis in labeled])
        )
        return lost
