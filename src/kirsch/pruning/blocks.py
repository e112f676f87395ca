"""Importances of residual blocks, and the choice of the blocks to remove."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kirsch import figures
from kirsch.errors import GoalError, UsageError
from kirsch.graph.plan import Plan, Skip
from kirsch.pruning.exclusion import excluded_blocks_note
from kirsch.pruning.importance.statistics import calibration_of
from kirsch.pruning.notes import landing_note, met_note, uncounted_notes
from kirsch.pruning.obstacles import reachable
from kirsch.pruning.selection import matches, named_parameters, unknown_layer
from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.graph.cost import Cost
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Goal
    from kirsch.pruning.options import PlanOptions


class BlockImportance(Protocol):
    """Signature of a registered importance of residual blocks."""

    def __call__(self, graph: Graph, batches: Sequence[Any], *, seed: int) -> dict[str, float]:
        """Return a finite number for the path of each block of the graph, larger for blocks that should be kept.

        Args:
            graph: the graph of the model.
            batches: calibration inputs, each in the form of the example inputs.
            seed: seed of importances that draw random numbers.
        """


BLOCK_IMPORTANCES: Registry[BlockImportance] = Registry("block importance")


@BLOCK_IMPORTANCES.register("influence")
def influence(graph: Graph, batches: Sequence[Any], *, seed: int) -> dict[str, float]:
    """Return one minus the mean cosine similarity of input and output of each block, over all positions.

    Runs the model once per batch. A block that does not change the direction of its input has importance 0.

    Source: Men et al. 2024, arXiv:2403.03853, equation 1 (block influence).
    """
    del seed
    _check_data(batches, "influence")
    distances: dict[str, list[NDArray[np.float64]]] = {path: [] for path in graph.blocks}

    def record(path: str, entry: NDArray[Any], exit_: NDArray[Any]) -> None:
        lengths = np.linalg.norm(entry, axis=-1) * np.linalg.norm(exit_, axis=-1)
        cosine = (entry * exit_).sum(-1) / np.where(lengths == 0, 1, lengths)
        distances[path].append(1 - cosine.ravel())

    for batch in batches:
        calibration_of(graph).block_features(graph, batch, record)
    return {path: float(np.concatenate(values).mean()) for path, values in distances.items()}


@BLOCK_IMPORTANCES.register("change")
def change(graph: Graph, batches: Sequence[Any], *, seed: int) -> dict[str, float]:
    """Return for each block the L2 change of the model's outputs without the block, relative to their L2 norm.

    Runs the model once per block and batch.
    """
    del seed
    _check_data(batches, "change")
    squared_change, squared_norm = dict.fromkeys(graph.blocks, 0.0), 0.0
    for batch in batches:
        full = calibration_of(graph).outputs(graph, batch)
        squared_norm += sum(float((out**2).sum()) for out in full)
        for path in graph.blocks:
            without = calibration_of(graph).outputs(graph, batch, [path])
            squared_change[path] += sum(float(((a - b) ** 2).sum()) for a, b in zip(full, without, strict=True))
    tiny = np.finfo(float).tiny
    return {path: float(np.sqrt(total / max(squared_norm, tiny))) for path, total in squared_change.items()}


@BLOCK_IMPORTANCES.register("random")
def random(graph: Graph, batches: Sequence[Any], *, seed: int) -> dict[str, float]:
    """Return uniform random numbers, the baseline for other importances. Equal seeds give equal numbers."""
    del batches
    return dict(zip(graph.blocks, np.random.default_rng(seed).uniform(size=len(graph.blocks)).tolist(), strict=True))


class BlockScores:
    """Importances of the blocks, computed once, when they are first used.

    Args:
        graph: graph of the model.
        options: options of the plan.
        data: calibration inputs, or None.
    """

    def __init__(self, graph: Graph, options: PlanOptions, data: Any) -> None:
        self._graph, self._options, self._data = graph, options, data
        self._scores: dict[str, float] | None = None

    def of(self, removable: Sequence[str]) -> dict[str, float]:
        """Return the importance of each block, finite for those that can be removed."""
        if self._scores is None:
            options = self._options
            self._scores = _scores(self._graph, removable, options.importance_name, self._data, options.seed)
        return self._scores


def removable_blocks(graph: Graph, exclude: Sequence[str]) -> list[str]:
    """Return the paths of the blocks that are not excluded.

    Raises:
        UsageError: a pattern of `exclude` matches no layer.
    """
    return _removable(graph, exclude)[0]


def least_cost_of_blocks(graph: Graph, options: PlanOptions) -> Cost:
    """Return the cost without all blocks that can be removed."""
    return graph.prices.price(graph.keep({}), removable_blocks(graph, options.exclude))


def plan_blocks(graph: Graph, goal: Goal, options: PlanOptions, block_scores: BlockScores) -> Plan:
    """Return the residual blocks to remove, so that the cost of the model is at most the goal; see `kirsch.plan`.

    The least important blocks are removed first. Then blocks are restored as long as the goal is met, the most
    important first.

    Raises:
        GoalError: removing all blocks does not reach the goal; the message has the least reachable cost.
        UnknownNameError: an importance or a layer to exclude is unknown.
        UsageError: a pattern of `exclude` matches no layer, the importance needs data, or is not finite, for example
            because the model returns NaN for the data.
    """
    removable, without_effect = _removable(graph, options.exclude)
    least = graph.prices.price(graph.keep({}), removable)
    if not goal.met_by(least, graph.cost):
        raise GoalError(
            f"No plan for {graph.model_name} reaches the goal by removing blocks: {goal.shortfall(least, graph.cost)}.",
            f"The model has {figures.counted(len(graph.blocks), 'residual block')}"
            f"{f'; {len(removable)} can be removed' if options.exclude else ''}.",
            f"{_fix(graph, goal, options.exclude)} {reachable(goal, least, graph.cost)}".strip(),
        )
    name = options.importance_name
    scores = block_scores.of(removable)
    removed = _chosen(graph, goal, removable, scores)
    chosen = Plan(
        fingerprint=graph.fingerprint,
        model=graph.model_name,
        groups=(),
        before=graph.cost,
        after=graph.prices.price(graph.keep({}), removed),
        goal=goal.to_dict(),
        goal_of=goal.of,
        method=options.to_dict(),
        inputs=graph.inputs,
        tracing=graph.tracing,
        blocks=tuple(Skip(path, f"least {name}: {scores[path]:.3g}") for path in graph.blocks if path in removed),
        graph=graph,
    )
    exclusion = excluded_blocks_note(graph, options.exclude, removable) if len(removable) < len(graph.blocks) else ""
    unused = (
        f"exclude={[pattern]} has no effect: no residual block contains a layer of this name."
        for pattern in without_effect
    )
    notes = (met_note(chosen), landing_note(chosen, graph), *uncounted_notes(chosen, graph), exclusion, *unused)
    return replace(chosen, notes=tuple(filter(None, notes)))


def _chosen(graph: Graph, goal: Goal, removable: Sequence[str], scores: Mapping[str, float]) -> list[str]:
    """Return the least important blocks whose removal reaches the goal, without blocks that the goal allows to keep."""
    keep = graph.keep({})
    removed: list[str] = []
    for path in sorted(removable, key=lambda path: scores[path]):
        if goal.met_by(graph.prices.price(keep, removed), graph.cost):
            break
        removed.append(path)
    for path in reversed(list(removed)):
        rest = [other for other in removed if other != path]
        if goal.met_by(graph.prices.price(keep, rest), graph.cost):
            removed = rest
    return removed


def _scores(graph: Graph, removable: Sequence[str], name: str, data: Any, seed: int) -> dict[str, float]:
    """Return the importance of each block, finite for those that can be removed."""
    if data is None:
        batches: list[Any] = []
    else:
        batches = data if isinstance(data, list) else [data]
    scores = BLOCK_IMPORTANCES[name](graph, batches, seed=seed)
    not_finite = [path for path in removable if not np.isfinite(scores[path])]
    if not_finite:
        raise UsageError(
            f"The importance {name!r} of the block {not_finite[0]!r} is {scores[not_finite[0]]}.",
            "An importance must be a finite number.",
            "Check the weights and the data.",
        )
    return scores


def _fix(graph: Graph, goal: Goal, exclude: Sequence[str]) -> str:
    """Return a sentence on whether removing all blocks reaches the goal; empty for a model without blocks."""
    if exclude and goal.met_by(graph.prices.price(graph.keep({}), graph.blocks), graph.cost):
        return "The goal is reached if no block is excluded."
    return "Removing all blocks does not reach the goal; other `kinds` reduce layer widths." if graph.blocks else ""


def _check_data(batches: Sequence[Any], importance: str) -> None:
    if not batches:
        raise UsageError(
            f"`data` of kirsch.plan is missing: the importance {importance!r} of blocks runs the model.",
            fix="Give calibration inputs in the form of the example inputs, or a list of such batches.",
        )


def _removable(graph: Graph, exclude: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the paths of the blocks that are not excluded, and the patterns that exclude no block.

    A pattern excludes the blocks that it names. A pattern that names other layers excludes the blocks that contain
    them, because the parameters of these layers must not change.
    """
    removable, without_effect = list(graph.blocks), []
    for pattern in exclude:
        parameters = named_parameters(graph, pattern)
        named = [path for path in graph.blocks if matches(path, pattern)]
        named = named or [path for path in graph.blocks if any(name.startswith(f"{path}.") for name in parameters)]
        if not named and not parameters:
            raise unknown_layer(pattern, graph.blocks, "exclude")
        if not named:
            without_effect.append(pattern)
        removable = [path for path in removable if path not in named]
    return removable, without_effect
