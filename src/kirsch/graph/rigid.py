"""Integers in the code of a model that no value fits once units go: what they hold is tied, or else frozen.

`x.reshape(n, c, heads, c // heads)` on an axis that does not change keeps `c` from changing; two axes whose sizes come
from one attribute must lose the same number. Whether a demand holds whatever is chosen is tried out: one that holds
for some random choices of quite different numbers holds for all, since sizes are sums and products of kept counts.
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
"""Random choices that are tried. Where none of them shows a demand that cannot be met, making the plan does."""


def rigid(
    demands: Sequence[Demand], conditions: Sequence[Demand], coupling: Coupling, groups: Sequence[Group]
) -> tuple[list[tuple[Labels, Labels]], list[Freeze]]:
    """What must be tied, or else frozen, for the demands to hold; both empty if they held for all that was tried.

    What is tied may let others follow, so nothing is frozen as long as something can be tied. A condition that holds
    for some of the choices leaves them to the plan; one that holds for none is a demand.
    """
    failing = _failing(demands, conditions, coupling, groups)
    ties: list[tuple[Labels, Labels]] = []
    freezes: dict[int, Freeze] = {}
    for demand in failing:
        partner = _partner(demand, demands, coupling)
        if partner is not None:
            ties.append((partner, demand.labels))
        if ties:
            continue
        held = [demand]
        if all(coupling.frozen[coupling.component[labels]].all() for labels in _touched(demand)):
            # What it touches itself is frozen already, so it fails by an attribute that other demands move.
            own = {leaf for leaf, _ in demand.expression.leaves}
            held = [other for other in demands if own & {leaf for leaf, _ in other.expression.leaves}]
        fixed = not len(demand.labels) and not demand.expression.leaves
        asked = demand.operation.name == COMPARISON
        reason = "the code uses its size as a number" if fixed else f"{demand.names} cannot follow it"
        reason = f"a comparison in the code reads it{_beside(demand)}" if asked else reason
        for other in held:
            labels = np.unique(np.concatenate(_touched(other)))
            if not coupling.frozen[coupling.component[labels]].all():
                where = demand.operation if asked else other.operation
                freezes.setdefault(id(other), Freeze(labels, reason, where, number=True))
    return ties, [] if ties else list(freezes.values())


def _beside(demand: Demand) -> str:
    return f" beside {demand.names}" if demand.expression.leaves else ""


def _failing(
    demands: Sequence[Demand], conditions: Sequence[Demand], coupling: Coupling, groups: Sequence[Group]
) -> list[Demand]:
    """The demands that are not met by every choice that is tried, and the conditions that no change of theirs meets.

    A comparison that today's attributes pass at another size, as of `width % heads` with 0, counts as a condition.
    """
    failing: dict[int, Demand] = {}
    both = [*demands, *conditions]
    loose = [demand for demand in demands if _asks_of_sizes(demand)]
    touched = {id(labels): coupling.component[labels] for demand in both for labels in _touched(demand)}
    hopeless = {id(condition): condition for condition in [*conditions, *loose]}
    hopeful, seen = {id(demand) for demand in loose}, set[int]()
    for keep in _choices(coupling, groups) if both and groups else ():
        left = {labels: int(np.count_nonzero(keep[components])) for labels, components in touched.items()}

        def kept(labels: Labels, left: dict[int, int] = left) -> int:
            return left[id(labels)]

        unmet = {id(demand): demand for demand in constants.unmet(demands, kept)}
        failing |= {name: demand for name, demand in unmet.items() if name not in hopeful}
        broken = {id(condition) for condition in constants.broken(demands, conditions, kept)}
        seen |= broken | unmet.keys() & hopeful
        broken |= {id(demand) for demand in loose if not _as_today(demand, kept)}
        for condition in [*conditions, *loose]:
            moves = any(kept(labels) != len(labels) for labels in condition.expression.sizes)
            if id(condition) not in broken and (moves or not condition.expression.sizes):
                hopeless.pop(id(condition), None)
    failing |= {name: condition for name, condition in hopeless.items() if name in seen}
    return list(failing.values())


def _asks_of_sizes(demand: Demand) -> bool:
    """Whether it is a comparison of sizes and attributes with a number."""
    expression = demand.expression
    return (
        demand.operation.name == COMPARISON and not len(demand.labels) and bool(expression.sizes and expression.leaves)
    )


def _as_today(demand: Demand, kept: Callable[[Labels], int]) -> bool:
    """Whether today's attributes meet a demand without labels at the sizes that are kept."""
    values: dict[object, int] = dict(demand.expression.leaves)
    values |= {Size(labels.tobytes()): kept(labels) for labels in demand.expression.sizes}
    try:
        return demand.expression.compute(values) == demand.constant
    except ZeroDivisionError:
        return False


def _choices(coupling: Coupling, groups: Sequence[Group]) -> Iterator[NDArray[np.bool_]]:
    """Random choices of components that stay; each group loses a number of its own, or nothing."""
    random = np.random.default_rng(0)
    for _ in range(TRIALS):
        keep = np.ones(len(coupling.frozen), bool)
        for group in groups:
            number = int(random.integers(0, group.size))
            keep[group.of(random.choice(group.size, number, replace=False))] = False
        yield keep


def _partner(demand: Demand, demands: Sequence[Demand], coupling: Coupling) -> Labels | None:
    """Labels that would meet a demand if they went along with its own, and do not yet: of the one size that it reads,
    or of another demand on the one attribute that it reads; None if there are none.
    """
    mine, expression = demand.labels, demand.expression
    if not expression.plain or not len(mine):
        return None
    alike = [d for d in demands if d.expression.plain and d.expression.leaves == expression.leaves]
    near = [*expression.sizes, *(other.labels for other in alike if expression.leaves)]
    return next((one for one in near if len(one) == len(mine) and _may_go(coupling, one, mine)), None)


def _may_go(coupling: Coupling, first: Labels, second: Labels) -> bool:
    """Whether tying two axes changes something and holds neither: one that is held is better named by its attribute."""
    one, other = coupling.component[first], coupling.component[second]
    return bool((one != other).any() and not coupling.frozen[one].any() and not coupling.frozen[other].any())


def _touched(demand: Demand) -> list[Labels]:
    return [demand.labels, *demand.expression.sizes]
