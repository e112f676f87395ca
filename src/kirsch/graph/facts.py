"""What the operations of a network say about its labels.

equality    two labels go together;
freeze      a label cannot go, with the reason;
grid        an array of cells with one *marginal* label per position of each of its axes: a cell goes exactly when one
            of its marginals goes. A reshape (C) -> (A, B) makes one, so that what is kept stays a product;
mark        what an operation uses labels as: the heads of an attention, the units of a recurrent state;
demand      an integer in the model's own code must equal the number of labels that are kept;
condition   the answer of a comparison in the model's code must stay what it is;
choice      the answer of a comparison that only chooses between two ways, which may change;
statistic   an operation averages over a labeled axis: its result depends on how many labels are kept;
floor       at least so many labels must be kept;
term        what an operation or a parameter costs: a coefficient times the kept counts of some label arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.graph.expression import Expression
    from kirsch.graph.labels import Axis, Labels, Tensor


@dataclass(frozen=True)
class Operation:
    """Where a fact comes from.

    Args:
        name: the operation, such as "aten.add".
        module: path of the module that runs it, "" for the model itself.
        source: line of the user's code, "file.py:12", or "".
        node: its own name in the framework's trace, "" for none.
    """

    name: str
    module: str = ""
    source: str = ""
    node: str = ""


@dataclass(frozen=True)
class Freeze:
    """Labels that cannot go, why, and where that was decided.

    Args:
        labels: that cannot go.
        reason: in words.
        operation: that decided it.
        boundary: whether it is an input or output, not an obstacle.
        number: whether a number in the model's code holds them, which the traced operations by themselves do not have.
    """

    labels: Labels
    reason: str
    operation: Operation
    boundary: bool = False
    number: bool = False


@dataclass(frozen=True)
class Grid:
    """Cells (n axes) and one array of marginal labels per axis, and the operation that made it."""

    cells: Labels
    marginals: tuple[Labels, ...]
    kind: str
    operation: Operation


@dataclass(frozen=True)
class Demand:
    """`expression` must equal the number of `labels` that are kept, plus `constant`."""

    labels: Labels
    expression: Expression
    operation: Operation
    constant: int = 0

    @property
    def names(self) -> str:
        """The attributes of the expression, for messages."""
        return ", ".join(f"`{leaf}`" for leaf, _ in self.expression.leaves) or "a size read at run time"


@dataclass(frozen=True)
class Term:
    """A cost: `coefficient` times the product of the kept counts of `factors`.

    Args:
        of: "parameters", "macs" or "activations".
        owner: path of the module that it belongs to.
        coefficient: the part that does not change.
        factors: label arrays.
    """

    of: str
    owner: str
    coefficient: float
    factors: tuple[Labels, ...]


@dataclass
class Facts:
    """All facts about one network, and the check that no label is lost on the way through an operation."""

    count: int = 1
    left: list[Labels] = field(default_factory=list)
    right: list[Labels] = field(default_factory=list)
    equated_by: list[Operation] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    demands: list[Demand] = field(default_factory=list)
    conditions: list[Demand] = field(default_factory=list)
    choices: list[Demand] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    statistics: set[str] = field(default_factory=set)
    floors: list[tuple[Labels, int]] = field(default_factory=list)
    marks: dict[str, list[Labels]] = field(default_factory=dict)
    operation: Operation = field(default_factory=lambda: Operation("parameter"))
    cause: Freeze | None = None
    _marginals: dict[tuple[tuple[int, ...], bytes], tuple[Labels, ...]] = field(default_factory=dict)
    _cells: dict[tuple[bytes, ...], Labels] = field(default_factory=dict)
    _number: int = 0
    _touched: NDArray[np.int32] = field(default_factory=lambda: np.zeros(1024, np.int32))

    def fresh(self, size: int) -> Labels:
        """`size` labels that nothing else has."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def equate(self, first: Axis, second: Axis) -> Axis:
        """Record that two axes are the same axis, position by position; gives the labels to go on with.

        An axis without labels cannot change, so one with labels that meets it is frozen.
        """
        if first is second or (first is None and second is None):
            return first
        if first is None or second is None:
            labels = first if second is None else second
            if self.cause is not None and labels is not None:  # an axis lost its labels there, upstream of here
                self.touch(labels)
                cause = self.cause
                found = np.unique(labels)
                self.freezes.append(Freeze(found, cause.reason, cause.operation, cause.boundary, cause.number))
            else:
                self.freeze(labels, "it meets an axis that cannot change")
            return None
        if len(first) != len(second):
            raise ValueError(f"axes of {len(first)} and {len(second)} cannot be equal")
        self.touch(first)
        self.touch(second)
        differs = first != second
        frozen = differs & ((first == 0) | (second == 0))
        if frozen.any():
            self.freeze(np.maximum(first[frozen], second[frozen]), "it meets an index that cannot change")
        tied = differs & ~frozen
        self.left.append(first if tied.all() else first[tied])
        self.right.append(second if tied.all() else second[tied])
        self.equated_by.append(self.operation)
        return first

    def freeze(self, axis: Axis, reason: str, *, boundary: bool = False, number: bool = False) -> None:
        """Record that the labels of an axis cannot go."""
        if axis is None:
            return
        self.touch(axis)
        labels = np.unique(axis)
        labels = labels[labels > 0]
        if len(labels):
            self.freezes.append(Freeze(labels, reason, self.operation, boundary, number))

    def reduce(self, axis: Axis) -> None:
        """Declare that an axis ends here on purpose: contracted, summed over, or not selected."""
        if axis is not None:
            self.touch(axis)

    def demand(self, axis: Axis, expression: Expression, constant: int = 0) -> None:
        """Record that an integer of the model's code must equal the number of labels kept on an axis, plus a constant.

        `constant`: such as -1 for the last position on the axis.
        """
        if axis is not None:
            self.demands.append(Demand(axis, expression, self.operation, constant))

    def pin(self, number: int, expression: Expression) -> None:
        """Record that an integer of the model's code must stay what it is."""
        self.demands.append(Demand(np.zeros(0, np.int64), expression, self.operation, number))

    def condition(self, expression: Expression, *, holds: bool) -> None:
        """Record a question of the model's code, 1 or 0, whose answer must stay what it is."""
        self.conditions.append(Demand(np.zeros(0, np.int64), expression, self.operation, int(holds)))

    def choose(self, expression: Expression, *, holds: bool) -> None:
        """Record a question by which the model's code chooses between two ways, for the message of a failed cut."""
        self.choices.append(Demand(np.zeros(0, np.int64), expression, self.operation, int(holds)))

    def mark(self, axis: Axis, use: str) -> None:
        """Note what an operation uses an axis as; see `group.KINDS`."""
        if axis is not None:
            self.marks.setdefault(use, []).append(axis)

    def statistic(self, axes: Sequence[Axis]) -> None:
        """Note that the operation computes a statistic over these axes, so that it follows what is kept."""
        if any(axis is not None for axis in axes):
            self.statistics.add(self.operation.node)

    def floor(self, axis: Axis, least: int) -> None:
        """Record that at least so many labels of an axis must be kept."""
        if axis is not None:
            self.floors.append((axis, least))

    def cost(self, of: str, coefficient: float, factors: Sequence[Axis], owner: str = "") -> None:
        """Record a cost; axes without labels belong into the coefficient."""
        labeled = tuple(axis for axis in factors if axis is not None)
        self.terms.append(Term(of, owner or self.operation.module, float(coefficient), labeled))

    def split(self, cells: Labels, kind: str) -> tuple[Axis, ...]:
        """One label array per axis of an array of cells: what a reshape (C) -> (A, B, ...) puts on the new axes.

        An axis along which the cells do not vary carries none. Where two or more vary, each gets marginals of its own
        and a grid ties them to the cells; the same cells seen again give the same marginals.
        """
        self.touch(cells.ravel())
        varies = [
            axis for axis in range(cells.ndim) if cells.shape[axis] > 1 and (cells != cells.take([0], axis)).any()
        ]
        out: list[Axis] = [None] * cells.ndim
        if not varies:
            self.freeze(cells.ravel(), "one unit fills the whole axis")
            return tuple(out)
        core = np.ascontiguousarray(cells[tuple(slice(None) if axis in varies else 0 for axis in range(cells.ndim))])
        if len(varies) == 1:
            out[varies[0]] = core
            return tuple(out)
        key = (core.shape, core.tobytes())
        if key not in self._marginals:
            self._remember(core, tuple(self.fresh(size) for size in core.shape), kind)
        for axis, marginal in zip(varies, self._marginals[key], strict=True):
            out[axis] = marginal
        return tuple(out)

    def merge(self, axes: Sequence[Axis], sizes: Sequence[int], kind: str) -> Axis:
        """The labels of one axis made of several, (A, B, ...) -> (A*B*...): the way back from `split`.

        Axes without labels repeat the labels of the others.
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
                self._remember(self.fresh(int(np.prod(shape))).reshape(shape), tuple(labeled), kind)
            cells = self._cells[key]
        shape = tuple(1 if axis is None else size for axis, size in zip(axes, sizes, strict=True))
        return np.ascontiguousarray(np.broadcast_to(cells.reshape(shape), tuple(sizes)).ravel())

    def _remember(self, cells: Labels, marginals: tuple[Labels, ...], kind: str) -> None:
        self._marginals[(cells.shape, cells.tobytes())] = marginals
        self._cells[tuple(marginal.tobytes() for marginal in marginals)] = cells
        self.grids.append(Grid(cells, marginals, kind, self.operation))

    def touch(self, labels: Labels) -> None:
        """Note that the present operation has dealt with these labels."""
        if self.count > len(self._touched):
            grown = np.zeros(2 * self.count, np.int32)
            grown[: len(self._touched)] = self._touched
            self._touched = grown
        self._touched[labels] = self._number

    def begin(self, operation: Operation, cause: Freeze | None = None) -> None:
        """Start the account of an operation. `cause`: why its inputs have no labels, if something took them."""
        self.operation = operation
        self.cause = cause
        self._number += 1

    def lost(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Labels:
        """Labels that entered the present operation and neither came out nor were equated, frozen or declared reduced.

        A rule that loses a label is the one way to be silently wrong; the caller treats any as an error.
        """
        for tensor in outputs:
            for axis in tensor.axes:
                if axis is not None:
                    self.touch(axis)
        entered = [axis for tensor in inputs for axis in tensor.axes if axis is not None]
        if not entered:
            return np.zeros(0, np.int64)
        self.touch(np.zeros(1, np.int64))
        missing: Labels = np.unique(np.concatenate([axis[self._touched[axis] != self._number] for axis in entered]))
        return missing
