"""Choice of the units to remove, so that the cost of the model meets a goal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import figures
from kirsch.annotations import Names, Seed
from kirsch.arguments import checked
from kirsch.data.annotations import Calibration
from kirsch.errors import GoalError, PlanError, UnknownNameError, UsageError, listing
from kirsch.graph.cost import WORDS
from kirsch.graph.graph import Graph
from kirsch.graph.plan import Goal, Plan, Removal
from kirsch.jobs.goal import MaxDrop
from kirsch.pruning.blocks import BLOCK_IMPORTANCES, BlockScores, least_cost_of_blocks, plan_blocks
from kirsch.pruning.by_hand import kept_units, tied_number
from kirsch.pruning.exclusion import exclusion_notes
from kirsch.pruning.importance import IMPORTANCES, importance_of
from kirsch.pruning.max_drop import DropSearch, check_validation, minimized_cost
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
from kirsch.pruning.options import (
    ClassWeights,
    Keep,
    Kinds,
    Minimize,
    MinKeep,
    Norm,
    PlanOptions,
    Ranking,
    RoundTo,
)
from kirsch.pruning.quality import Quality
from kirsch.pruning.scores import scores_of
from kirsch.pruning.search import Candidate, Chooser
from kirsch.pruning.selection import max_halvings, ranked_together, removable_groups, tied_groups, width_multiple
from kirsch.tasks.metrics import GIVEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.graph.cost import Cost
    from kirsch.graph.group import Group
    from kirsch.pruning.scores import ScoreCache, Scores


@checked
def plan(
    graph: Graph,
    goal: Goal | None = None,
    *,
    data: Calibration | None = None,
    importance: str | Callable[..., Any] | Mapping[str, Any] | None = None,
    loss: str | Callable[..., Any] = "cross-entropy",
    norm: Norm = 2,
    ranking: Ranking = "global",
    round_to: RoundTo = "auto",
    kinds: Kinds = None,
    uniform: bool = False,
    min_keep: MinKeep = 0.1,
    keep: Keep = None,
    max_drop: MaxDrop | None = None,
    validation: Calibration | None = None,
    metric: str | Callable[..., Any] | None = None,
    class_weights: ClassWeights = None,
    minimize: Minimize = None,
    exclude: Names = (),
    keep_outputs: Names = (),
    seed: Seed = 0,
) -> Plan:
    """Return the units to remove from a traced model, so that its cost is at most the goal, and close to the goal.

    The outputs of the model keep their sizes in every plan, so the last layer need not be excluded.

    Args:
        graph: result of `kirsch.trace`.
        goal: fractions of the original cost. None: `max_drop` determines the cost, or only the units that `keep` names
            are removed. If the model already meets a goal that is a fraction of an earlier model (`Goal.of`), the plan
            removes nothing.
        data: calibration batches for importances that run the model, such as a DataLoader, `ArrayData`, or a list of
            (inputs, labels); about 256 samples suffice. For kinds="block": inputs in the form of the example inputs, or
            a list of such batches.
        importance: name of the importance that ranks the units. From the weights: "magnitude" (the default), "lamp",
            "fpgm", "bn_scale", "random". From inputs: "activation", "apoz", "wanda", "flap", "thinet". From inputs and
            labels: "taylor", "fisher", "taylor_weights", "snip", "grasp", "hessian", "leave_one_out". Or a function
            (graph, group) → scores of the units, or a dict of scores by group name. For kinds="block": "influence" (the
            default; one minus the cosine similarity of a block's input and output), "change" (change of the model's
            outputs when the block is removed; one run per block) or "random".
        loss: loss for importances from labels: "cross-entropy", "binary", "squared-error"; "next-token" for causal
            language models, whose labels are their input tokens; or a function (logits, labels) → mean over samples.
        norm: 1 or 2, the norm of "magnitude" and "lamp".
        ranking: "global" ranks all units together; "per_cost" as well, by their importance divided by the cost that the
            goal limits; "local" removes the same fraction of each group; "isomorphic" removes the same fraction of each
            class of groups that occur in layers of the same types (after Fang et al. 2024, arXiv:2407.04616).
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
        keep: widths by hand: a dict from layers to the number of output units that are kept (int) or the fraction of
            them (float), such as {"layer3.*": 0.5, "layer4.0.conv1": 48, "fc1": 1.0}. A layer is a path, a glob, or the
            name of a group. The least important units of these layers are removed; the goal, if there is one, is
            reached with the other layers. `round_to` and `min_keep` do not apply to these layers.
        max_drop: largest drop of the quality, without training, measured on `validation`: 0.02 is two percentage
            points. Without a goal, the smallest model inside this limit is searched for by bisection over the cost;
            about seven models are evaluated. With a goal, an error is raised if the plan for the goal exceeds it.
        validation: samples on which the quality is measured: batches of (inputs, labels), or of inputs for metrics that
            compare outputs with those of the original. None: `data`.
        metric: metric of `max_drop`; larger values are better. With labels: "accuracy", "balanced_accuracy",
            "log_likelihood", "next_token_accuracy", "next_token_log_likelihood", "binary_accuracy", "r2". Compared with
            the outputs of the original: "agreement" (same predicted class), "kl" (minus the KL divergence),
            "output_r2". Or a function (outputs, labels) → number. None: by the form of the labels, see
            `kirsch.tasks.metrics.default_metric`.
        class_weights: class number → weight, such as {3: 5.0}; the accuracy is then the weighted mean of the recalls of
            the classes. The weight of other classes is 1.
        minimize: the cost that is minimized with `max_drop` and no goal: "macs", "parameters", "size" or "memory".
            None: MACs, or parameters if the model has no MACs.
        exclude: one or several module paths, parameter names or globs ("layer4.*") whose parameters are not changed.
            The units that these layers read are kept, too. For kinds="block", the blocks that are named, or that
            contain a named layer, are kept.
        keep_outputs: one or several module paths or globs; the outputs of these modules are not changed. They may lose
            inputs.
        seed: seed of the importances "random" and "hessian".

    Returns:
        A `Plan`. Its `notes` state the cost of the units that `exclude` and `keep_outputs` keep, and the reason if the
        cost of the plan is more than 1 % of the original below the goal.

    Raises:
        GoalError: no plan reaches the goal; the message has the least reachable cost, the layers that cannot be cut
            further, and options that reach the goal. Or the goal is on MACs only, and the model has no MACs.
        UnknownNameError: an importance, a kind or a name to exclude is unknown.
        UsageError: an option is out of range or has no effect with the others, `kinds` names blocks and other kinds, or
            `data` is missing or cannot be used.
        DataError: the data has no samples or labels.
        NumericError: a weight, an activation or a gradient is not finite.
    """
    options = PlanOptions(
        importance=importance if importance is None or isinstance(importance, str) else importance_of(importance).name,
        loss=loss if isinstance(loss, str) else "given function",
        norm=norm,
        ranking=ranking,
        round_to=round_to,
        kinds=kinds,
        uniform=uniform,
        min_keep=min_keep,
        keep=keep,
        max_drop=max_drop,
        metric=metric if metric is None or isinstance(metric, str) else GIVEN,
        class_weights=class_weights,
        minimize=minimize,
        exclude=exclude,
        keep_outputs=keep_outputs,
        seed=seed,
    )
    _check_importance(options)
    if goal is None and not options.keep and max_drop is None:
        raise UsageError(
            "The goal is missing.",
            fix="Give a goal, kirsch.Goal(macs=0.5), a largest drop, max_drop=0.02, or widths by hand in `keep`.",
        )
    if goal is not None and not graph.cost.macs and list(goal.to_dict()) == ["macs"]:
        raise GoalError(
            f"The goal macs={goal.macs} has no effect.",
            f"{graph.model_name} has no MACs{'' if graph.cost.parameters else ' and no parameters'}.",
            "Give parameters=0.5."
            if graph.cost.parameters
            else "Give a model that has layers with parameters to prune.",
        )
    if goal is not None:
        _check_reference(graph, goal)
    check_validation(options, goal, data, validation)
    plan_for: Callable[..., Plan]
    if options.of_blocks:
        plan_for = partial(plan_blocks, graph, options=options, block_scores=BlockScores(graph, options, data))
    else:
        chosen = importance_of(options.importance_name if importance is None else importance)
        options.check_importance(chosen)
        if isinstance(importance, Mapping):
            _check_groups(graph, importance)
        only_measured = max_drop is not None and validation is None and chosen.needs == "weights"
        scores = scores_of(graph, options, chosen, None if only_measured else data, loss)
        plan_for = partial(_plan_units, graph, options=options, scores=scores)
    if max_drop is None:
        return plan_for(goal)
    samples, argument = (data, "data") if validation is None else (validation, "validation")
    quality = Quality(graph, samples, metric, class_weights, argument=argument)
    search = DropSearch(graph, quality, max_drop, minimized_cost(graph, goal, minimize), plan_for)
    return search.within(goal, least_cost(graph, options))


def least_cost(graph: Graph, options: PlanOptions) -> Cost:
    """Return the least cost that plans with these options and any goal reach."""
    if options.of_blocks:
        return least_cost_of_blocks(graph, options)
    return _least(graph, Goal(parameters=0.5), options, _equal_scores).cost


def _check_reference(graph: Graph, goal: Goal) -> None:
    """Raise a GoalError if the model costs more than the original that the goal states."""
    for name in goal.to_dict() if goal.of is not None else ():
        cost, reference = getattr(graph.cost, name), getattr(goal.of, name)
        if cost > reference:
            raise GoalError(
                f"The goal is a fraction of {figures.count(reference)} {WORDS[name]}, and {graph.model_name} has "
                f"{figures.count(cost)}.",
                "A model that is pruned cannot cost more than its original.",
                "Trace both with example inputs of the same shape, and give of=graph.cost of the original.",
            )


def _check_groups(graph: Graph, scores: Mapping[str, Any]) -> None:
    """Raise an UnknownNameError for scores of a group that the model does not have."""
    known = [group.name for group in graph.groups]
    unknown = next((name for name in scores if name not in known), None)
    if unknown is not None:
        raise UnknownNameError("group", unknown, known, argument="importance")


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


def _plan_units(graph: Graph, goal: Goal | None, options: PlanOptions, scores: ScoreCache) -> Plan:
    """Return the units to remove from the layers of a model."""
    if goal is None:
        chooser = _chooser(graph, None, options, scores.get, 0)
        counts = chooser.given()
    else:
        chooser, counts = _search(graph, goal, options, scores)
    name = options.importance_name
    reason = {"magnitude": f"smallest weights of the group (L{options.norm})"}.get(name, f"least {name}")
    _check_constants(graph, chooser.keep(counts))
    chosen = Plan(
        fingerprint=graph.fingerprint,
        model=graph.model_name,
        groups=_removals(removable_groups(graph, options), chooser.candidates, counts, reason),
        before=graph.cost,
        after=chooser.price(counts),
        goal={} if goal is None else goal.to_dict(),
        goal_of=None if goal is None else goal.of,
        method=options.to_dict(),
        inputs=graph.inputs,
        tracing=graph.tracing,
        graph=graph,
    )
    notes = (
        met_note(chosen),
        landing_note(chosen),
        *width_notes(chosen),
        *unused_notes(chosen, graph),
        *uncounted_notes(chosen, graph),
        *absent_kind_notes(graph, options),
        *exclusion_notes(graph, options, lambda changed: _least(graph, goal, changed, _equal_scores)),
    )
    return replace(chosen, notes=tuple(note for note in notes if note))


def _search(graph: Graph, goal: Goal, options: PlanOptions, scores: ScoreCache) -> tuple[Chooser, list[int]]:
    """Return the number of units to remove from each candidate, so that the goal is met."""
    # A goal that is out of reach is found before the importances are computed, which may run the model.
    least = _least(graph, goal, options, _equal_scores)
    if not goal.met_by(least.cost, graph.cost):
        raise unreachable(graph, goal, options, lambda changed: _least(graph, goal, changed, _equal_scores))
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
        raise unreachable(graph, goal, options, lambda changed: _least(graph, goal, changed, _equal_scores))
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
                _unit_cost(graph, goal, tied) if goal is not None and options.ranking == "per_cost" else 1.0,
                kept,
            )
        )
    return Chooser(graph, goal, candidates)


def _least(graph: Graph, goal: Goal | None, options: PlanOptions, scores: Scores) -> Least:
    """Return the least cost that plans with these options reach."""
    chooser = _chooser(graph, goal, options, scores, max_halvings(options))
    counts = chooser.least()
    return Least(chooser.price(counts), chooser.keep(counts))


def _equal_scores(group: Group, _options: PlanOptions) -> NDArray[np.float64]:
    """Return the importance 0 for each unit. The least cost is almost the same for any choice of units."""
    return np.zeros(group.size)


def _unit_cost(graph: Graph, goal: Goal, groups: Sequence[Group]) -> float:
    """Return the mean cost of a unit of some groups, as the sum of its fractions of the costs that the goal limits."""
    without = graph.prices.price(graph.keep({group.name: tuple(range(group.size)) for group in groups}))
    remaining, present = (goal.fractions(cost, graph.cost) for cost in (without, graph.cost))
    cost = sum(present[name][0] - remaining[name][0] for name in present) / sum(group.size for group in groups)
    return max(cost, np.finfo(float).eps)


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


def _check_constants(graph: Graph, keep: NDArray[np.bool_]) -> None:
    graph.constants(keep)
    found = graph.too_small(keep)
    if found is not None:
        raise PlanError(too_few_units("The plan", *found), fix="Raise min_keep.")
