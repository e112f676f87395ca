"""Sensitivity of a model: its quality when a part of the units of one group is removed, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kirsch.annotations import Count, Names, Seed
from kirsch.arguments import checked
from kirsch.data.annotations import Calibration
from kirsch.errors import ModelError, NumericError, UsageError
from kirsch.frameworks.progress import shown_on
from kirsch.graph.graph import Graph
from kirsch.graph.kinds import BLOCK
from kirsch.graph.plan import Removal, Skip
from kirsch.progress import CountProgress
from kirsch.pruning.blocks import not_excluded_blocks
from kirsch.pruning.importance import importance_of
from kirsch.pruning.notes import too_few_units
from kirsch.pruning.options import ClassWeights, KindNames, PlanOptions
from kirsch.pruning.quality import Quality
from kirsch.pruning.scores import scores_of
from kirsch.pruning.selection import removable_groups
from kirsch.pruning.sensitivity_options import FRACTIONS, SAMPLES, Fractions, SensitivityOptions
from kirsch.pruning.sensitivity_table import Point, Row, Sensitivity, removed_count

if TYPE_CHECKING:
    from kirsch.graph.group import Group


@checked
def sensitivity(
    graph: Graph,
    data: Calibration,
    *,
    fractions: Fractions = FRACTIONS,
    importance: str | Callable[..., Any] = "magnitude",
    metric: str | Callable[..., Any] | None = None,
    class_weights: ClassWeights = None,
    kinds: KindNames | None = None,
    exclude: Names = (),
    samples: Count = SAMPLES,
    loss: str | Callable[..., Any] = "cross-entropy",
    seed: Seed = 0,
    progress: bool | None = None,
) -> Sensitivity:
    """Return the quality of a model when a fraction of the units of one group is removed, for each group.

    All other groups keep their units, and nothing is trained. A residual block is removed as a whole. The model is
    evaluated once, and once more for each group and fraction, and for each block: at most (groups · fractions + blocks
    + 1) passes over `samples` samples. One pruned copy of the model exists at a time.

    Args:
        graph: result of `kirsch.trace`.
        data: samples on which the quality is measured, and the calibration data of importances that run the model:
            batches of (inputs, labels), a DataLoader, `ArrayData`, or one batch. With inputs alone, the outputs are
            compared with those of the original. Of data in memory, evenly spaced samples are used; of a loader, the
            first ones.
        fractions: fractions of the units that are removed, each above 0 and below 1. At least one unit is removed, and
            at least one is kept.
        importance: importance that ranks the units of a group, see `kirsch.plan`. The least important are removed.
        metric: metric of the quality, see `kirsch.plan`. None: by the form of the labels; "kl" without labels.
        class_weights: class number → weight for the accuracy, see `kirsch.plan`.
        kinds: only units of these kinds (`kirsch.graph.kinds.KINDS`); "block" for residual blocks. None: all units and
            all residual blocks.
        exclude: module paths, parameter names or globs; groups and blocks with these parameters are left out.
        samples: largest number of samples.
        loss: loss for importances from labels, see `kirsch.plan`.
        seed: seed of the importances "random" and "hessian".
        progress: show a bar on the standard error. None: on a terminal and in a notebook.

    Returns:
        A `Sensitivity`, which can be printed and stored as JSON.

    Raises:
        UnknownNameError: a metric, an importance, a kind or a name to exclude is unknown.
        UsageError: a fraction is out of range, or nothing is left to measure.
        DataError: the data has no samples, or the metric needs other labels.
    """
    _check_fractions(fractions)
    chosen = importance_of(importance)
    groups, blocks, options = _selected(graph, kinds, exclude, chosen.name, loss, seed)
    quality = Quality(graph, data, metric, class_weights, samples=samples)
    scores = scores_of(graph, options, chosen, quality.batches if chosen.needs != "weights" else None, loss)
    analysis = _Analysis(graph, quality, chosen.name)
    counts = {group.name: _counts(group, fractions) for group in groups}
    with CountProgress(shown_on(progress), "sensitivity", _passes(groups, blocks, fractions)) as shown:
        original = quality.original
        shown.advance()
        costs = {cost.group.name: cost for cost in graph.group_costs()}
        rows = []
        for group in groups:
            order, points = scores.get(group, options).argsort(kind="stable"), []
            for count in counts[group.name]:
                points.append(analysis.of_units(group, tuple(sorted(order[:count].tolist()))))
                shown.advance()
            saved = costs[group.name]
            rows.append(Row(group.name, group.kind, group.size, saved.parameters, saved.macs, tuple(points)))
        for path in blocks:
            rows.append(analysis.of_block(path))
            shown.advance()
    return Sensitivity(
        model=graph.model_name,
        importance=chosen.name,
        metric=quality.metric.name,
        percent=quality.metric.fraction,
        samples=original.n,
        original=original.value,
        fractions=tuple(sorted(set(fractions))),
        parameters=graph.cost.parameters,
        macs=graph.cost.macs,
        rows=tuple(rows),
    )


def _check_fractions(fractions: Sequence[float]) -> None:
    if not fractions:
        raise UsageError("`fractions` is empty.", fix="Give at least one fraction, such as [0.5].")


def _counts(group: Group, fractions: Sequence[float]) -> list[int]:
    """Return the numbers of units that are removed from a group, ascending."""
    return sorted({removed_count(group.size, fraction) for fraction in fractions})


def _passes(groups: Sequence[Group], blocks: Sequence[str], fractions: Sequence[float]) -> int:
    """Return the number of models that are evaluated."""
    return 1 + len(blocks) + sum(len(_counts(group, fractions)) for group in groups)


def passes_of(
    graph: Graph, data: Any, options: SensitivityOptions, metric: Any, class_weights: Any
) -> tuple[Quality, int]:
    """Return the evaluation of models for `sensitivity`, and their number, after a check of the options and the data.

    Args:
        graph, data, metric, class_weights: see `sensitivity`.
        options: the other options.
    """
    _check_fractions(options.fractions)
    name = importance_of(options.importance).name
    groups, blocks, _ = _selected(graph, options.kinds, options.exclude, name, "cross-entropy", 0)
    quality = Quality(graph, data, metric, class_weights, samples=options.samples)
    return quality, _passes(groups, blocks, options.fractions)


def _selected(
    graph: Graph, kinds: Sequence[str] | None, exclude: Sequence[str], importance: str, loss: Any, seed: int
) -> tuple[list[Group], list[str], PlanOptions]:
    """Return the groups and the residual blocks to measure, and the options by which the units are ranked.

    Raises:
        UnknownNameError: a kind or a name to exclude is unknown.
        UsageError: there are neither groups nor blocks.
    """
    of_units = None if kinds is None else tuple(kind for kind in kinds if kind != BLOCK)
    with_units, with_blocks = of_units is None or bool(of_units), kinds is None or BLOCK in kinds
    options = PlanOptions(
        kinds=of_units or None,
        exclude=exclude,
        importance=importance,
        loss=loss if isinstance(loss, str) else "given function",
        seed=seed,
    )
    groups = removable_groups(graph, options) if with_units else []
    blocks = not_excluded_blocks(graph, exclude) if with_blocks else []
    if not groups and not blocks:
        raise UsageError(
            f"{graph.model_name} has no units or residual blocks to measure with these options.",
            fix="Give other `kinds`, or exclude fewer layers.",
        )
    return groups, blocks, options


class _Analysis:
    """Measurements of a model without units of one group, or without one residual block.

    Args:
        graph: graph of the model.
        quality: evaluation of the original and of pruned models.
        importance: name of the importance that ranks the units.
    """

    def __init__(self, graph: Graph, quality: Quality, importance: str) -> None:
        self._graph, self._quality, self._reason = graph, quality, f"least {importance}"

    def of_units(self, group: Group, units: tuple[int, ...]) -> Point:
        """Return the quality without some units of a group."""
        found = self._graph.too_small(self._graph.keep({group.name: units}))
        if found is not None:
            return Point(len(units), None, too_few_units("The removal", *found))
        removal = Removal(group.name, group.kind, group.size, units, self._reason)
        return self._point(len(units), [removal], [])

    def of_block(self, path: str) -> Row:
        """Return the quality without a residual block."""
        graph = self._graph
        rest = graph.prices.price(graph.keep({}), [path])
        saved = graph.cost.parameters - rest.parameters, graph.cost.macs - rest.macs
        return Row(path, BLOCK, 1, *saved, (self._point(1, [], [Skip(path, "measured")]),))

    def _point(self, count: int, groups: list[Removal], blocks: list[Skip]) -> Point:
        """Return the quality of a pruned model, or the reason why it cannot be built or run."""
        try:
            return Point(count, self._quality.without(groups, blocks).value)
        except (ModelError, UsageError, NumericError) as error:
            return Point(count, None, f"{error.what} {error.why}".strip())
