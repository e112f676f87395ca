"""New values of the integers in the model's code after pruning.

`x.view(n, self.heads, -1)` demands that `self.heads` equals the number of indices that are kept on the second axis of
the view. Each attribute is set to the value that meets all its demands.
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
"""Name of the operation of a demand that comes from a comparison in the code."""

AS_GRAPH = "trace the model with kirsch.trace(..., as_graph=True), which prunes the traced program instead of the code"


def solve(
    demands: Sequence[Demand], kept: Callable[[Labels], int], conditions: Sequence[Demand] = ()
) -> dict[Leaf, int]:
    """Return the new values of the attributes that must change so that every demand is met.

    Args:
        demands: requirements of the model's code.
        kept: takes a label array and returns the number of kept labels.
        conditions: comparisons in the model's code whose results must not change.

    Raises:
        PlanError: no value of an attribute meets its demands, or the result of a comparison would change; the message
            names the attribute and the line.
    """
    present: dict[object, int] = {leaf: value for demand in demands for leaf, value in demand.expression.leaves}
    values = _solved_values(demands, kept)
    for demand in demands:
        computed, required = _computed(demand, values), _required(demand, kept)
        if computed != required:
            if demand.operation.name == COMPARISON:
                raise _changed_comparison(demand, kept)
            result = "divide by 0" if computed is None else f"give {computed}"
            raise PlanError(
                f"No value of {demand.names} fits the plan."
                if demand.expression.leaves
                else "The plan does not fit a size that the code reads at run time.",
                f"{demand.operation.source or demand.operation.name} requires {required}; the code would {result}.",
                f"Exclude the layers of this size, compute the size from the shape of the tensor, or {AS_GRAPH}.",
            )
    for condition in broken(demands, conditions, kept):
        raise _changed_comparison(condition, kept)
    return {leaf: values[leaf] for leaf, value in present.items() if isinstance(leaf, Leaf) and values[leaf] != value}


def _changed_comparison(demand: Demand, kept: Callable[[Labels], int]) -> PlanError:
    """Return the error for a comparison whose result would change."""
    sizes = [f"a size that changes from {len(labels)} to {kept(labels)}" for labels in demand.expression.sizes]
    operands = [*sizes, *(f"`{leaf}`" for leaf, _ in demand.expression.leaves)]
    return PlanError(
        f"The plan changes the result of a comparison at {demand.operation.source or 'an operation of the graph'}.",
        f"The comparison reads {', '.join(operands)}.",
        f"Remove another number of units, e.g. with round_to, exclude the layers of these sizes, or {AS_GRAPH}.",
    )


def unmet(demands: Sequence[Demand], kept: Callable[[Labels], int]) -> list[Demand]:
    """Return the demands that `solve` cannot meet."""
    values = _solved_values(demands, kept)
    return [demand for demand in demands if _computed(demand, values) != _required(demand, kept)]


def broken(demands: Sequence[Demand], conditions: Sequence[Demand], kept: Callable[[Labels], int]) -> list[Demand]:
    """Return the conditions whose result changes."""
    if not conditions:
        return []
    values = _solved_values(demands, kept)
    values |= {Size(axis.tobytes()): kept(axis) for condition in conditions for axis in condition.expression.sizes}
    return [condition for condition in conditions if _computed(condition, values) != condition.constant]


def _solved_values(demands: Sequence[Demand], kept: Callable[[Labels], int]) -> dict[object, int]:
    """Return values of all attributes and sizes; they meet all demands that can be met."""
    values: dict[object, int] = {leaf: value for demand in demands for leaf, value in demand.expression.leaves}
    values |= {Size(axis.tobytes()): kept(axis) for demand in demands for axis in demand.expression.sizes}
    solved = set[object]()
    while determined := _determined(demands, solved):  # solved attributes may determine others through shared demands
        for leaf, leaf_demands in determined.items():
            values[leaf] = _value(leaf, leaf_demands, values, kept)
        solved.update(determined)
    return values


def _required(demand: Demand, kept: Callable[[Labels], int]) -> int:
    return kept(demand.labels) + demand.constant


def _computed(demand: Demand, values: Mapping[object, int]) -> int | None:
    """Return the value of a demand's expression; None if it divides by a size that has become 0."""
    try:
        return demand.expression.compute(values)
    except ZeroDivisionError:
        return None


def _determined(demands: Sequence[Demand], solved: Container[object]) -> dict[Leaf, list[Demand]]:
    """Return each attribute that is the only unsolved attribute of a demand, with all such demands."""
    determined: dict[Leaf, list[Demand]] = {}
    for demand in demands:
        unsolved = [leaf for leaf, _ in demand.expression.leaves if leaf not in solved]
        if len(unsolved) == 1:
            determined.setdefault(unsolved[0], []).append(demand)
    return determined


def _value(leaf: Leaf, demands: Sequence[Demand], values: dict[object, int], kept: Callable[[Labels], int]) -> int:
    """Return the value of an attribute that meets the demands. If there is none, return the present value.

    If all demands require constants, as in `size // self.each == 4`, several values can fit. They are tried in this
    order: the new size if the attribute equals a size, the present value, and the present value times the ratio of a
    new to an old size. Any other value is used only if it is the only one that fits: a small value such as 1, which
    divides every size, often fits by chance.
    """
    present, required = values[leaf], [_required(demand, kept) for demand in demands]

    def fits(candidate: int) -> bool:
        trial = ChainMap[object, int]({leaf: candidate}, values)
        return all(_computed(demand, trial) == number for demand, number in zip(demands, required, strict=True))

    sizes = [(len(labels), kept(labels)) for demand in demands for labels in demand.expression.sizes]
    related = bool(sizes) and not any(len(demand.labels) for demand in demands)
    if related:
        equal = [now for before, now in sizes if before == present]
        multiples = [present * now // before for before, now in sizes if present * now % before == 0]
        likely = [*equal, present, *multiples]
    else:
        likely = [*required, present]
    value = next((candidate for candidate in likely if fits(candidate)), None)
    if value is not None:
        return value
    others = [candidate for candidate in range(1 + max(present, *(now for _, now in sizes), 0)) if fits(candidate)]
    return others[0] if others and not (related and len(others) > 1) else present
