"""Plans that make only cuts which the configuration of a model can state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kirsch.errors import UsageError
from kirsch.graph.plan import Goal, Plan, Skip
from kirsch.pruning.loadable import LoadableSearch, configurable_of
from kirsch.pruning.units import assembled, with_notes

if TYPE_CHECKING:
    from kirsch.graph.graph import Graph
    from kirsch.pruning.obstacles import Least
    from kirsch.pruning.options import PlanOptions
    from kirsch.pruning.scores import ScoreCache


def plan_loadable(graph: Graph, goal: Goal | None, options: PlanOptions, scores: ScoreCache) -> Plan:
    """Return the cuts that meet the goal and that the configuration of the model states.

    Raises:
        GoalError: the configuration cannot state cuts that meet the goal.
        UsageError: the model has no configuration that could state cuts, or there is no goal.
    """
    if goal is None or options.keep:
        raise UsageError(
            "`loadable=True` cannot be used with `keep`.",
            "Widths by hand may differ between layers that share a number of the configuration.",
            "Remove `keep` and give a goal, or remove `loadable`.",
        )
    configurable = configurable_of(graph)
    if configurable is None:
        raise UsageError(
            f"`loadable=True` cannot be used with this {graph.model_name}.",
            "It has no configuration from which the traced model can be built, like those of the transformers library.",
            "Remove `loadable`, and save the pruned model with kirsch.save.",
        )
    search = LoadableSearch(graph, goal, options, configurable, scores.get)
    if not goal.met_by(search.least().cost, graph.cost):
        raise search.error()
    choice = search.best()
    name = options.importance_name
    blocks = tuple(Skip(path, f"least {name} of its units") for path in graph.blocks if path in choice.without)
    chosen = assembled(graph, goal, options, choice.chooser, choice.counts)
    chosen = replace(chosen, blocks=blocks, configuration=choice.numbers)

    def least(changed: PlanOptions) -> Least:
        return LoadableSearch(graph, goal, changed, configurable, lambda group, _: np.zeros(group.size)).least()

    return with_notes(chosen, graph, options, least)
