"""The ranking "milp": the width of each group by the measured change of the model's outputs, under a goal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.pruning.alternatives import Alternatives, removable_blocks
from kirsch.pruning.notes import CLOSE
from kirsch.pruning.output_change import mean_output_changes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kirsch.data.batches import Batch
    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Goal
    from kirsch.pruning.options import PlanOptions
    from kirsch.pruning.search import Chooser


def allocate(
    graph: Graph,
    goal: Goal,
    options: PlanOptions,
    choosers: Iterable[Chooser],
    batches: Iterable[Batch],
    *,
    progress: bool | None = None,
) -> tuple[Chooser, list[int], dict[str, float]] | None:
    """Return the choice of widths and residual blocks with the least sum of output changes that meets the goal.

    Each alternative is measured by itself: the outputs of the model in which only this group or block is reduced are
    compared with those of the original. The sum over the groups estimates the change of all of them together. The
    alternatives of least sum are chosen, and then units are restored as long as the goal is met, those with the largest
    change of the outputs first.

    Args:
        graph: graph of the model.
        goal: the goal.
        options: options of the plan.
        choosers: searches with finer and finer widths. The alternatives are those of the first one that can reach the
            goal; the others are used only to come closer to the goal.
        batches: calibration batches, which are read once.
        progress: whether to show the progress of the measurement.

    Returns:
        The search, the number of removed units of each of its candidates, and the change of the outputs by each removed
        block. None if no choice meets the goal.

    Source: Bercovich et al. 2024, arXiv:2411.19146, score the alternatives of each block of a language model by
        replacing one block at a time, and choose by an integer program. There, the costs of the blocks do not depend on
        each other.
    """
    blocks = removable_blocks(graph, options)
    reaching = [chooser for chooser in choosers if _reaches(chooser, blocks)]
    if not reaching:
        return None
    alternatives = Alternatives(graph, reaching[0], blocks)
    changes = mean_output_changes(graph, alternatives.variants(), batches, options.loss, progress=progress)
    scores = alternatives.scores(changes, options)
    choice = alternatives.allocation(scores, goal).best(alternatives.starts())
    if choice is None:
        return None
    of_block = dict(zip(blocks, changes[len(changes) - len(blocks) :].tolist(), strict=True))
    removed = {path: of_block[path] for path in alternatives.removed_blocks(choice)}
    chooser, counts = reaching[0], alternatives.removed(choice)
    for chooser in reaching:
        chooser.without = tuple(removed)
        for candidate, unit_scores in zip(chooser.candidates, alternatives.unit_scores(scores), strict=True):
            candidate.removal_scores = unit_scores
        counts = chooser.filled(chooser.refine(counts, [0] * len(counts)), CLOSE)
        if chooser.distance(counts) <= CLOSE:
            break
    return chooser, counts, removed


def count_runs(graph: Graph, options: PlanOptions, choosers: Iterable[Chooser]) -> int:
    """Return the number of models that `allocate` runs on each batch, with the original; 0 if none is small enough.

    Args:
        graph: graph of the model.
        options: options of the plan.
        choosers: see `allocate`.
    """
    blocks = removable_blocks(graph, options)
    reaching = next((chooser for chooser in choosers if _reaches(chooser, blocks)), None)
    return 0 if reaching is None else 1 + len(Alternatives(graph, reaching, blocks).variants())


def _reaches(chooser: Chooser, blocks: tuple[str, ...]) -> bool:
    """Return whether a search reaches its goal if all of these residual blocks are removed."""
    least, chooser.without = chooser.least(), blocks
    reached = chooser.fits(least)
    chooser.without = ()
    return reached
