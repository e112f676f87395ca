"""Importances of residual blocks, and the choice of the blocks to remove."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from kirsch import figures
from kirsch.errors import GoalError, UsageError
from kirsch.graph.inputs import InputSpec
from kirsch.graph.plan import Plan, Skip
from kirsch.pruning.exclusion import excluded_blocks_note
from kirsch.pruning.importance.calibration import CalibrationBatches, check_reusable
from kirsch.pruning.importance.padding import only_padding, unknown_positions, without_padding
from kirsch.pruning.importance.statistics import calibration_of
from kirsch.pruning.notes import landing_note, met_note, uncounted_notes
from kirsch.pruning.obstacles import reachable
from kirsch.pruning.selection import matches, named_parameters, unknown_layer
from kirsch.registry import Registry
from kirsch.tasks.padding import counted_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.data.batches import Batch
    from kirsch.graph.cost import Cost
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Goal
    from kirsch.pruning.importance.importance import Needs
    from kirsch.pruning.importance.padding import Padding
    from kirsch.pruning.options import PlanOptions


class BlockImportance(Protocol):
    """A registered importance of residual blocks.

    Attributes:
        needs: what it is computed from: "weights" if it does not run the model, else "inputs".
    """

    needs: Needs

    def __call__(self, graph: Graph, batches: Iterable[Batch], *, seed: int) -> dict[str, float]:
        """Return a finite number for the path of each block of the graph, larger for blocks that should be kept.

        Args:
            graph: the graph of the model.
            batches: calibration batches, with inputs by position as a dict by name; empty for importances that need
                none.
            seed: seed of importances that draw random numbers.
        """


BLOCK_IMPORTANCES: Registry[BlockImportance] = Registry("block importance")


def block_importance(
    name: str, *, needs: Needs = "inputs"
) -> Callable[[Callable[..., dict[str, float]]], BlockImportance]:
    """Decorate a function of a graph, batches and a seed to register it as an importance of residual blocks."""

    def register(formula: Callable[..., dict[str, float]]) -> BlockImportance:
        found = cast("BlockImportance", formula)
        found.needs = needs
        return BLOCK_IMPORTANCES.register(name)(found)

    return register


def runs_model(name: str) -> bool:
    """Return whether an importance of blocks is computed from calibration data."""
    return getattr(BLOCK_IMPORTANCES[name], "needs", "inputs") != "weights"


@block_importance("influence")
def influence(graph: Graph, batches: Iterable[Batch], *, seed: int) -> dict[str, float]:
    """Return one minus the mean cosine similarity of input and output of each block, over all positions.

    Runs the model once per batch; padding does not count. A block that does not change the direction of its input has
    importance 0.

    Source: Men et al. 2024, arXiv:2403.03853, equation 1 (block influence).
    """
    del seed
    return mean_influence(graph, ((batch.inputs, padding) for batch, padding in without_padding(batches)))


def mean_influence(graph: Graph, parts: Iterable[tuple[Any, Padding | None]]) -> dict[str, float]:
    """Return the importances of `influence`.

    Args:
        graph: graph of the model.
        parts: inputs with their padding: None if all positions count.
    """
    sums, counts = dict.fromkeys(graph.blocks, 0.0), dict.fromkeys(graph.blocks, 0)
    for inputs, padding in parts:

        def record(
            path: str,
            entry: NDArray[Any],
            exit_: NDArray[Any],
            joined: bool,
            padding: Padding | None = padding,
        ) -> None:
            if joined and padding is not None and padding.exists:
                raise unknown_positions(path)
            lengths = np.linalg.norm(entry, axis=-1) * np.linalg.norm(exit_, axis=-1)
            distances = (1 - (entry * exit_).sum(-1) / np.where(lengths == 0, 1, lengths)).ravel()
            counted = distances if padding is None else padding.left_out(path, distances, None)
            sums[path] += float(counted.sum())
            counts[path] += counted.size

        calibration_of(graph).block_features(graph, inputs, record)
    return {path: total / max(counts[path], 1) for path, total in sums.items()}


@block_importance("change")
def change(graph: Graph, batches: Iterable[Batch], *, seed: int) -> dict[str, float]:
    """Return for each block the L2 change of the model's outputs without the block, relative to their L2 norm.

    Runs the model once per block and batch; the outputs for padding do not count.
    """
    del seed
    squared_change, squared_norm, counts = dict.fromkeys(graph.blocks, 0.0), 0.0, [0, 0]

    def counted(outputs: Sequence[NDArray[Any]], inputs: Any) -> list[NDArray[Any]]:
        tokens = [counted_tokens(inputs, out.shape) for out in outputs]
        return [out if mask is None else out[mask] for out, mask in zip(outputs, tokens, strict=True)]

    for batch in batches:
        outputs = calibration_of(graph).outputs(graph, batch.inputs)
        full = counted(outputs, batch.inputs)
        counts = [n + sum(out.size for out in each) for n, each in zip(counts, (outputs, full), strict=True)]
        squared_norm += sum(float((out**2).sum()) for out in full)
        for path in graph.blocks:
            without = counted(calibration_of(graph).outputs(graph, batch.inputs, [path]), batch.inputs)
            squared_change[path] += sum(float(((a - b) ** 2).sum()) for a, b in zip(full, without, strict=True))
    if counts[0] and not counts[1]:
        raise only_padding()
    tiny = np.finfo(float).tiny
    return {path: float(np.sqrt(total / max(squared_norm, tiny))) for path, total in squared_change.items()}


@block_importance("random", needs="weights")
def random(graph: Graph, batches: Iterable[Batch], *, seed: int) -> dict[str, float]:
    """Return uniform random numbers, the baseline for other importances. Equal seeds give equal numbers."""
    del batches
    return dict(zip(graph.blocks, np.random.default_rng(seed).uniform(size=len(graph.blocks)).tolist(), strict=True))


class BlockScores:
    """Importances of the blocks, computed once, when they are first used.

    Args:
        graph: graph of the model.
        options: options of the plan.
        data: calibration data, or None.
        measured: whether the drop is measured on `data`, too, so that an importance need not use it.

    Raises:
        UnknownNameError: there is no importance of this name.
        UsageError: data is missing, has no effect, or can be iterated over only once.
    """

    def __init__(self, graph: Graph, options: PlanOptions, data: Any, *, measured: bool = False) -> None:
        self._graph, self._options = graph, options
        name = options.importance_name
        self._importance = BLOCK_IMPORTANCES[name]
        runs = runs_model(name)
        if runs and data is None:
            raise UsageError(
                f"`data` of kirsch.plan is missing: the importance {name!r} of blocks runs the model.",
                fix="Give calibration batches of inputs, 256 samples: a DataLoader, kirsch.ArrayData or a list.",
            )
        if not runs and data is not None and not measured:
            raise UsageError(
                "`data` of kirsch.plan has no effect.",
                f"The importance {name!r} of blocks does not run the model.",
                "Remove `data`, or give an importance that uses it, such as 'influence'.",
            )
        check_reusable(data)
        reader = f"The importance {name!r}"
        self._batches = CalibrationBatches(graph.model, data, "inputs", reader, options.loss) if runs else ()
        self._scores: dict[str, float] | None = None

    def of(self, removable: Sequence[str]) -> dict[str, float]:
        """Return the importance of each block, finite for those that can be removed."""
        if self._scores is None:
            calibration_of(self._graph)  # refuses a graph without a model
            _check_form(self._graph, self._batches)
            scores = self._importance(self._graph, self._batches, seed=self._options.seed)
            not_finite = [path for path in removable if not np.isfinite(scores[path])]
            if not_finite:
                raise UsageError(
                    f"The importance {self._options.importance_name!r} of the block {not_finite[0]!r} is "
                    f"{scores[not_finite[0]]}.",
                    "An importance must be a finite number.",
                    "Check the weights and the data.",
                )
            self._scores = scores
        return self._scores


def _check_form(graph: Graph, batches: Iterable[Batch]) -> None:
    """Refuse a batch (a, b) if it may contain two inputs of the model, and not inputs and labels."""
    first = next(iter(batches), None)
    if first is None or first.targets is None or not hasattr(first.inputs, "shape"):
        return
    positional = [item for item in graph.inputs if isinstance(item, InputSpec) and not item.name]
    if len(positional) > 1 and len(positional[1].shape) == len(first.targets.shape):
        raise UsageError(
            "A batch of `data` has two parts, which may be inputs and labels, or two inputs of the model.",
            f"{graph.model_name} was traced with {len(positional)} inputs by position.",
            "Give a dict of the inputs by name, or ((first, second), labels).",
        )


def not_excluded_blocks(graph: Graph, exclude: Sequence[str]) -> list[str]:
    """Return the paths of the blocks that are not excluded.

    Raises:
        UsageError: a pattern of `exclude` matches no layer.
    """
    return _removable(graph, exclude)[0]


def least_cost_of_blocks(graph: Graph, options: PlanOptions) -> Cost:
    """Return the cost without all blocks that can be removed."""
    return graph.prices.price(graph.keep({}), not_excluded_blocks(graph, options.exclude))


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


def _fix(graph: Graph, goal: Goal, exclude: Sequence[str]) -> str:
    """Return a sentence on whether removing all blocks reaches the goal; empty for a model without blocks."""
    if exclude and goal.met_by(graph.prices.price(graph.keep({}), graph.blocks), graph.cost):
        return "The goal is reached if no block is excluded."
    return "Removing all blocks does not reach the goal; other `kinds` reduce layer widths." if graph.blocks else ""


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
