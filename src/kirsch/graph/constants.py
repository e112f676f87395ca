"""New values for the integers in the code of a model when units go.

A view that takes `self.heads` demands that it equal the number of indices kept on its axis; the attribute gets the
value that meets all its demands.
"""

from __future__ import annotations

from collections import ChainMap
from typing import TYPE_CHECKING

from kirsch.errors import PlanError
from kirsch.graph.expression import Leaf, Size

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from kirsch.graph.facts import Demand
    from kirsch.graph.labels import Labels


COMPARISON = "comparison"
"""Name of the operation of a demand that a comparison in the code makes."""

AS_GRAPH = "trace the model with kirsch.trace(..., as_graph=True), which gives its operations without its code"


def solve(
    demands: Sequence[Demand], kept: Callable[[Labels], int], conditions: Sequence[Demand] = ()
) -> dict[Leaf, int]:
    """New values of the attributes so that every demand is met; only those that change.

    Args:
        demands: what the code needs.
        kept: label array → how many of its labels stay.
        conditions: answers of comparisons in the code, which must stay what they are.

    Raises:
        PlanError: no value of an attribute meets its demands, or a comparison would turn out otherwise; names the
            attribute and the line.
    """
    today: dict[object, int] = {leaf: value for demand in demands for leaf, value in demand.expression.leaves}
    values = _settled(demands, kept)
    for demand in demands:
        found, wanted = _found(demand, values), _wanted(demand, kept)
        if found != wanted:
            if demand.operation.name == COMPARISON:
                raise _turned(demand, kept)
            raise PlanError(
                f"No value of {demand.names} fits the plan.",
                f"{demand.operation.source or demand.operation.name} needs {wanted}, and would get {found}.",
                f"Exclude the layers it belongs to, compute the size from the tensor's own shape, or {AS_GRAPH}.",
            )
    for condition in broken(demands, conditions, kept):
        raise _turned(condition, kept)
    return {leaf: values[leaf] for leaf, value in today.items() if isinstance(leaf, Leaf) and values[leaf] != value}


def _turned(condition: Demand, kept: Callable[[Labels], int]) -> PlanError:
    """Return the error for a comparison whose answer changes."""
    sizes = [f"a size of {len(labels)} that becomes {kept(labels)}" for labels in condition.expression.sizes]
    read = [*sizes, *(f"`{leaf}`" for leaf, _ in condition.expression.leaves)]
    return PlanError(
        f"A comparison at {condition.operation.source or 'an operation of the graph'} does not allow the plan.",
        f"It reads {', '.join(read)}, and would turn out otherwise than in the original.",
        f"Cut another number of units, as with round_to, exclude the layers that it looks at, or {AS_GRAPH}.",
    )


def unmet(demands: Sequence[Demand], kept: Callable[[Labels], int]) -> list[Demand]:
    """The demands that would make `solve` fail."""
    values = _settled(demands, kept)
    return [demand for demand in demands if _found(demand, values) != _wanted(demand, kept)]


def broken(demands: Sequence[Demand], conditions: Sequence[Demand], kept: Callable[[Labels], int]) -> list[Demand]:
    """The conditions whose answer changes."""
    if not conditions:
        return []
    values = _settled(demands, kept)
    values |= {Size(axis.tobytes()): kept(axis) for condition in conditions for axis in condition.expression.sizes}
    return [condition for condition in conditions if _found(condition, values) != condition.constant]


def _settled(demands: Sequence[Demand], kept: Callable[[Labels], int]) -> dict[object, int]:
    """The best values of all attributes and sizes."""
    values: dict[object, int] = {leaf: value for demand in demands for leaf, value in demand.expression.leaves}
    values |= {Size(axis.tobytes()): kept(axis) for demand in demands for axis in demand.expression.sizes}
    known = set[object]()
    while alone := _alone(demands, known):  # each round may leave just one attribute open in further demands
        for leaf, own in alone.items():
            values[leaf] = _value(leaf, own, values, kept)
        known.update(alone)
    return values


def _wanted(demand: Demand, kept: Callable[[Labels], int]) -> int:
    return kept(demand.labels) + demand.constant


def _found(demand: Demand, values: Mapping[object, int]) -> int | None:
    """What the expression of a demand gives; None if it divides by a size of which nothing is left."""
    try:
        return demand.expression.compute(values)
    except ZeroDivisionError:
        return None


def _alone(demands: Sequence[Demand], known: Container[object]) -> dict[Leaf, list[Demand]]:
    """Attributes that are the only open one of some demands, with these demands."""
    alone: dict[Leaf, list[Demand]] = {}
    for demand in demands:
        still = [leaf for leaf, _ in demand.expression.leaves if leaf not in known]
        if len(still) == 1:
            alone.setdefault(still[0], []).append(demand)
    return alone


def _value(leaf: Leaf, own: Sequence[Demand], values: dict[object, int], kept: Callable[[Labels], int]) -> int:
    """The value of an attribute that meets all its own demands; today's if there is none, for `solve` to refuse.

    Where only numbers that must stay what they are tell of it, it keeps its relation to the sizes: equal to one, or the
    same multiple. Any other value must be the only one that fits: each size is divisible by 1.
    """
    today, wanted = values[leaf], [_wanted(demand, kept) for demand in own]

    def fits(candidate: int) -> bool:
        trial = ChainMap[object, int]({leaf: candidate}, values)
        return all(_found(demand, trial) == number for demand, number in zip(own, wanted, strict=True))

    sizes = [(len(labels), kept(labels)) for demand in own for labels in demand.expression.sizes]
    related = bool(sizes) and not any(len(demand.labels) for demand in own)
    if related:
        equal = [now for before, now in sizes if before == today]
        likely = [*equal, today, *(today * now // before for before, now in sizes if today * now % before == 0)]
    else:
        likely = [*wanted, today]
    found = next((candidate for candidate in likely if fits(candidate)), None)
    if found is not None:
        return found
    others = [candidate for candidate in range(1 + max(today, *(now for _, now in sizes), 0)) if fits(candidate)]
    return others[0] if others and not (related and len(others) > 1) else today
