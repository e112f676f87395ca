"""Plans that make only cuts which the configuration of a model can state, and when they are made by default."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kirsch.errors import GoalError, UsageError
from kirsch.graph.plan import Goal, Plan, Skip
from kirsch.pruning.loadable import LoadableSearch, configurable_of
from kirsch.pruning.scores import equal_scores
from kirsch.pruning.units import assembled, with_notes

if TYPE_CHECKING:
    from collections.abc import Callable

    from kirsch.graph.configuration import Configurable
    from kirsch.graph.cost import Cost
    from kirsch.graph.graph import Graph
    from kirsch.pruning.obstacles import Least
    from kirsch.pruning.options import PlanOptions
    from kirsch.pruning.scores import ScoreCache

    PlanFor = Callable[[Any], Plan]
    """Function that returns the plan for a goal, or for None with `keep`."""

CONSEQUENCE = (
    "If no number of the configuration states the cuts, only kirsch.load loads the pruned model, and `save_pretrained` "
    "raises an error."
)


def plan_function(
    graph: Graph,
    goal: Goal | None,
    options: PlanOptions,
    scores: ScoreCache,
    any_cuts: Callable[[PlanOptions], PlanFor],
) -> PlanFor:
    """Return the function that makes the plan for a goal, by the option `loadable`.

    By default, the plan makes only cuts that the configuration states, if the model has a configuration and the other
    options allow it. If the configuration cannot state a plan for the goal, an ordinary plan is made. A note states the
    reason for an ordinary plan of a model with a configuration.

    Args:
        graph: graph of the model.
        goal: the goal of the user; None for `keep` alone, or if `max_drop` determines the cost. The search for the
            smallest model then remains among those that the configuration states.
        options: options of the plan.
        scores: importances of the units.
        any_cuts: takes options, and returns the function that makes a plan of any cuts.
    """
    loadable = partial(plan_loadable, graph, options=options.changed(loadable=not options.free_widths), scores=scores)
    if options.loadable:
        return loadable
    plain = any_cuts(options.changed(loadable=False))
    configurable = None if options.loadable is False else configurable_of(graph)
    if configurable is None:
        return plain
    why = _default_obstacle(graph, options, configurable)
    if why:
        return lambda goal: _with_note(plain(goal), why)
    if goal is None and options.max_drop is not None:
        return loadable

    def plan_for(goal: Goal | None) -> Plan:
        try:
            return loadable(goal)
        except GoalError as error:
            reasons = " ".join(filter(None, (error.what, error.why)))
            return _with_note(plain(goal), f"{reasons} With loadable=True, this is an error. {CONSEQUENCE}")

    return plan_for


def is_loadable(graph: Graph, options: PlanOptions) -> bool:
    """Return whether `plan_function` tries to make only cuts that the configuration of the model states."""
    configurable = None if options.loadable is False else configurable_of(graph)
    return configurable is not None and not _default_obstacle(graph, options, configurable)


def least_loadable(graph: Graph, options: PlanOptions) -> Cost | None:
    """Return the least cost of plans that the configuration states; None if ordinary plans are made."""
    configurable = None if options.loadable is False or options.free_widths else configurable_of(graph)
    if configurable is None or (not options.loadable and _default_obstacle(graph, options, configurable)):
        return None
    return LoadableSearch(graph, Goal(parameters=0.5), options, configurable, equal_scores).least().cost


def _default_obstacle(graph: Graph, options: PlanOptions, configurable: Configurable) -> str:
    """Return why plans of a model with a configuration are ordinary ones by default; "" if they are not."""
    if options.free_widths:
        option, why, instead = options.free_widths
        return (
            f"{option} {why}. For cuts that the configuration of {graph.model_name} states, give {instead}. "
            f"{CONSEQUENCE}"
        )
    if configurable.obstacle:
        return f"the configuration of {graph.model_name} states no cuts: {configurable.obstacle} {CONSEQUENCE}"
    try:
        has_cuts = LoadableSearch(graph, Goal(parameters=0.5), options, configurable, equal_scores).has_cuts
    except UsageError as error:
        return f"{error.what} {error.why} {CONSEQUENCE}"
    return (
        ""
        if has_cuts
        else f"the configuration of {graph.model_name} can state no cut with these options. {CONSEQUENCE}"
    )


def _with_note(plan: Plan, reason: str) -> Plan:
    return replace(plan, notes=(*plan.notes, f"loadable=False: {reason}"))


def plan_loadable(graph: Graph, goal: Goal | None, options: PlanOptions, scores: ScoreCache) -> Plan:
    """Return the cuts that meet the goal, or without a goal those of `keep`, if the configuration states them.

    Raises:
        GoalError: the configuration cannot state cuts that meet the goal.
        UsageError: the model has no configuration that could state cuts, or none that states the widths in `keep`.
    """
    configurable = configurable_of(graph)
    if configurable is None or configurable.obstacle:
        why = (
            "It has no configuration from which the traced model can be built, like those of the transformers library."
            if configurable is None
            else f"Its configuration states no cuts: {configurable.obstacle}"
        )
        raise UsageError(
            f"`loadable=True` cannot be used with this {graph.model_name}.",
            why,
            "Remove `loadable`, and save the pruned model with kirsch.save.",
        )
    search = LoadableSearch(graph, goal, options, configurable, scores.get, scores.batches)
    if goal is not None and not goal.met_by(search.least().cost, graph.cost):
        raise search.error()
    choice = search.best()
    name = options.importance_name
    blocks = tuple(Skip(path, f"least {name} of its units") for path in graph.blocks if path in choice.without)
    chosen = assembled(graph, goal, options, choice.chooser, choice.counts)
    chosen = replace(chosen, blocks=blocks, configuration=choice.numbers)

    def least(changed: PlanOptions) -> Least:
        return LoadableSearch(graph, goal, changed, configurable, equal_scores).least()

    return with_notes(chosen, graph, options, least)
