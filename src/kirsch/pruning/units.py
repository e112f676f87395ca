"""Plans that remove units of layers: the number of units of each group, by the ranking, and their assembly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import PlanError
from kirsch.graph.plan import Goal, Plan, Removal, Skip
from kirsch.pruning.alternatives import is_inside, removable_blocks
from kirsch.pruning.by_hand import kept_units, tied_number
from kirsch.pruning.exclusion import exclusion_notes
from kirsch.pruning.learned.allocations import Allocations
from kirsch.pruning.learned.search import search, search_note
from kirsch.pruning.milp import allocate, count_runs
from kirsch.pruning.notes import (
    CLOSE,
    absent_kind_notes,
    landing_note,
    met_note,
    too_few_units,
    uncounted_notes,
    unused_notes,
    width_notes,
)
from kirsch.pruning.obstacles import Least, unreachable
from kirsch.pruning.options import FIXED_RANKINGS, PlanOptions
from kirsch.pruning.scores import equal_scores
from kirsch.pruning.search import Candidate, Chooser
from kirsch.pruning.selection import max_halvings, ranked_together, removable_groups, tied_groups, width_multiple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.learned.allocations import Counts
    from kirsch.pruning.learned.quality import SearchQuality
    from kirsch.pruning.scores import ScoreCache, Scores


def plan_units(
    graph: Graph,
    goal: Goal | None,
    options: PlanOptions,
    scores: ScoreCache,
    quality: SearchQuality | None = None,
    *,
    progress: bool | None = None,
) -> Plan:
    """Return the plan of the units to remove from the layers of a model.

    Args:
        graph: graph of the model.
        goal: the goal; None: the units are those that `keep` states.
        options: options of the plan.
        scores: importances of the units.
        quality: quality that a learned ranking maximizes.
        progress: whether to show the progress of rankings that run the model; None: on a terminal and in a notebook.
    """
    blocks: dict[str, float] = {}
    record: dict[str, Any] = {}
    if goal is None:
        chooser = _chooser(graph, None, options, scores.get, 0)
        counts = chooser.given()
    elif options.ranking == "milp":
        chooser, counts, blocks = _search_by_outputs(graph, goal, options, scores, progress=progress)
    elif quality is not None:
        chooser, counts, record = _search_by_quality(graph, goal, options, scores, quality, progress=progress)
    else:
        chooser, counts = _search(graph, goal, options, scores)
    chosen = assembled(graph, goal, options, chooser, counts)
    skipped = tuple(Skip(path, f"changes the outputs by {change:.3g}") for path, change in blocks.items())
    chosen = replace(chosen, blocks=skipped, method=chosen.method | ({"search": record} if record else {}))
    first = [search_note(options.ranking, record)] if record else []
    return with_notes(chosen, graph, options, lambda changed: least_units(graph, goal, changed), first)


def with_notes(
    chosen: Plan, graph: Graph, options: PlanOptions, least: Callable[[PlanOptions], Least], first: Sequence[str] = ()
) -> Plan:
    """Return a plan with its notes.

    Args:
        chosen: the plan.
        graph: graph of the model.
        options: options of the plan.
        least: takes options, and returns the least cost that plans with these options reach.
        first: further notes, which come first.
    """
    notes = (
        *first,
        met_note(chosen),
        landing_note(chosen, graph),
        *width_notes(chosen, graph),
        *unused_notes(chosen, graph),
        *uncounted_notes(chosen, graph),
        *absent_kind_notes(graph, options),
        *exclusion_notes(graph, options, least),
    )
    return replace(chosen, notes=tuple(note for note in notes if note))


def assembled(graph: Graph, goal: Goal | None, options: PlanOptions, chooser: Chooser, counts: Sequence[int]) -> Plan:
    """Return the plan that removes a number of units from each candidate, without notes and blocks."""
    name = options.importance_name
    reason = {"magnitude": f"smallest weights of the group (L{options.norm})"}.get(name, f"least {name}")
    _check_constants(graph, chooser.keep(counts))
    removals = _removals(removable_groups(graph, options), chooser.candidates, counts, reason)
    inside = {group.name for group in graph.groups if is_inside(group, chooser.without)}
    return Plan(
        fingerprint=graph.fingerprint,
        model=graph.model_name,
        groups=tuple(removal for removal in removals if removal.name not in inside),
        before=graph.cost,
        after=chooser.price(counts),
        goal={} if goal is None else goal.to_dict(),
        goal_of=None if goal is None else goal.of,
        method=options.to_dict(),
        inputs=graph.inputs,
        tracing=graph.tracing,
        graph=graph,
    )


def least_units(graph: Graph, goal: Goal | None, options: PlanOptions) -> Least:
    """Return the least cost that plans with these options reach; no importance is computed."""
    chooser = _chooser(graph, goal, options, equal_scores, max_halvings(options))
    counts = chooser.least()
    chooser.without = removable_blocks(graph, options)
    return Least(chooser.price(counts), chooser.keep(counts), chooser.without)


def runs_for_milp(graph: Graph, goal: Goal, options: PlanOptions) -> int:
    """Return the number of models that ranking="milp" runs on each batch; no importance is computed."""
    steps = range(max_halvings(options) + 1)
    return count_runs(graph, options, (_chooser(graph, goal, options, equal_scores, step) for step in steps))


# ------------------------------------------------------------------------------------------------ rankings


def _search_by_outputs(
    graph: Graph, goal: Goal, options: PlanOptions, scores: ScoreCache, *, progress: bool | None
) -> tuple[Chooser, list[int], dict[str, float]]:
    """Return the choice of `allocate`; a goal that is out of reach is found before the model runs."""
    least = least_units(graph, goal, options)
    choosers = (_chooser(graph, goal, options, scores.get, step) for step in range(max_halvings(options) + 1))
    found = None
    if goal.met_by(least.cost, graph.cost):
        found = allocate(graph, goal, options, choosers, scores.batches or (), progress=progress)
    if found is None:
        raise unreachable(graph, goal, options, lambda changed: least_units(graph, goal, changed))
    return found


def _search_by_quality(
    graph: Graph,
    goal: Goal,
    options: PlanOptions,
    scores: ScoreCache,
    quality: SearchQuality,
    *,
    progress: bool | None,
) -> tuple[Chooser, list[int], dict[str, Any]]:
    """Return the number of units to remove from each candidate that a learned ranking finds, and its record."""
    chooser, _ = _search(graph, goal, options, scores)
    finer = [_chooser(graph, goal, options, scores.get, n).candidates for n in range(max_halvings(options) + 1)]
    coarsest = sum(candidate.multiple for candidate in chooser.candidates)
    levels = [chooser.candidates, *(c for c in finer if sum(candidate.multiple for candidate in c) < coarsest)]
    starts = {}
    for ranking in FIXED_RANKINGS if all((c.scores >= 0).all() for c in chooser.candidates) else FIXED_RANKINGS[:-1]:
        fixed = options.model_copy(update={"ranking": ranking})
        starts[ranking] = tuple(_search(graph, goal, fixed, scores)[1])

    def evaluate(counts: Counts) -> float:
        return quality.of_plan(graph, assembled(graph, goal, options, chooser, counts), options.seed)

    allocations = search(Allocations(graph, goal, levels, evaluate, options.evaluations, starts), options, progress)
    return chooser, list(allocations.best()), allocations.record(quality.words)


def _search(graph: Graph, goal: Goal, options: PlanOptions, scores: ScoreCache) -> tuple[Chooser, list[int]]:
    """Return the number of units to remove from each candidate, so that the goal is met."""
    # A goal that is out of reach is found before the importances are computed, which may run the model.
    least = least_units(graph, goal, options)
    if not goal.met_by(least.cost, graph.cost):
        raise unreachable(graph, goal, options, lambda changed: least_units(graph, goal, changed))
    for fineness in range(max_halvings(options) + 1):
        chooser = _chooser(graph, goal, options, scores.get, fineness)
        free = [index for index, candidate in enumerate(chooser.candidates) if candidate.kept is None]
        classes = ranked_together(graph, {index: chooser.candidates[index].groups for index in free}, options)
        counts = chooser.least()
        if goal.met_by(chooser.price(counts), graph.cost):
            counts = chooser.search(classes, CLOSE)
            if chooser.distance(counts) <= CLOSE:
                break
    if not goal.met_by(chooser.price(counts), graph.cost):
        raise unreachable(graph, goal, options, lambda changed: least_units(graph, goal, changed))
    return chooser, counts


def _chooser(graph: Graph, goal: Goal | None, options: PlanOptions, scores: Scores, fineness: int) -> Chooser:
    """Return the search over the groups that the options allow to change. Without goal, `keep` names the groups."""
    groups, by_hand = removable_groups(graph, options), kept_units(graph, options)
    candidates = []
    for indices in tied_groups(groups, options):
        tied = [groups[index] for index in indices]
        kept = tied_number(tied, by_hand)
        if kept == tied[0].size or (kept is None and goal is None):
            continue
        candidates.append(
            Candidate(
                tied,
                [scores(group, options) for group in tied],
                width_multiple(tied[0], options, fineness),
                options.min_keep,
                unit_cost(graph, goal, tied) if goal is not None and options.ranking == "per_cost" else 1.0,
                kept,
            )
        )
    return Chooser(graph, goal, candidates)


def unit_cost(graph: Graph, goal: Goal, groups: Sequence[Group]) -> float:
    """Return the mean cost of a unit of some groups, as the sum of its fractions of the costs that the goal limits.

    The memory is a maximum over the operations, which the units of a single group hardly change. Its cost is the mean
    over the operations that need more memory than the goal allows.
    """
    present, removed = graph.keep({}), graph.keep({group.name: tuple(range(group.size)) for group in groups})
    before, after = (goal.fractions(graph.prices.price(keep), graph.cost) for keep in (present, removed))
    saved = {name: before[name][0] - after[name][0] for name in before}
    if goal.memory is not None:
        original = max((goal.of or graph.cost).memory, 1)
        profile, remaining = (graph.prices.memory_profile(keep) / original for keep in (present, removed))
        too_large = profile > goal.memory
        saved["memory"] = float((profile - remaining)[too_large].mean()) if too_large.any() else 0.0
    return max(sum(saved.values()) / sum(group.size for group in groups), np.finfo(float).eps)


def _removals(
    groups: Sequence[Group], candidates: Sequence[Candidate], counts: Sequence[int], reason: str
) -> tuple[Removal, ...]:
    """Return the units to remove, in the order of the groups."""
    units: dict[str, tuple[int, ...]] = {}
    for candidate, count in zip(candidates, counts, strict=True):
        units |= candidate.removed_units(count)
    return tuple(Removal(g.name, g.kind, g.size, units[g.name], reason) for g in groups if g.name in units)


def _check_constants(graph: Graph, keep: NDArray[np.bool_]) -> None:
    graph.constants(keep)
    found = graph.too_small(keep)
    if found is not None:
        raise PlanError(too_few_units("The plan", *found), fix="Raise min_keep.")
