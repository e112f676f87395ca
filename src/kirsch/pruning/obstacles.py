"""Error for an unreachable goal, with the layers that prevent it and the options that reach it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kirsch import figures
from kirsch.errors import GoalError, KirschError
from kirsch.graph.cost_names import WORDS
from kirsch.graph.facts import INPUTS
from kirsch.pruning.by_hand import kept_units
from kirsch.pruning.notes import absent_kind_notes
from kirsch.pruning.selection import exclusions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.cost import Cost
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Goal
    from kirsch.pruning.options import PlanOptions

MAX_SHOWN = 3
MIN_SHARE = 0.01
"""Smallest share of the cost that a cause must have to be named in the error."""
MIN_KEEPS = (0.05, 0.02, 0.01, 0.001)
"""Values of `min_keep` that are tried, after the default, in the search for options that reach the goal."""
MAX_PATTERNS = 20
"""Largest number of patterns of `exclude` that are tried in this search."""


@dataclass(frozen=True)
class Least:
    """The least cost that plans with some options reach, the components that such a plan keeps, and its blocks.

    Args:
        cost: the cost.
        keep: mask of the components that stay.
        without: paths of the removed residual blocks.
    """

    cost: Cost
    keep: NDArray[np.bool_]
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChangedOptions:
    """Changed options, and a description of the change."""

    words: str
    options: PlanOptions


def unreachable(graph: Graph, goal: Goal, options: PlanOptions, least: Callable[[PlanOptions], Least]) -> GoalError:
    """Return the error for a goal that no plan with these options reaches.

    Args:
        graph: graph of the model.
        goal: the goal that is missed.
        options: options of the plan.
        least: takes options, and returns the least cost that plans with these options reach.
    """
    reached = least(options)

    def shortfall(change: ChangedOptions) -> str:
        try:
            cost = least(change.options).cost
        except KirschError as error:  # an importance may fail on a layer that is excluded now
            return f"this error occurs: {error.what.rstrip('.')}"
        if goal.met_by(cost, graph.cost):
            return ""
        fractions = goal.fractions(cost, graph.cost)
        remaining = {WORDS[name]: figures.distinct_percents(*pair)[0] for name, pair in fractions.items()}
        return f"{' and '.join(f'{value} of the {word}' for word, value in remaining.items())} remain"

    causes = _causes(graph, goal, options, reached)
    nothing = ""
    if reached.cost == graph.cost:
        notes = absent_kind_notes(graph, options)
        nothing = " ".join(["Nothing can be removed with these options.", *notes, ""])
    fixes = (_fix(options, graph, shortfall), reachable(goal, reached.cost, graph.cost))
    return GoalError(
        f"No plan for {graph.model_name} reaches the goal: {goal.shortfall(reached.cost, graph.cost)}.",
        f"{nothing}The remaining cost is: {'; '.join(causes)}." if causes else nothing.strip(),
        f"{' '.join(filter(None, fixes))}{graph.without_numbers}",
    )


def reachable(goal: Goal, least: Cost, original: Cost) -> str:
    """Return a sentence with the closest goal that the least cost meets; empty if nothing can be removed."""
    limits = {
        name: limit if value <= limit else math.ceil(value * 1000) / 1000
        for name, (value, limit) in goal.fractions(least, original).items()
    }
    if any(limit >= 1 for limit in limits.values()):
        return ""
    return f"With the options given, use the goal {', '.join(f'{name}={limit:g}' for name, limit in limits.items())}."


# --------------------------------------------------------------------------------------- causes of the remaining cost


def _causes(graph: Graph, goal: Goal, options: PlanOptions, least: Least) -> list[str]:
    """Return the layers with most of the remaining cost, their shares of the original, and the reasons."""
    fractions = goal.fractions(least.cost, graph.cost)
    missed = max(fractions, key=lambda name: fractions[name][0] - fractions[name][1])
    word, total = WORDS[missed], getattr(graph.cost, missed)
    costs_by_cause: dict[str, dict[str, int]] = {}
    explain = _CauseFinder(graph, options)
    for owner, cost in graph.prices.shares(least.keep, missed).items():
        if cost and not f"{owner}.".startswith(tuple(f"{path}." for path in least.without)):
            costs_by_cause.setdefault(explain(owner, missed), {})[owner] = cost
    largest = sorted(costs_by_cause.items(), key=lambda item: -sum(item[1].values()))[:MAX_SHOWN]
    return [
        f"{sum(owners.values()) / total:.1%} of the {word} in {_layer_list(owners, total)}, {cause}"
        for cause, owners in largest
        if sum(owners.values()) >= MIN_SHARE * total or cause == largest[0][0]
    ]


def _layer_list(owners: dict[str, int], total: int) -> str:
    """Return the layers with the largest costs, each with its share if there are several."""
    names = sorted(owners, key=lambda name: -owners[name])
    shares = {name: f" ({owners[name] / total:.1%})" if len(names) > 1 else "" for name in names}
    words = [f"`{name}`" if name else "the model's own `forward`" for name in names]
    return figures.listed([f"{word}{shares[name]}" for word, name in zip(words, names, strict=True)], MAX_SHOWN)


class _CauseFinder:
    """Find the reason why a layer cannot be smaller."""

    def __init__(self, graph: Graph, options: PlanOptions) -> None:
        self._graph = graph
        self._options = options
        self._weights = options.kind_weights
        self._exclusions = exclusions(graph, options)
        self._by_hand = kept_units(graph, options)
        self._touching: dict[int, list[tuple[str, str]]] = {}  # tensor → (name, kind) of the groups on it
        for group in graph.groups:
            for name in dict.fromkeys(name for name, _ in group.footprint):
                self._touching.setdefault(id(graph.tensors[name]), []).append((group.name, group.kind))

    def __call__(self, owner: str, quantity: str) -> str:
        """Return the reason why a cost of a layer is not smaller, as a clause that follows the names of the layers."""
        graph = self._graph
        names = [name for name in graph.parameters if name.rpartition(".")[0] == owner]
        names = names or [name for name in graph.parameters if f"{name}.".startswith(f"{owner}." if owner else "")]
        if quantity == "memory":
            groups = self._groups_of_activations(owner)
            names = [] if owner == INPUTS else names
        else:
            groups = [group for name in names for group in self._touching.get(id(graph.tensors[name]), [])]
        if groups:
            return self._reason_of_groups(groups)
        if quantity == "memory" and not names:
            return "whose sizes do not depend on units that can be removed"
        return self._reason_of_freezes(names)

    def _reason_of_groups(self, groups: Sequence[tuple[str, str]]) -> str:
        """Return the option that keeps units of some groups, given by name and kind."""
        options = self._options
        kinds = sorted({kind for _, kind in groups if self._weights[kind] == 0})
        if kinds:
            return f"whose units have the kind {', '.join(map(repr, kinds))}, which `kinds` keeps"
        found = sorted({self._exclusions[name] for name, _ in groups if name in self._exclusions})
        if found:
            option = found[0].option
            if option == "kinds":
                return "the ranks of adapters, which are kept unless `kinds` names them"
            patterns = dict.fromkeys(pattern for why in found if why.option == option for pattern in why.patterns)
            setting = f"{option}={list(patterns)!r}"
            return f"which {setting} keeps unchanged" if option == "exclude" else f"whose units {setting} keeps"
        if any(name in self._by_hand for name, _ in groups):
            return "whose width `keep` sets"
        uniform = ", uniform=True" if options.uniform else ""
        return f"cut as far as min_keep={options.min_keep:g}, round_to={options.round_to!r}{uniform} allow"

    def _reason_of_freezes(self, names: Sequence[str]) -> str:
        """Return why no units of some parameters can be removed."""
        freezes = [freeze for name in names for freeze in self._graph.frozen_by(name)]
        obstacles = [f"{f.reason} ({f.operation.source or f.operation.module or f.operation.name})" for f in freezes]
        inner = list(
            dict.fromkeys(text for text, freeze in zip(obstacles, freezes, strict=True) if not freeze.boundary)
        )
        boundary = list(dict.fromkeys(freeze.reason for freeze in freezes if freeze.boundary))
        if inner:
            return f"frozen: {', '.join([*inner, *boundary][:MAX_SHOWN])}"
        return "whose units are inputs or outputs of the model"

    def _groups_of_activations(self, owner: str) -> list[tuple[str, str]]:
        """Return name and kind of the groups with units in the activations of a layer."""
        component, terms = self._graph.coupling.component, self._graph.facts.terms
        labels = [axis for term in terms if (term.quantity, term.owner) == ("memory", owner) for axis in term.factors]
        found = np.zeros(len(self._graph.coupling.frozen), bool)
        for axis in labels:
            found[component[axis]] = True
        return [(group.name, group.kind) for group in self._graph.groups if found[group.components].any()]


# --------------------------------------------------------------------------------------- options that reach the goal


def _fix(options: PlanOptions, graph: Graph, shortfall: Callable[[ChangedOptions], str]) -> str:
    """Return a sentence with changes of the options that reach the goal.

    `shortfall`: returns a clause on how a change misses the goal; empty if the change reaches the goal.
    """
    families = [family for family in map(list, _families(options, graph)) if family]
    single = [next((change for change in family if not shortfall(change)), None) for family in families]
    sufficient = [change.words for change in single if change is not None]
    if sufficient:
        return f"The goal is reached with {', or with '.join(sufficient)}."
    for size in range(2, len(families) + 1):
        for chosen in itertools.combinations(families, size):
            changes = [family[-1] for family in chosen]
            if shortfall(_joined(options, changes)):
                continue
            for index, family in enumerate(chosen):  # use the smallest sufficient change of each family
                trials = [[*changes[:index], change, *changes[index + 1 :]] for change in family]
                changes = next(trial for trial in trials if not shortfall(_joined(options, trial)))
            return f"The goal is reached with {_joined(options, changes).words}."
    loosest = _joined(options, [family[-1] for family in families])
    if shortfall(loosest) == shortfall(ChangedOptions("", options)):
        return "No option of kirsch.plan allows more units to be removed."
    return f"No options reach the goal: even with {loosest.words}, {shortfall(loosest)}."


def _families(options: PlanOptions, graph: Graph) -> Iterator[Iterator[ChangedOptions]]:
    """Yield the changes of each option that restricts the plan, the smallest change first."""
    yield _more_kinds(options, graph)
    yield _fewer_excluded(options)
    yield _fewer_by_hand(options)
    yield iter([ChangedOptions("uniform=False", options.changed(uniform=False))] if options.uniform else [])
    yield (ChangedOptions(f"round_to={n}", options.changed(round_to=n)) for n in _finer(options))
    default = type(options).model_fields["min_keep"].default
    smaller = {default: f"min_keep={default:g} (the default)"} | {keep: f"min_keep={keep:g}" for keep in MIN_KEEPS}
    yield (
        ChangedOptions(words, options.changed(min_keep=keep))
        for keep, words in smaller.items()
        if keep < options.min_keep
    )


def _finer(options: PlanOptions) -> list[int]:
    """Return smaller multiples than round_to, the largest first."""
    start = options.round_to if isinstance(options.round_to, int) else 4
    return [start >> shift for shift in range(1, start.bit_length())]


def _more_kinds(options: PlanOptions, graph: Graph) -> Iterator[ChangedOptions]:
    kinds, weights = options.kinds, options.kind_weights
    if kinds is None:
        return
    missing = [kind for kind in dict.fromkeys(group.kind for group in graph.groups) if weights[kind] == 0]
    for kind in missing:
        more: Sequence[str] | Mapping[str, float]
        more = {**kinds, kind: 1.0} if isinstance(kinds, Mapping) else (*kinds, kind)
        yield ChangedOptions(f"{kind!r} in kinds", options.changed(kinds=more))
    if len(missing) > 1:
        yield ChangedOptions("kinds=None (all kinds)", options.changed(kinds=None))


def _fewer_excluded(options: PlanOptions) -> Iterator[ChangedOptions]:
    """Yield changes of `exclude` and `keep_outputs`: `keep_outputs` in place of `exclude`, fewer or no patterns."""
    for pattern in options.exclude[:MAX_PATTERNS]:
        rest = tuple(other for other in options.exclude if other != pattern)
        outputs = (*options.keep_outputs, pattern)
        yield ChangedOptions(
            f"{pattern!r} in keep_outputs instead of exclude", options.changed(exclude=rest, keep_outputs=outputs)
        )
    for option in ("exclude", "keep_outputs"):
        patterns = getattr(options, option)
        for pattern in patterns[:MAX_PATTERNS]:
            rest = tuple(other for other in patterns if other != pattern)
            yield ChangedOptions(f"{option} without {pattern!r}", options.changed(**{option: rest}))
        if len(patterns) > 1:
            yield ChangedOptions(f"{option}=[]", options.changed(**{option: ()}))
    if options.exclude and options.keep_outputs:
        yield ChangedOptions("exclude=[] and keep_outputs=[]", options.changed(exclude=(), keep_outputs=()))


def _fewer_by_hand(options: PlanOptions) -> Iterator[ChangedOptions]:
    """Yield `keep` without each of its patterns, and without all of them."""
    given = options.keep or {}
    for pattern in list(given)[:MAX_PATTERNS]:
        rest = {other: amount for other, amount in given.items() if other != pattern}
        yield ChangedOptions(f"keep without {pattern!r}", options.changed(keep=rest))
    if len(given) > 1:
        yield ChangedOptions("keep=None", options.changed(keep=None))


def _joined(options: PlanOptions, changes: Sequence[ChangedOptions]) -> ChangedOptions:
    """Return several changes as one."""
    fields = [
        {name: value for name, value in vars(change.options).items() if value != getattr(options, name)}
        for change in changes
    ]
    merged = {name: value for changed in fields for name, value in changed.items()}
    *first, last = [change.words for change in changes] or [""]
    return ChangedOptions(f"{', '.join(first)}{' and ' * bool(first)}{last}", options.changed(**merged))
