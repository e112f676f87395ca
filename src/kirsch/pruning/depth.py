"""From a goal to a plan that leaves whole residual blocks out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kirsch.annotations import Names, Seed
from kirsch.arguments import checked
from kirsch.errors import GoalError, UnknownNameError, UsageError
from kirsch.frameworks.annotations import Inputs
from kirsch.graph.graph import Graph
from kirsch.graph.plan import Goal, Plan, Skip
from kirsch.pruning.obstacles import reachable
from kirsch.pruning.options import matches
from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kirsch.graph.graph import ModelRunner


class BlockImportance(Protocol):
    """What a registered importance of blocks looks like."""

    def __call__(self, graph: Graph, batches: Sequence[Any], *, seed: int) -> dict[str, float]:
        """Path of each block of the graph → a finite number, larger for what should stay.

        Args:
            graph: runs the model by `graph.runner`.
            batches: calibration inputs, each in the form of the example inputs.
            seed: for those that draw.
        """


BLOCK_IMPORTANCES: Registry[BlockImportance] = Registry("importance of blocks")


@BLOCK_IMPORTANCES.register("influence")
def influence(graph: Graph, batches: Sequence[Any], *, seed: int) -> dict[str, float]:
    """One minus the mean cosine between what a block is given and what it puts out, over all positions.

    One run of the model for all blocks. 0 is a block that changes no direction.

    Source: Men et al. 2024, arXiv:2403.03853, equation 1 (block influence).
    """
    del seed
    found: dict[str, list[NDArray[np.float64]]] = {path: [] for path in graph.blocks}

    def see(path: str, entry: NDArray[Any], exit_: NDArray[Any]) -> None:
        lengths = np.linalg.norm(entry, axis=-1) * np.linalg.norm(exit_, axis=-1)
        cosine = (entry * exit_).sum(-1) / np.where(lengths == 0, 1, lengths)
        found[path].append(1 - cosine.ravel())

    for batch in batches:
        _runner(graph).passed(batch, see)
    return {path: float(np.concatenate(values).mean()) for path, values in found.items()}


@BLOCK_IMPORTANCES.register("change")
def change(graph: Graph, batches: Sequence[Any], *, seed: int) -> dict[str, float]:
    """How far the outputs of the model move when the block is left out, relative to their size (L2).

    One run of the model for each block.
    """
    del seed
    moved, size = dict.fromkeys(graph.blocks, 0.0), 0.0
    for batch in batches:
        whole = _runner(graph).outputs(batch)
        size += sum(float((out**2).sum()) for out in whole)
        for path in graph.blocks:
            without = _runner(graph).outputs(batch, [path])
            moved[path] += sum(float(((a - b) ** 2).sum()) for a, b in zip(whole, without, strict=True))
    return {path: float(np.sqrt(total / max(size, np.finfo(float).tiny))) for path, total in moved.items()}


@BLOCK_IMPORTANCES.register("random")
def random(graph: Graph, batches: Sequence[Any], *, seed: int) -> dict[str, float]:
    """Uniform numbers: the baseline that any other importance has to beat. Equal seeds give equal numbers."""
    del batches
    return dict(zip(graph.blocks, np.random.default_rng(seed).uniform(size=len(graph.blocks)).tolist(), strict=True))


@checked
def plan_depth(
    graph: Graph,
    goal: Goal,
    data: Inputs,
    importance: str = "influence",
    exclude: Names = (),
    *,
    seed: Seed = 0,
) -> Plan:
    """Which residual blocks to leave out so that the model costs no more than the goal.

    The least important go first; then those that the goal leaves room for come back, the most important first. To cut
    widths too, prune by this plan, trace the result, and plan again with `kirsch.plan`.

    Args:
        graph: of `kirsch.trace`; its `blocks` are what may go.
        goal: fractions of the original cost.
        data: calibration inputs in the form of the example inputs, or a list of such batches.
        importance: "influence" (one minus the cosine of what a block is given and puts out), "change" (of the outputs
            when it is left out; one run a block), or "random".
        exclude: paths of blocks or of what they lie in, or globs ("layer4.*"); these stay.
        seed: of the importance "random".

    Returns:
        A `Plan` with `blocks`, for `kirsch.prune`.

    Raises:
        GoalError: leaving all blocks out does not reach the goal; says the least that is reachable.
        UnknownNameError: there is no such importance, or no such block to exclude.
        UsageError: an importance is not finite, as where the data make the model put out NaN.
    """
    free = _without(graph, exclude)
    keep = graph.keep({})
    least = graph.prices.price(keep, free)
    if not goal.met_by(least, graph.cost):
        raise GoalError(
            f"No plan for {graph.model_name} reaches the goal by leaving blocks out: "
            f"{goal.shortfall(least, graph.cost)}.",
            f"It has {len(graph.blocks)} residual blocks, of which {len(free)} may go.",
            f"{_remedy(graph, goal, exclude)} {reachable(goal, least, graph.cost)}".strip(),
        )
    score = BLOCK_IMPORTANCES[importance](graph, data if isinstance(data, list) else [data], seed=seed)
    wrong = [path for path in free if not np.isfinite(score[path])]
    if wrong:
        raise UsageError(
            f"The importance {importance!r} of the block {wrong[0]!r} is {score[wrong[0]]}.",
            "It must be a finite number.",
            "Check the weights and the data.",
        )
    order = sorted(free, key=lambda path: score[path])
    gone: list[str] = []
    while not goal.met_by(graph.prices.price(keep, gone), graph.cost):
        gone.append(order[len(gone)])
    for path in reversed(list(gone)):
        rest = [other for other in gone if other != path]
        if goal.met_by(graph.prices.price(keep, rest), graph.cost):
            gone = rest
    return Plan(
        fingerprint=graph.fingerprint,
        model=graph.model_name,
        groups=(),
        before=graph.cost,
        after=graph.prices.price(keep, gone),
        goal=goal.to_dict(),
        method={"importance": importance, "exclude": list(exclude), "seed": seed},
        inputs=graph.inputs,
        tracing=graph.tracing,
        blocks=tuple(Skip(p, f"least {importance}: {score[p]:.3g}") for p in graph.blocks if p in gone),
        graph=graph,
    )


def _remedy(graph: Graph, goal: Goal, exclude: Sequence[str]) -> str:
    """What was found to reach the goal by leaving blocks out, as a sentence."""
    if exclude and goal.met_by(graph.prices.price(graph.keep({}), graph.blocks), graph.cost):
        return "It is reached where nothing is excluded."
    return "Leaving out all of them does not reach it; kirsch.plan cuts widths." if graph.blocks else ""


def _runner(graph: Graph) -> ModelRunner:
    if graph.runner is None:
        raise UsageError("This graph cannot run its model.", "It was not made by kirsch.trace.")
    return graph.runner


def _without(graph: Graph, exclude: Sequence[str]) -> list[str]:
    """The blocks that may go."""
    free = list(graph.blocks)
    for pattern in exclude:
        named = [path for path in graph.blocks if matches(path, pattern)]
        if not named:
            raise UnknownNameError("residual block to `exclude` named", pattern, graph.blocks)
        free = [path for path in free if path not in named]
    return free
