"""From a goal to a plan: which units go so that the cost lands on the goal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from kirsch.annotations import Count, Names, Seed
from kirsch.arguments import checked
from kirsch.errors import GoalError, NumericError, PlanError, UsageError
from kirsch.graph.graph import Graph
from kirsch.graph.plan import Goal, Plan, Removal
from kirsch.pruning.importance import IMPORTANCES
from kirsch.pruning.notes import CLOSE, landing_note, width_notes
from kirsch.pruning.obstacles import Least, unreachable
from kirsch.pruning.options import Options
from kirsch.pruning.search import Candidate, Chooser

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.cost import Cost
    from kirsch.graph.group import Group


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
        GoalError: no plan reaches the goal; says the least that is reachable, what holds the rest, and which options
            were found to reach it. Or the goal is on MACs alone, and the model has none.
        UnknownNameError: there is no such importance, or nothing of that name to exclude.
        UsageError: an option is out of range.
    """
    options = Options(importance, scope, round_to, exclude, granularity, uniform, norm, min_keep, seed)
    options.check()
    if not graph.cost.macs and goal.params is None:
        raise GoalError(
            f"The goal macs={goal.macs} asks for nothing.",
            f"{graph.model_name} has no MACs{'' if graph.cost.parameters else ' and no parameters'}.",
            "Give params=0.5." if graph.cost.parameters else "Give a model that has layers with parameters to prune.",
        )
    scores = _Scores(graph, options)
    for fineness in range(options.finest + 1):
        chooser = _chooser(graph, goal, options, scores, fineness)
        counts = chooser.least()
        if goal.met_by(chooser.price(counts), graph.cost):
            counts = chooser.refine(chooser.descend(local=scope == "local"))
            if _short_of(goal, chooser.price(counts), graph.cost) <= CLOSE:
                break
    after = chooser.price(counts)
    if not goal.met_by(after, graph.cost):
        raise unreachable(graph, goal, options, lambda other: _least(graph, goal, other, scores))
    reason = {"magnitude": f"smallest weights of the group (L{norm})"}.get(importance, f"least {importance}")
    _check_constants(graph, chooser.keep(counts))
    made = Plan(
        fingerprint=graph.fingerprint,
        model=graph.model_name,
        groups=_removals(options.groups(graph), chooser.candidates, counts, reason),
        before=graph.cost,
        after=after,
        goal=goal.to_dict(),
        method=options.to_dict(),
        inputs=graph.inputs,
        tracing=graph.tracing,
        graph=graph,
    )
    return replace(made, notes=tuple(note for note in (landing_note(made), *width_notes(made)) if note))


def _chooser(graph: Graph, goal: Goal, options: Options, scores: _Scores, fineness: int) -> Chooser:
    """The search over the groups that the options let go."""
    groups = options.groups(graph)
    candidates = [
        Candidate(
            [groups[place] for place in places],
            [scores.of(groups[place], options) for place in places],
            options.multiple(groups[places[0]], fineness),
            options.min_keep,
        )
        for places in options.together(groups)
    ]
    return Chooser(graph, goal, candidates)


def _least(graph: Graph, goal: Goal, options: Options, scores: _Scores) -> Least:
    """What plans with these options reach at the least."""
    chooser = _chooser(graph, goal, options, scores, options.finest)
    counts = chooser.least()
    return Least(chooser.price(counts), chooser.keep(counts))


class _Scores:
    """The importance of each unit of each group, computed once."""

    def __init__(self, graph: Graph, options: Options) -> None:
        self._graph = graph
        self._options = options
        self._known: dict[str, NDArray[np.float64]] = {}

    def of(self, group: Group, options: Options) -> NDArray[np.float64]:
        """One finite number a unit, divided by how readily the kind goes."""
        if group.name not in self._known:
            chosen = self._options
            self._known[group.name] = _scored(self._graph, group, chosen.importance, chosen.norm, chosen.seed)
        return self._known[group.name] / options.ease[group.kind]


def _removals(
    groups: Sequence[Group], candidates: Sequence[Candidate], counts: Sequence[int], reason: str
) -> tuple[Removal, ...]:
    """What goes, in the order of the groups."""
    units = {
        group.name: tuple(sorted(order[:count].tolist()))
        for candidate, count in zip(candidates, counts, strict=True)
        for group, order in zip(candidate.groups, candidate.orders, strict=True)
        if count
    }
    return tuple(Removal(g.name, g.kind, g.size, units[g.name], reason) for g in groups if g.name in units)


def _scored(graph: Graph, group: Group, importance: str, norm: int, seed: int) -> NDArray[np.float64]:
    """One finite number a unit."""
    with np.errstate(invalid="ignore"):  # what is not finite is named below
        scores = np.asarray(IMPORTANCES[importance](graph, group, norm=norm, seed=seed))
    if scores.shape == (group.size,) and not np.isfinite(scores).all():
        _refuse_not_finite(graph, group)
    if scores.shape != (group.size,) or not np.isfinite(scores).all():
        raise UsageError(
            f"The importance {importance!r} gives no usable scores for {group.name!r}.",
            f"Expected {group.size} finite numbers, found shape {scores.shape}"
            f"{'' if np.isfinite(scores).all() else ' with NaN or infinity'}.",
            "Check the weights of this layer.",
        )
    return scores


def _refuse_not_finite(graph: Graph, group: Group) -> None:
    """Raise a NumericError if a parameter of a group is not finite."""
    for name in dict.fromkeys(name for name, _ in group.footprint if name in graph.parameters):
        if not np.isfinite(graph.values(name)).all():
            raise NumericError(
                f"The parameter {name!r} of {graph.model_name} holds NaN or infinity.",
                "Its units cannot be ranked, and the outputs of the model are no numbers.",
                "Give a model with finite weights, or train it again from before they went wrong.",
            )


def _short_of(goal: Goal, after: Cost, before: Cost) -> float:
    """How far the nearest limit lies above a cost, as a fraction of the original."""
    return min(limit - value for value, limit in goal.fractions(after, before).values())


def _check_constants(graph: Graph, keep: NDArray[np.bool_]) -> None:
    graph.constants(keep)
    empty = graph.emptied(keep)
    if empty is not None:
        raise PlanError(f"The plan would leave too little of {empty[0]!r}.", fix="Raise min_keep.")
