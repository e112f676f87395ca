"""From a goal to a plan: which units go so that the cost lands on the goal."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from kirsch.annotations import Count, Names, Seed
from kirsch.arguments import checked
from kirsch.errors import GoalError, PlanError, UnknownNameError, UsageError
from kirsch.graph.graph import Graph
from kirsch.graph.group import KINDS
from kirsch.graph.plan import Goal, Plan, Removal
from kirsch.pruning.importance import IMPORTANCES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kirsch.graph.cost import Cost
    from kirsch.graph.group import Group

CLOSE = 0.01
"""How near below its goal a plan must land, as a fraction of the original."""

ALIGNED = 4
"""A width that this does not divide leaves the blocked layout of ONNX Runtime's convolutions.

Measured on x86: 63 channels take 1.6 times as long as 64, 7 times in a depthwise convolution.
"""


WHOLE = frozenset(["expert", "kv group", "head", "head in kv group", "conv group", "norm group", "block"])
"""Kinds whose number is that of whole parts, each of its own width; no runtime works on them in blocks."""


@checked
def plan(
    graph: Graph,
    goal: Goal,
    importance: str = "magnitude",
    scope: Literal["global", "local"] = "global",
    round_to: Count | Literal["auto"] | Mapping[str, Count] = "auto",
    exclude: Names = (),
    granularity: str | Sequence[str] | Mapping[str, float] | None = None,
    *,
    uniform: bool = False,
    norm: Literal[1, 2] = 2,
    min_keep: float = 0.1,
    seed: Seed = 0,
) -> Plan:
    """What to remove from a traced model so that it costs no more than the goal, and little less.

    Args:
        graph: of `kirsch.trace`.
        goal: fractions of the original cost.
        importance: name of how units are ranked: "magnitude" or "random".
        scope: "global" ranks all units together; "local" takes the same fraction of every group.
        round_to: how many units stay in each group is a multiple of this. "auto": 16 in groups of 32 units or more, 8
            from 16, 4 from 8, else 1, since runtimes work in blocks and widths between them cost time; halved, but
            not below 4, where the goal cannot be met closely otherwise; 1 for heads and other whole parts. By kind of
            unit: {"head dim": 8}; kinds not named are "auto".
        exclude: one or several module paths, parameter names or globs ("layer4.*"); nothing of these is changed.
        granularity: the kinds of units that may go (see `kirsch.graph.group.KINDS`), ["head", "ffn unit"]; or by kind
            how readily they go, {"head": 2.0, "head dim": 0}: importances are divided by the number, and units of a
            kind with 0 stay. Kinds not named there have 1. None: all may.
        uniform: groups of the same kind and size lose the same number of units, so that one number in a configuration
            describes them all.
        norm: 1 or 2, the norm of "magnitude".
        min_keep: fraction of each group that stays in any case, 0 < min_keep <= 1.
        seed: of the importance "random".

    Returns:
        A `Plan`; its `notes` say what kept it from landing within 1 % of the original below the goal.

    Raises:
        GoalError: no plan reaches the goal; says the least that is reachable and what stands in the way.
        UnknownNameError: there is no such importance, or nothing of that name to exclude.
        UsageError: an option is out of range.
    """
    _check_options(round_to, min_keep)
    ease = _ease(granularity)
    groups = [group for group in _without(graph, exclude) if ease[group.kind] > 0]
    scores = [_scored(graph, group, importance, norm, seed) / ease[group.kind] for group in groups]
    together = _together(groups, uniform=uniform)
    for fineness in range(1 if isinstance(round_to, int) else 3):
        candidates = [
            _Candidate(
                [groups[place] for place in places],
                [scores[place] for place in places],
                _multiple(round_to, groups[places[0]], fineness),
                min_keep,
            )
            for places in together
        ]
        chooser = _Chooser(graph, goal, candidates)
        counts = chooser.least()
        if goal.met_by(chooser.price(counts), graph.cost):
            counts = chooser.refine(chooser.descend(local=scope == "local"))
            after = chooser.price(counts)
            if _short_of(goal, after, graph.cost) <= CLOSE:
                break
    if not goal.met_by(chooser.price(counts), graph.cost):
        raise _unreachable(graph, goal, chooser.price(counts), exclude)
    reason = {"magnitude": f"smallest weights of the group (L{norm})"}.get(importance, f"least {importance}")
    keep = chooser.keep(counts)
    _check_constants(graph, keep)
    return Plan(
        fingerprint=graph.fingerprint,
        model=graph.model_name,
        groups=_removals(groups, candidates, counts, reason),
        before=graph.cost,
        after=after,
        goal=goal.to_dict(),
        method={
            "importance": importance,
            "norm": norm,
            "scope": scope,
            "round_to": dict(round_to) if isinstance(round_to, Mapping) else round_to,
            "exclude": list(exclude),
            "granularity": {kind: number for kind, number in ease.items() if number != 1},
            "uniform": uniform,
            "min_keep": min_keep,
            "seed": seed,
        },
        inputs=graph.inputs,
        tracing=graph.tracing,
        notes=_notes(graph, goal, after, candidates, counts),
        graph=graph,
    )


def _ease(granularity: Sequence[str] | Mapping[str, float] | None) -> dict[str, float]:
    """Kind of unit → how readily it goes, 0 for not at all."""
    named = [granularity] if isinstance(granularity, str) else granularity if granularity is not None else ()
    for kind in named:
        if kind not in KINDS:
            raise UnknownNameError("kind of unit for `granularity`", kind, KINDS)
    if isinstance(granularity, Mapping):
        wrong = {kind: number for kind, number in granularity.items() if not 0 <= number < np.inf}
        if wrong:
            raise UsageError(f"granularity has {wrong}.", "A number of at least 0 is needed for each kind.")
        return {kind: float(granularity.get(kind, 1)) for kind in KINDS}
    return {kind: float(granularity is None or kind in named) for kind in KINDS}


def _together(groups: Sequence[Group], *, uniform: bool) -> list[list[int]]:
    """Places of the groups that lose the same number of units."""
    classes: dict[object, list[int]] = {}
    for place, group in enumerate(groups):
        classes.setdefault((group.kind, group.size) if uniform else place, []).append(place)
    return list(classes.values())


def _removals(
    groups: Sequence[Group], candidates: Sequence[_Candidate], counts: Sequence[int], reason: str
) -> tuple[Removal, ...]:
    """What goes, in the order of the groups."""
    units = {
        group.name: tuple(sorted(order[:count].tolist()))
        for candidate, count in zip(candidates, counts, strict=True)
        for group, order in zip(candidate.groups, candidate.orders, strict=True)
        if count
    }
    return tuple(Removal(g.name, g.kind, g.size, units[g.name], reason) for g in groups if g.name in units)


def _check_options(round_to: int | str | Mapping[str, int], min_keep: float) -> None:
    for kind in round_to if isinstance(round_to, Mapping) else ():
        if kind not in KINDS:
            raise UnknownNameError("kind of unit for `round_to`", kind, KINDS)
    if not 0 < min_keep <= 1:
        raise UsageError(
            f"`min_keep` is {min_keep}; it is the fraction of each group that always stays.",
            mend="Give a number above 0 and up to 1, such as min_keep=0.1.",
        )


def _without(graph: Graph, exclude: Iterable[str]) -> list[Group]:
    """The groups that touch nothing that is excluded."""
    banned: set[str] = set()
    for pattern in exclude:
        names = {name for name in graph.tensors if matches(name, pattern)}
        names = names or {name for group in graph.groups if group.name == pattern for name, _ in group.footprint}
        if not names:
            layers = {name.rpartition(".")[0] for name in graph.tensors} - {""}
            raise UnknownNameError("layer to `exclude` named", pattern, layers | {group.name for group in graph.groups})
        banned |= names
    tied = {id(graph.tensors[name]) for name in banned}
    return [g for g in graph.groups if not any(id(graph.tensors[name]) in tied for name, _ in g.footprint)]


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter or block is meant by a path, one of its parent modules, or a glob over either."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _multiple(round_to: int | str | Mapping[str, int], group: Group, fineness: int) -> int:
    if isinstance(round_to, int):
        return round_to
    if isinstance(round_to, Mapping) and group.kind in round_to:
        return round_to[group.kind]
    if group.kind in WHOLE:
        return 1
    coarse = next((multiple for multiple, least in ((16, 32), (8, 16), (4, 8)) if group.size >= least), 1)
    return max(coarse >> fineness, min(coarse, ALIGNED))


def _scored(graph: Graph, group: Group, importance: str, norm: int, seed: int) -> NDArray[np.float64]:
    """One finite number a unit."""
    scores = np.asarray(IMPORTANCES[importance](graph, group, norm=norm, seed=seed))
    if scores.shape != (group.size,) or not np.isfinite(scores).all():
        raise UsageError(
            f"The importance {importance!r} gives no usable scores for {group.name!r}.",
            f"Expected {group.size} finite numbers, found shape {scores.shape}"
            f"{'' if np.isfinite(scores).all() else ' with NaN or infinity'}.",
            "Check the weights of this layer.",
        )
    return scores


def _short_of(goal: Goal, after: Cost, before: Cost) -> float:
    """How far the nearest limit lies above a cost, as a fraction of the original."""
    return min(limit - value for value, limit in goal.fractions(after, before).values())


@dataclass
class _Candidate:
    """Groups of one size that lose the same number of units, each with its units in the order in which they go."""

    groups: Sequence[Group]
    own: Sequence[NDArray[np.float64]]
    multiple: int
    min_keep: float

    @property
    def size(self) -> int:
        """Units of each group."""
        return self.groups[0].size

    @cached_property
    def orders(self) -> list[NDArray[np.int64]]:
        """The units of each group, the least important first."""
        return [np.argsort(scores, kind="stable") for scores in self.own]

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """The importance of what goes first, second, ... from each group; their mean."""
        scores: NDArray[np.float64] = np.mean([np.sort(scores) for scores in self.own], axis=0)
        return scores

    @cached_property
    def _going(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All components in the order in which their units would go, and how many of them the first n units have."""
        places = [np.argsort(o)[g.unit_of()] for g, o in zip(self.groups, self.orders, strict=True)]
        place = np.concatenate(places)
        order = np.argsort(place, kind="stable")
        components = np.concatenate([group.components for group in self.groups])
        return components[order], np.searchsorted(place[order], np.arange(self.size + 1))

    def gone(self, count: int) -> NDArray[np.int64]:
        """The components of the units that go when so many do."""
        components, numbers = self._going
        return components[: numbers[count]]

    @cached_property
    def steps(self) -> list[int]:
        """How many units may go: 0, and each number that leaves a multiple, up to what must stay."""
        floor = max(1, int(np.ceil(self.min_keep * self.size)))
        return [0] + [n for n in range(1, self.size - floor + 1) if (self.size - n) % self.multiple == 0]

    def allowed(self, wanted: int) -> int:
        """The largest number of steps that is no more than wanted."""
        steps = self.steps
        return steps[int(np.searchsorted(steps, wanted, side="right")) - 1]


class _Chooser:
    """Prices choices. A choice is how many units go from each candidate."""

    def __init__(self, graph: Graph, goal: Goal, candidates: list[_Candidate]) -> None:
        self._graph = graph
        self._goal = goal
        self._candidates = candidates
        self._prices: dict[tuple[int, ...], Cost] = {}

    def keep(self, counts: Sequence[int]) -> NDArray[np.bool_]:
        keep = np.ones(len(self._graph.coupling.stuck), bool)
        for candidate, count in zip(self._candidates, counts, strict=True):
            keep[candidate.gone(count)] = False
        return keep

    def price(self, counts: Sequence[int]) -> Cost:
        key = tuple(counts)
        if key not in self._prices:
            self._prices[key] = self._graph.prices.price(self.keep(counts))
        return self._prices[key]

    def fits(self, counts: Sequence[int]) -> bool:
        return self._goal.met_by(self.price(counts), self._graph.cost)

    def least(self) -> list[int]:
        """Everything that may go."""
        return self.repaired([candidate.steps[-1] for candidate in self._candidates])

    def repaired(self, counts: Sequence[int]) -> list[int]:
        """A choice that leaves something of every axis: groups that share one give back their most important units."""
        counts = list(counts)
        while (empty := self._graph.emptied(self.keep(counts))) is not None:
            on = [
                place
                for place, candidate in enumerate(self._candidates)
                if counts[place] and any(empty in group.footprint for group in candidate.groups)
            ]
            best = max(on, key=lambda place: float(self._candidates[place].scores[counts[place] - 1]))
            counts[best] = self._candidates[best].allowed(counts[best] - 1)
        return counts

    def descend(self, *, local: bool) -> list[int]:
        """The smallest choice on the way from nothing to everything that meets the goal, by bisection."""
        if local:
            way: list[float] = sorted({n / c.size for c in self._candidates for n in c.steps})

            def choice(place: int) -> list[int]:
                return self.repaired([c.allowed(int(way[place] * c.size + 1e-9)) for c in self._candidates])
        else:
            way = sorted(score for candidate in self._candidates for score in candidate.scores.tolist())

            def choice(place: int) -> list[int]:
                return self.repaired([c.allowed(int((c.scores <= way[place]).sum())) for c in self._candidates])

        low, high = 0, len(way) - 1
        while low < high:
            middle = (low + high) // 2
            if self.fits(choice(middle)):
                high = middle
            else:
                low = middle + 1
        return choice(high)

    def refine(self, counts: list[int]) -> list[int]:
        """Give back what the goal leaves room for, the most important units first."""
        counts = list(counts)
        open_ = set(range(len(counts)))
        while open_:
            best = None
            for place in sorted(open_):
                candidate, count = self._candidates[place], counts[place]
                fewer = candidate.allowed(count - 1) if count else 0
                tried = [*counts[:place], fewer, *counts[place + 1 :]]
                if not count or not self.fits(tried):
                    open_.discard(place)
                    continue
                value = float(candidate.scores[fewer:count].mean())
                if best is None or value > best[0]:
                    best = (value, place, fewer)
            if best is None:
                break
            counts[best[1]] = best[2]
        return counts


def _unreachable(graph: Graph, goal: Goal, least: Cost, exclude: Sequence[str]) -> GoalError:
    sentences = (f"{b.reason} ({b.source or b.where or b.operation})" for b in graph.blockers)
    obstacles = list(dict.fromkeys(sentences))[:3]
    causes = [f"excluded: {', '.join(exclude)}"] if exclude else []
    causes += [f"what holds most: {'; '.join(obstacles)}"] if obstacles else []
    causes = causes or ["inputs, outputs, round_to and min_keep hold the rest"]
    return GoalError(
        f"No plan for {graph.model_name} reaches the goal: {goal.shortfall(least, graph.cost)}.",
        f"{causes[0][0].upper()}{'; '.join(causes)[1:]}.",
        f"Ask for less, exclude less, or lower round_to or min_keep.{graph.without_numbers}",
    )


def _check_constants(graph: Graph, keep: NDArray[np.bool_]) -> None:
    graph.constants(keep)
    empty = graph.emptied(keep)
    if empty is not None:
        raise PlanError(f"The plan would leave too little of {empty[0]!r}.", mend="Raise min_keep.")


def _notes(
    graph: Graph, goal: Goal, after: Cost, candidates: Sequence[_Candidate], counts: Sequence[int]
) -> tuple[str, ...]:
    notes = []
    reached = goal.fractions(after, graph.cost)
    name, (value, limit) = min(reached.items(), key=lambda item: item[1][1] - item[1][0])
    if limit - value > CLOSE:
        notes.append(
            f"{name} land at {value:.1%}, {100 * (limit - value):.1f} points below the goal of {limit:.1%}: "
            f"the widths go in steps of {', '.join(str(m) for m in sorted({c.multiple for c in candidates}))} units. "
            "A smaller round_to lands nearer."
        )
    odd = [
        f"{candidate.groups[0].name} ({candidate.size - count})"
        for candidate, count in zip(candidates, counts, strict=True)
        if count and candidate.groups[0].kind not in WHOLE and (candidate.size - count) % ALIGNED
    ]
    if odd:
        more = f", and {len(odd) - 3} more" if len(odd) > 3 else ""  # noqa: PLR2004 - three are shown
        notes.append(f"Widths that {ALIGNED} does not divide run slowly on some runtimes: {', '.join(odd[:3])}{more}.")
    return tuple(notes)
