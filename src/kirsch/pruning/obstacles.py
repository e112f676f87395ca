"""Why no plan reaches a goal: what holds the cost that is left, and which other options were found to reach it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kirsch.errors import GoalError, KirschError
from kirsch.pruning.options import Options, excluded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.cost import Cost
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Goal

MOST_SHOWN = 3
SMALL = 0.01
"""A share that is not worth a word beside larger ones."""
SMALLER_KEEPS = (0.05, 0.02, 0.01, 0.001)
MOST_PATTERNS = 20
"""Patterns of `exclude` that are tried one by one."""


@dataclass(frozen=True)
class Least:
    """The least that plans with some options reach: the cost, and which components stay."""

    cost: Cost
    keep: NDArray[np.bool_]


@dataclass(frozen=True)
class Change:
    """Other options, and in words what is changed."""

    words: str
    options: Options


def unreachable(graph: Graph, goal: Goal, options: Options, least: Callable[[Options], Least]) -> GoalError:
    """The error for a goal that no plan with these options reaches.

    Args:
        graph: of the model.
        goal: that is missed.
        options: of the plan.
        least: options → the least that plans with them reach.
    """
    found = least(options)

    def missed(change: Change) -> str:
        try:
            return goal.shortfall(least(change.options).cost, graph.cost)
        except KirschError as error:  # an importance may fail on a layer that is left out today
            return error.what

    held = _held(graph, goal, options, found)
    return GoalError(
        f"No plan for {graph.model_name} reaches the goal: {goal.shortfall(found.cost, graph.cost)}.",
        f"What is left then: {'; '.join(held)}." if held else "",
        f"{_remedy(options, graph, missed)} {reachable(goal, found.cost, graph.cost)}{graph.without_numbers}",
    )


def reachable(goal: Goal, least: Cost, original: Cost) -> str:
    """The goal that the least cost meets, as a sentence."""
    limits = {
        name: limit if value <= limit else math.ceil(value * 1000) / 1000
        for name, (value, limit) in goal.fractions(least, original).items()
    }
    if any(limit >= 1 for limit in limits.values()):
        return "With these options nothing can be removed."
    return f"Or ask for {', '.join(f'{name}={limit:g}' for name, limit in limits.items())}, which is reached."


# ------------------------------------------------------------------------------------------------ what holds the rest


def _held(graph: Graph, goal: Goal, options: Options, least: Least) -> list[str]:
    """What holds most of the cost that is left, with its share of the original, in words."""
    reached = goal.fractions(least.cost, graph.cost)
    missed = max(reached, key=lambda name: reached[name][0] - reached[name][1])
    place, word, total = (
        (0, "parameters", graph.cost.parameters) if missed == "params" else (1, "MACs", graph.cost.macs)
    )
    causes: dict[str, dict[str, int]] = {}
    why = _Causes(graph, options)
    for owner, costs in graph.prices.by_owner(least.keep).items():
        if costs[place]:
            causes.setdefault(why.of(owner), {})[owner] = costs[place]
    largest = sorted(causes.items(), key=lambda item: -sum(item[1].values()))[:MOST_SHOWN]
    return [
        f"{sum(owners.values()) / total:.1%} of the {word} in {_listed(owners, total)}, {cause}"
        for cause, owners in largest
        if sum(owners.values()) >= SMALL * total or cause == largest[0][0]
    ]


def _listed(owners: dict[str, int], total: int) -> str:
    """The layers that hold most, each with its own share where there are several."""
    names = sorted(owners, key=lambda name: -owners[name])
    shares = {name: f" ({owners[name] / total:.1%})" if len(names) > 1 else "" for name in names}
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(f"`{name or 'the model itself'}`{shares[name]}" for name in names[:MOST_SHOWN]) + more


class _Causes:
    """Why a layer is not smaller."""

    def __init__(self, graph: Graph, options: Options) -> None:
        self._graph = graph
        self._options = options
        self._ease = options.ease
        self._excluded = excluded(graph, options.exclude)
        self._touching: dict[int, list[tuple[str, str]]] = {}  # tensor → (name, kind) of the groups on it
        for group in graph.groups:
            for name in dict.fromkeys(name for name, _ in group.footprint):
                self._touching.setdefault(id(graph.tensors[name]), []).append((group.name, group.kind))

    def of(self, owner: str) -> str:
        """In words, after the names of layers."""
        graph, options = self._graph, self._options
        names = [name for name in graph.parameters if name.rpartition(".")[0] == owner]
        names = names or [name for name in graph.parameters if f"{name}.".startswith(f"{owner}." if owner else "")]
        groups = [found for name in names for found in self._touching.get(id(graph.tensors[name]), [])]
        kinds = sorted({kind for _, kind in groups if self._ease[kind] == 0})
        if kinds:
            return f"whose units of the kind {', '.join(map(repr, kinds))} granularity leaves out"
        patterns = sorted({self._excluded[name] for name, _ in groups if name in self._excluded})
        if patterns:
            return f"which exclude={patterns!r} leaves as they are"
        if groups:
            alike = ", uniform=True" if options.uniform else ""
            return f"cut as far as min_keep={options.min_keep:g}, round_to={options.round_to!r}{alike} let them"
        freezes = [freeze for name in names for freeze in graph.frozen_by(name)]
        obstacles = [f"{f.reason} ({f.operation.source or f.operation.module or f.operation.name})" for f in freezes]
        own = list(dict.fromkeys(text for text, freeze in zip(obstacles, freezes, strict=True) if not freeze.boundary))
        ends = list(dict.fromkeys(freeze.reason for freeze in freezes if freeze.boundary))
        if own:
            return f"frozen: {', '.join([*own, *ends][:MOST_SHOWN])}"
        return "whose units are inputs or outputs of the model"


# ------------------------------------------------------------------------------------------------ what would reach it


def _remedy(options: Options, graph: Graph, missed: Callable[[Change], str]) -> str:
    """Changes of the options that were found to reach the goal, as a sentence.

    `missed`: by how much a change misses the goal, in words; empty where it reaches it.
    """
    families = [family for family in (list(found) for found in _families(options, graph)) if family]
    single = [next((change for change in family if not missed(change)), None) for family in families]
    found = [change.words for change in single if change is not None]
    if found:
        return f"It is reached with {', or with '.join(found)}."
    for size in range(2, len(families) + 1):
        for chosen in itertools.combinations(families, size):
            parts = [family[-1] for family in chosen]
            if missed(_joined(options, parts)):
                continue
            for place, family in enumerate(chosen):  # no more of each than is needed
                tries = [[*parts[:place], change, *parts[place + 1 :]] for change in family]
                parts = next(tried for tried in tries if not missed(_joined(options, tried)))
            return f"It is reached with {_joined(options, parts).words}."
    if not families:
        return "No option of kirsch.plan lets more go."
    loosest = _joined(options, [family[-1] for family in families])
    return f"No options reach it; with {loosest.words}: {missed(loosest)}."


def _families(options: Options, graph: Graph) -> Iterator[Iterator[Change]]:
    """For each option that holds something: its changes, the smallest first and the largest last."""
    yield _more_kinds(options, graph)
    yield _fewer_excluded(options)
    yield iter([Change("uniform=False", replace(options, uniform=False))] if options.uniform else [])
    yield (Change(f"round_to={n}", replace(options, round_to=n)) for n in _finer(options))
    smaller = [keep for keep in SMALLER_KEEPS if keep < options.min_keep]
    yield (Change(f"min_keep={keep:g}", replace(options, min_keep=keep)) for keep in smaller)


def _finer(options: Options) -> list[int]:
    """Smaller multiples than those of round_to, the largest first."""
    start = options.round_to if isinstance(options.round_to, int) else 4
    return [start >> shift for shift in range(1, start.bit_length())]


def _more_kinds(options: Options, graph: Graph) -> Iterator[Change]:
    given, ease = options.granularity, options.ease
    if given is None:
        return
    missing = [kind for kind in dict.fromkeys(group.kind for group in graph.groups) if ease[kind] == 0]
    for kind in missing:
        more: Sequence[str] | Mapping[str, float]
        if isinstance(given, Mapping):
            more = {**given, kind: 1.0}
        else:
            more = [*([given] if isinstance(given, str) else given), kind]
        yield Change(f"{kind!r} in granularity (--kind)", replace(options, granularity=more))
    if len(missing) > 1:
        yield Change("granularity=None (all kinds)", replace(options, granularity=None))


def _fewer_excluded(options: Options) -> Iterator[Change]:
    for pattern in list(options.exclude)[:MOST_PATTERNS]:
        rest = tuple(other for other in options.exclude if other != pattern)
        yield Change(f"exclude without {pattern!r}", replace(options, exclude=rest))
    if len(options.exclude) > 1:
        yield Change("nothing in exclude", replace(options, exclude=()))


def _joined(options: Options, changes: Sequence[Change]) -> Change:
    """Several changes at once."""
    fields = [
        {name: value for name, value in vars(change.options).items() if value != getattr(options, name)}
        for change in changes
    ]
    merged = {name: value for part in fields for name, value in part.items()}
    return Change(" and with ".join(change.words for change in changes), replace(options, **merged))
