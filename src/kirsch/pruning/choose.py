"""Choice of the units to remove, so that the cost of the model meets a goal."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kirsch.annotations import Names, Seed
from kirsch.arguments import checked
from kirsch.data.annotations import Inputs
from kirsch.errors import GoalError, NumericError, PlanError, UsageError, listing
from kirsch.graph.graph import Graph
from kirsch.graph.plan import Goal, Plan, Removal
from kirsch.pruning.blocks import BLOCK_IMPORTANCES, plan_blocks
from kirsch.pruning.exclusion import exclusion_notes
from kirsch.pruning.importance import IMPORTANCES
from kirsch.pruning.notes import (
    CLOSE,
    absent_kind_notes,
    landing_note,
    too_few_units,
    uncounted_notes,
    unused_notes,
    width_notes,
)
from kirsch.pruning.obstacles import Least, unreachable
from kirsch.pruning.options import Kinds, MinKeep, Norm, PlanOptions, Ranking, RoundTo
from kirsch.pruning.search import Candidate, Chooser
from kirsch.pruning.selection import max_halvings, removable_groups, tied_groups, width_multiple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.cost import Cost
    from kirsch.graph.group import Group

    Scores = Callable[[Group, PlanOptions], NDArray[np.float64]]
    """Returns the importance of each unit of a group, divided by the weight of its kind."""


@checked
def plan(
    graph: Graph,
    goal: Goal,
    *,
    data: Inputs | None = None,
    importance: str | None = None,
    norm: Norm = 2,
    ranking: Ranking = "global",
    round_to: RoundTo = "auto",
    kinds: Kinds = None,
    uniform: bool = False,
    min_keep: MinKeep = 0.1,
    exclude: Names = (),
    keep_outputs: Names = (),
    seed: Seed = 0,
) -> Plan:
    """Return the units to remove from a traced model, so that its cost is at most the goal, and close to the goal.

    The outputs of the model keep their sizes in every plan, so the last layer need not be excluded.

    Args:
        graph: result of `kirsch.trace`.
        goal: fractions of the original cost.
        data: only for kinds="block": calibration inputs in the form of the example inputs, or a list of such batches.
        importance: name of the importance that ranks the units: "magnitude" (the default) or "random". For
            kinds="block": "influence" (the default; one minus the cosine similarity of a block's input and output),
            "change" (change of the model's outputs when the block is removed; one run per block) or "random".
        norm: 1 or 2, the norm of "magnitude".
        ranking: "global" ranks all units together; "local" removes the same fraction of each group.
        round_to: the number of kept units of each group is a multiple of this number. Runtimes are slow for other
            widths. "auto": 16 for groups of 32 units or more, 8 from 16 units, 4 from 8 units, else 1; always 1 for
            heads and other units that contain several channels each. Multiples are halved, but not below 4, if
            the goal cannot be met closely otherwise. A dict sets multiples by kind of unit, {"head dim": 8}; other
            kinds are "auto".
        kinds: a list, such as ["head", "ffn unit"]: only units of these kinds are removed (`kirsch.graph.kinds.KINDS`
            defines the kinds). A dict, such as {"head": 2.0, "head dim": 0}: units of all kinds are removed.
            Importances are divided by the weight of the kind, which is 1 for kinds that are not in the dict; units of a
            kind with weight 0 are kept. None: all kinds, with weight 1. "block" removes whole residual blocks
            (`graph.blocks`); to reduce widths, too, prune by this plan, trace the result, and plan again.
        uniform: remove the same number of units from all groups of the same kind and size, so that one number in a
            configuration describes all layers.
        min_keep: fraction of each group that is always kept, 0 < min_keep <= 1.
        exclude: one or several module paths, parameter names or globs ("layer4.*") whose parameters are not changed.
            The units that these layers read are kept, too. For kinds="block", the blocks that are named, or that
            contain a named layer, are kept.
        keep_outputs: one or several module paths or globs; the outputs of these modules are not changed. They may lose
            inputs.
        seed: seed of the importance "random".

    Returns:
        A `Plan`. Its `notes` state the cost of the units that `exclude` and `keep_outputs` keep, and the reason if the
        cost of the plan is more than 1 % of the original below the goal.

    Raises:
        GoalError: no plan reaches the goal; the message has the least reachable cost, the layers that cannot be cut
            further, and options that reach the goal. Or the goal is on MACs only, and the model has no MACs.
        UnknownNameError: an importance, a kind or a name to exclude is unknown.
        UsageError: an option is out of range or has no effect with these `kinds`, `kinds` names blocks and other kinds,
            or `data` is missing for blocks.
    """
    options = PlanOptions(
        importance=importance,
        norm=norm,
        ranking=ranking,
        round_to=round_to,
        kinds=kinds,
        uniform=uniform,
        min_keep=min_keep,
        exclude=exclude,
        keep_outputs=keep_outputs,
        seed=seed,
    )
    _check_importance(options)
    if not graph.cost.macs and goal.parameters is None:
        raise GoalError(
            f"The goal macs={goal.macs} has no effect.",
            f"{graph.model_name} has no MACs{'' if graph.cost.parameters else ' and no parameters'}.",
            "Give parameters=0.5."
            if graph.cost.parameters
            else "Give a model that has layers with parameters to prune.",
        )
    if options.of_blocks:
        return plan_blocks(graph, goal, options, data)
    if data is not None:
        raise UsageError(
            "`data` of kirsch.plan has no effect: only blocks are ranked on data.",
            fix="Give kinds='block', or remove `data`.",
        )
    return _plan_units(graph, goal, options)


def _check_importance(options: PlanOptions) -> None:
    """Raise a UsageError for the importance of a block in a plan of units, and the reverse."""
    name = options.importance_name
    if options.of_blocks and name in IMPORTANCES and name not in BLOCK_IMPORTANCES:
        raise UsageError(
            f"The importance {name!r} ranks units of layers, and kinds='block' removes residual blocks.",
            listing(sorted(BLOCK_IMPORTANCES)),
            "Give an importance of blocks, or other `kinds`.",
        )
    if not options.of_blocks and name in BLOCK_IMPORTANCES and name not in IMPORTANCES:
        raise UsageError(
            f"The importance {name!r} ranks residual blocks, and this plan removes units of layers.",
            listing(sorted(IMPORTANCES)),
            "Give kinds='block', or an importance of units.",
        )


def _plan_units(graph: Graph, goal: Goal, options: PlanOptions) -> Plan:
    """Return the units to remove from the layers of a model."""
    scores = _ScoreCache(graph, options)
    for fineness in range(max_halvings(options) + 1):
        chooser = _chooser(graph, goal, options, scores.get, fineness)
        counts = chooser.least()
        if goal.met_by(chooser.price(counts), graph.cost):
            counts = chooser.refine(chooser.descend(local=options.ranking == "local"))
            if _distance_to_goal(goal, chooser.price(counts), graph.cost) <= CLOSE:
                break
    after = chooser.price(counts)
    if not goal.met_by(after, graph.cost):
        raise unreachable(graph, goal, options, lambda changed: _least(graph, goal, changed, scores.get))
    name = options.importance_name
    reason = {"magnitude": f"smallest weights of the group (L{options.norm})"}.get(name, f"least {name}")
    _check_constants(graph, chooser.keep(counts))
    chosen = Plan(
        fingerprint=graph.fingerprint,
        model=graph.model_name,
        groups=_removals(removable_groups(graph, options), chooser.candidates, counts, reason),
        before=graph.cost,
        after=after,
        goal=goal.to_dict(),
        method=options.to_dict(),
        inputs=graph.inputs,
        tracing=graph.tracing,
        graph=graph,
    )
    exclusions = exclusion_notes(graph, options, lambda changed: _least(graph, goal, changed, _equal_scores))
    notes = (
        landing_note(chosen),
        *width_notes(chosen),
        *unused_notes(chosen, graph),
        *uncounted_notes(chosen, graph),
        *absent_kind_notes(graph, options),
        *exclusions,
    )
    return replace(chosen, notes=tuple(note for note in notes if note))


def _chooser(graph: Graph, goal: Goal, options: PlanOptions, scores: Scores, fineness: int) -> Chooser:
    """Return the search over the groups that the options allow to change."""
    groups = removable_groups(graph, options)
    candidates = [
        Candidate(
            [groups[index] for index in indices],
            [scores(groups[index], options) for index in indices],
            width_multiple(groups[indices[0]], options, fineness),
            options.min_keep,
        )
        for indices in tied_groups(groups, options)
    ]
    return Chooser(graph, goal, candidates)


def _least(graph: Graph, goal: Goal, options: PlanOptions, scores: Scores) -> Least:
    """Return the least cost that plans with these options reach."""
    chooser = _chooser(graph, goal, options, scores, max_halvings(options))
    counts = chooser.least()
    return Least(chooser.price(counts), chooser.keep(counts))


def _equal_scores(group: Group, _options: PlanOptions) -> NDArray[np.float64]:
    """Return the importance 0 for each unit. The least cost is almost the same for any choice of units."""
    return np.zeros(group.size)


class _ScoreCache:
    """Importance of each unit of each group, computed once per group."""

    def __init__(self, graph: Graph, options: PlanOptions) -> None:
        self._graph = graph
        self._options = options
        self._cache: dict[str, NDArray[np.float64]] = {}

    def get(self, group: Group, options: PlanOptions) -> NDArray[np.float64]:
        """Return the importance of each unit, divided by the weight of its kind."""
        if group.name not in self._cache:
            importance, norm, seed = self._options.importance_name, self._options.norm, self._options.seed
            self._cache[group.name] = _importance_scores(self._graph, group, importance, norm, seed)
        return self._cache[group.name] / options.kind_weights[group.kind]


def _removals(
    groups: Sequence[Group], candidates: Sequence[Candidate], counts: Sequence[int], reason: str
) -> tuple[Removal, ...]:
    """Return the units to remove, in the order of the groups."""
    units = {
        group.name: tuple(sorted(order[:count].tolist()))
        for candidate, count in zip(candidates, counts, strict=True)
        for group, order in zip(candidate.groups, candidate.orders, strict=True)
        if count
    }
    return tuple(Removal(g.name, g.kind, g.size, units[g.name], reason) for g in groups if g.name in units)


def _importance_scores(graph: Graph, group: Group, importance: str, norm: int, seed: int) -> NDArray[np.float64]:
    """Return one finite number per unit."""
    with np.errstate(invalid="ignore"):  # NaN and infinity raise an error below
        scores = np.asarray(IMPORTANCES[importance](graph, group, norm=norm, seed=seed))
    if scores.shape == (group.size,) and not np.isfinite(scores).all():
        _refuse_not_finite(graph, group)
    if scores.shape != (group.size,) or not np.isfinite(scores).all():
        raise UsageError(
            f"The importance {importance!r} returns no usable scores for {group.name!r}.",
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
                "Its units cannot be ranked, and the outputs of the model are not finite.",
                "Give a model with finite weights, such as an earlier checkpoint.",
            )


def _distance_to_goal(goal: Goal, after: Cost, before: Cost) -> float:
    """Return the distance from a cost up to the nearest limit, as a fraction of the original."""
    return min(limit - value for value, limit in goal.fractions(after, before).values())


def _check_constants(graph: Graph, keep: NDArray[np.bool_]) -> None:
    graph.constants(keep)
    found = graph.too_small(keep)
    if found is not None:
        raise PlanError(too_few_units("The plan", *found), fix="Raise min_keep.")
