"""Importances of the units of all groups, computed once and checked to be finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kirsch.errors import NumericError, UsageError
from kirsch.graph.kinds import RESIDUAL_STREAM
from kirsch.pruning.importance.calibration import batches_for, loss_of
from kirsch.pruning.importance.importance import GIVEN
from kirsch.pruning.importance.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance import Importance
    from kirsch.pruning.importance.calibration import CalibrationBatches
    from kirsch.pruning.options import PlanOptions

Scores: TypeAlias = "Callable[[Group, PlanOptions], NDArray[np.float64]]"
"""Returns the importance of each unit of a group, divided by the weight of its kind."""


class ScoreCache:
    """Importance of each unit of each group, computed once per group.

    Args:
        graph: graph of the model.
        options: options of the plan.
        importance: the importance.
        batches: calibration batches; None if neither the importance nor the ranking runs the model.
        statistics: statistics of the batches, for importances that use them.
    """

    def __init__(
        self,
        graph: Graph,
        options: PlanOptions,
        importance: Importance,
        batches: CalibrationBatches | None,
        statistics: Statistics | None,
    ) -> None:
        self._graph, self._importance, self.batches = graph, importance, batches
        self._settings = {"norm": options.norm, "seed": options.seed, "statistics": statistics}
        self._cache: dict[str, NDArray[np.float64]] = {}
        self._has_residual_stream = any(group.kind == RESIDUAL_STREAM for group in graph.groups)

    def get(self, group: Group, options: PlanOptions) -> NDArray[np.float64]:
        """Return the importance of each unit, divided by the weight of its kind.

        Raises:
            UsageError: an importance is negative, and the ranking divides it by a cost.
        """
        if group.name not in self._cache:
            self._cache[group.name] = _importance_scores(self._graph, group, self._importance, self._settings)
        scores, weight = self._cache[group.name], options.kind_weights[group.kind]
        if options.ranking == "global" and not options.loadable and self._importance.needs == "labels":
            # In transformers, the scores of the residual stream must stay comparable with those of other units.
            scores = scores if self._has_residual_stream else _relative(scores)
        if options.ranking == "milp":  # the weights divide the measured changes of the outputs
            return scores
        if (options.ranking == "per_cost" or weight != 1) and (scores < 0).any():
            raise UsageError(
                f"The importance {self._importance.name!r} is negative for units of {group.name!r}.",
                'ranking="per_cost" and the weights in `kinds` divide importances. This has no meaning for negative '
                "numbers.",
                "Use neither of them, or an importance that is not negative, such as 'taylor'.",
            )
        return scores / weight


def scores_of(graph: Graph, options: PlanOptions, importance: Importance, data: Any, loss: Any) -> ScoreCache:
    """Return the importances of all groups, which are computed when they are first used."""
    calibration_loss = loss_of(loss)
    batches = batches_for(importance, graph.model, data, loss, for_ranking=options.ranking == "milp")
    statistics = None
    if batches is not None and importance.needs != "weights":
        statistics = Statistics(graph, batches, calibration_loss, options.seed)
    return ScoreCache(graph, options, importance, batches, statistics)


def equal_scores(group: Group, _: PlanOptions) -> NDArray[np.float64]:
    """Return equal importances, for costs that are almost the same for any choice of units, such as the least one."""
    return np.zeros(group.size)


def _relative(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return scores divided by the mean of their magnitudes, so that those of all groups have the same mean.

    Estimates of the change of the loss are smaller for a unit of a wide layer, and do not add up: the loss without most
    units of a layer is far larger than the sum of their estimates. Without the division, a global ranking cuts the
    widest layers down to `min_keep`. On a ResNet of 16 to 128 channels for CIFAR-10 with half of its MACs, "taylor"
    leaves 12 % of the parameters without it, and 36 to 74 % with it; after a short training, the accuracies for two
    seeds are 33 % and 33 % without it, and 46 % and 47 % with it.
    """
    mean = np.abs(scores).mean()
    return scores / mean if mean > 0 else scores


def _importance_scores(
    graph: Graph, group: Group, importance: Importance, settings: dict[str, Any]
) -> NDArray[np.float64]:
    """Return one finite number per unit."""
    with np.errstate(invalid="ignore"):  # NaN and infinity raise an error below
        scores = np.asarray(importance(graph, group, **settings))
    numbers = scores.dtype.kind in "fiu"
    if scores.shape == (group.size,) and numbers and not np.isfinite(scores).all():
        _refuse_not_finite(graph, group)
    if scores.shape != (group.size,) or not numbers or not np.isfinite(scores).all():
        wrong = "" if not numbers or np.isfinite(scores).all() else " with NaN or infinity"
        raise UsageError(
            f"The importance {importance.name!r} returns no usable scores for {group.name!r}.",
            f"Expected {group.size} finite numbers, found {scores.dtype} of shape {scores.shape}{wrong}.",
            _fix(importance),
        )
    return scores.astype(np.float64)


def _fix(importance: Importance) -> str:
    """Return what to check if an importance returns no usable scores."""
    if importance.name.startswith(GIVEN):
        return "Give one finite number for each unit of the group."
    return "Check the weights of this layer." if importance.needs == "weights" else "Check the weights and the data."


def _refuse_not_finite(graph: Graph, group: Group) -> None:
    """Raise a NumericError if a parameter of a group is not finite."""
    for name in dict.fromkeys(name for name, _ in group.footprint if name in graph.parameters):
        if not np.isfinite(graph.values(name)).all():
            raise NumericError(
                f"The parameter {name!r} of {graph.model_name} holds NaN or infinity.",
                "Its units cannot be ranked, and the outputs of the model are not finite.",
                "Give a model with finite weights, such as an earlier checkpoint.",
            )
