"""Integers in the code of a model that must follow when units go: which attribute each comes from, and its new value.

A user's forward says `x.view(n, self.heads, -1)`. The 8 of `self.heads` reaches the analysis as an `Expression` over
the *leaf* (module path, "heads"); the view demands that it equal the number of indices kept on that axis. A number
that is written out in the code has no leaf and cannot follow: its axis is frozen instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kirsch.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kirsch.graph.labels import Labels, Operation


@dataclass(frozen=True)
class Leaf:
    """An integer attribute of a module, or one place of a tuple attribute.

    Args:
        module: path of the module.
        attribute: name of the attribute.
        index: place in the tuple or list, None for a plain integer.
    """

    module: str
    attribute: str
    index: int | None = None

    def __str__(self) -> str:
        place = "" if self.index is None else f"[{self.index}]"
        return f"{self.module}.{self.attribute}{place}".lstrip(".")


@dataclass(frozen=True)
class Size:
    """The size of an axis of a tensor that the code reads at run time: it follows by itself."""

    labels: bytes  # the label array's bytes: hashable, and the same for the same labels


@dataclass(frozen=True)
class Expression:
    """An integer computed from leaves and sizes.

    Args:
        compute: values of the leaves and sizes → the integer.
        leaves: the attributes it depends on, with today's values.
        sizes: the axis sizes it depends on, as label arrays.
    """

    compute: Callable[[Mapping[object, int]], int]
    leaves: tuple[tuple[Leaf, int], ...]
    sizes: tuple[Labels, ...]


@dataclass(frozen=True)
class Demand:
    """`expression` must equal the number of `labels` that are kept."""

    labels: Labels
    expression: Expression
    operation: Operation


def solve(demands: Sequence[Demand], kept: Callable[[Labels], int]) -> dict[Leaf, int]:
    """New values of the attributes so that every demand is met; only those that change.

    Args:
        demands: what the code needs.
        kept: label array → how many of its labels stay.

    Raises:
        PlanError: no value of an attribute meets its demands; names the attribute and the line.
    """
    today: dict[object, int] = {leaf: value for demand in demands for leaf, value in demand.expression.leaves}
    known: dict[object, int] = {Size(axis.tobytes()): kept(axis) for d in demands for axis in d.expression.sizes}
    for demand in sorted(demands, key=lambda demand: len(demand.expression.leaves)):
        _settle(demand, kept(demand.labels), known)
    for demand in demands:
        found, wanted = demand.expression.compute({**today, **known}), kept(demand.labels)
        if found != wanted:
            names = ", ".join(f"`{leaf}`" for leaf, _ in demand.expression.leaves) or "a size read at run time"
            raise PlanError(
                f"No value of {names} fits the plan.",
                f"{demand.operation.source or demand.operation.name} needs {wanted}, and would get {found}.",
                "Exclude the layers it belongs to, or compute the size from the tensor's own shape.",
            )
    changed = [leaf for leaf, value in today.items() if isinstance(leaf, Leaf) and known.get(leaf, value) != value]
    return {leaf: known[leaf] for leaf in changed}


def _settle(demand: Demand, wanted: int, known: dict[object, int]) -> None:
    """Fix the one attribute of an expression that is still open, if there is just one."""
    expression = demand.expression
    still = [(leaf, value) for leaf, value in expression.leaves if leaf not in known]
    if len(still) != 1:
        return
    leaf, value = still[0]
    values: dict[object, int] = {**dict(expression.leaves), **known}
    for candidate in (wanted, value, *range(1, value + 1)):
        if expression.compute({**values, leaf: candidate}) == wanted:
            known[leaf] = candidate
            return
