"""Ties and freezes of axes whose sizes are set by integers in the model's code.

If the second axis of `x.reshape(n, c, -1)` is frozen, `c` must keep its value. Two axes whose sizes come from one
attribute must lose the same number of units. A demand (see `kirsch.graph.facts`) states that an expression of integers
in the code equals the number of kept indices of an axis. Random choices of units show which demands cannot be met.
Sizes are sums and products of numbers of kept labels, so a demand that is met for several random choices is almost
certainly met for all choices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.graph import constants
from kirsch.graph.constants import COMPARISON
from kirsch.graph.expression import Size
from kirsch.graph.facts import Freeze

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.coupling import Coupling
    from kirsch.graph.facts import Demand
    from kirsch.graph.group import Group
    from kirsch.graph.labels import Labels

TRIALS = 8
"""Number of random choices. Each plan is checked again, in case none of them violates a demand that cannot be met."""


def code_constraints(
    demands: Sequence[Demand], conditions: Sequence[Demand], coupling: Coupling, groups: Sequence[Group]
) -> tuple[list[tuple[Labels, Labels]], list[Freeze]]:
    """Return the ties that failing demands need, or the freezes if no tie helps; both empty if no demand fails.

    A tie may be enough for other demands, too, so nothing is frozen while something can be tied. A condition that fails
    whenever its sizes change is treated as a demand. Any other condition is only checked for each plan.
    """
    ties: list[tuple[Labels, Labels]] = []
    freezes: dict[int, Freeze] = {}
    for demand in _failing(demands, conditions, coupling, groups):
        partner = _partner(demand, demands, coupling)
        if partner is not None:
            ties.append((partner, demand.labels))
        if ties:
            continue
        to_freeze = [demand]
        if all(coupling.frozen[coupling.component[labels]].all() for labels in _axes_of(demand)):
            # The axes of the demand are frozen already: it fails because other demands change its attributes.
            leaves = {leaf for leaf, _ in demand.expression.leaves}
            to_freeze = [other for other in demands if leaves & {leaf for leaf, _ in other.expression.leaves}]
        reason = _reason(demand)
        for other in to_freeze:
            labels = np.unique(np.concatenate(_axes_of(other)))
            if not coupling.frozen[coupling.component[labels]].all():
                operation = demand.operation if demand.operation.name == COMPARISON else other.operation
                freezes.setdefault(id(other), Freeze(labels, reason, operation, number=True))
    return ties, [] if ties else list(freezes.values())


def _reason(demand: Demand) -> str:
    """Return why an axis is frozen by a demand, for messages."""
    has_leaves = bool(demand.expression.leaves)
    if demand.operation.name == COMPARISON:
        return f"a comparison in the code reads the size of the axis{f' and {demand.names}' if has_leaves else ''}"
    if not has_leaves and not len(demand.labels):
        return "the code uses the size of the axis as a number"
    return f"{demand.names} cannot be updated when the axis is pruned"


def _failing(
    demands: Sequence[Demand], conditions: Sequence[Demand], coupling: Coupling, groups: Sequence[Group]
) -> list[Demand]:
    """Return the demands that fail for a random choice, and the conditions that fail whenever a size they read changes.

    A condition whose sizes no choice changes does not fail and is not returned. A demand that is a comparison of sizes
    and attributes with a number, such as `width % heads == 0`, is treated as a condition.
    """
    failing: dict[int, Demand] = {}
    both = [*demands, *conditions]
    loose = [demand for demand in demands if _compares_sizes(demand)]
    components = {id(labels): coupling.component[labels] for demand in both for labels in _axes_of(demand)}
    never_held = {id(condition): condition for condition in [*conditions, *loose]}
    loose_ids, failed_once = {id(demand) for demand in loose}, set[int]()
    for keep in _random_choices(coupling, groups) if both and groups else ():
        counts = {key: int(np.count_nonzero(keep[axis])) for key, axis in components.items()}

        def kept(labels: Labels, counts: dict[int, int] = counts) -> int:
            return counts[id(labels)]

        unmet = {id(demand): demand for demand in constants.unmet(demands, kept)}
        failing |= {name: demand for name, demand in unmet.items() if name not in loose_ids}
        broken = {id(condition) for condition in constants.broken(demands, conditions, kept)}
        failed_once |= broken | unmet.keys() & loose_ids
        broken |= {id(demand) for demand in loose if not _holds_now(demand, kept)}
        for condition in [*conditions, *loose]:
            changed = any(kept(labels) != len(labels) for labels in condition.expression.sizes)
            if id(condition) not in broken and (changed or not condition.expression.sizes):
                never_held.pop(id(condition), None)
    failing |= {key: condition for key, condition in never_held.items() if key in failed_once}
    return list(failing.values())


def _compares_sizes(demand: Demand) -> bool:
    """Return whether a demand is a comparison of sizes and attributes with a number."""
    expression = demand.expression
    return (
        demand.operation.name == COMPARISON and not len(demand.labels) and bool(expression.sizes and expression.leaves)
    )


def _holds_now(demand: Demand, kept: Callable[[Labels], int]) -> bool:
    """Return whether a demand without labels is met if sizes become the kept ones and attributes do not change."""
    values: dict[object, int] = dict(demand.expression.leaves)
    values |= {Size(labels.tobytes()): kept(labels) for labels in demand.expression.sizes}
    try:
        return demand.expression.compute(values) == demand.constant
    except ZeroDivisionError:
        return False


def _random_choices(coupling: Coupling, groups: Sequence[Group]) -> Iterator[NDArray[np.bool_]]:
    """Yield masks of kept components (sets of coupled labels).

    Each group loses a random number of random units, possibly none.
    """
    random = np.random.default_rng(0)
    for _ in range(TRIALS):
        keep = np.ones(len(coupling.frozen), bool)
        for group in groups:
            count = int(random.integers(0, group.size))
            keep[group.components_of(random.choice(group.size, count, replace=False))] = False
        yield keep


def _partner(demand: Demand, demands: Sequence[Demand], coupling: Coupling) -> Labels | None:
    """Return the labels of an axis that must be tied to the axis of a demand; None if no tie meets the demand.

    Candidates are the axis whose size the demand reads, and axes with a demand on the same single attribute.
    """
    labels, expression = demand.labels, demand.expression
    if not expression.plain or not len(labels):
        return None
    same_leaf = [d for d in demands if d.expression.plain and d.expression.leaves == expression.leaves]
    candidates = [*expression.sizes, *(other.labels for other in same_leaf if expression.leaves)]
    return next((axis for axis in candidates if len(axis) == len(labels) and _tieable(coupling, axis, labels)), None)


def _tieable(coupling: Coupling, first: Labels, second: Labels) -> bool:
    """Return whether two axes are not yet tied and neither is frozen.

    A tie to a frozen axis would freeze the other axis, too, and messages would not name the attribute as the reason.
    """
    one, other = coupling.component[first], coupling.component[second]
    return bool((one != other).any() and not coupling.frozen[one].any() and not coupling.frozen[other].any())


def _axes_of(demand: Demand) -> list[Labels]:
    return [demand.labels, *demand.expression.sizes]
