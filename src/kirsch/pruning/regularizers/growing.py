"""Growing regularization of the units that a plan removes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.annotations import AtLeastZero, Count, Positive
from kirsch.arguments import checked
from kirsch.errors import UsageError
from kirsch.graph.graph import Graph
from kirsch.graph.plan import Plan
from kirsch.pruning.traced_parameters import PlacedArrays, TracedParameters

if TYPE_CHECKING:
    from numpy.typing import NDArray


class GrowingRegularization:
    """strength(epoch) / 2 · Σ w² over the parameters that a plan removes.

    The strength grows in equal steps from strength / increments to `strength`, and then stays. The units go to zero
    gradually, while the kept units learn to do without them, so that little is lost when the plan is applied.

    Apply it to the model that was traced or to a copy of it, as the argument `regularizers` of `kirsch.fit` does; in a
    loop of your own, pass the time as `epoch`.

    Args:
        graph: graph of the plan.
        plan: result of `kirsch.plan`, without blocks.
        strength: largest strength, >= 0. As with weight decay, a step multiplies the weights by
            1 − learning rate · strength.
        epochs: time in which the strength grows, in epochs, > 0; the training should last longer than that.
        increments: number of steps of the growth, >= 1.

    Raises:
        PlanError: the plan is for another model.
        UsageError: the plan removes blocks.

    Source: Wang et al. 2021, arXiv:2012.09243, section 3.1 (GReg-1). The time is measured in epochs instead of
        iterations, so that the strength does not depend on the batch size, and follows from the epoch when a run is
        resumed.
    """

    @checked
    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        *,
        strength: AtLeastZero = 1.0,
        epochs: Positive,
        increments: Count = 100,
    ) -> None:
        plan.check(graph)
        if plan.blocks:
            raise UsageError(
                f"The plan removes the block {plan.blocks[0].name!r}.",
                "GrowingRegularization applies to units of layers.",
                "Give a plan of units, without kinds='block'.",
            )
        self.strength, self.epochs, self.increments = strength, epochs, increments
        masks = _removed_parameters(graph, plan.keep(graph))
        self._parameters = TracedParameters(graph, masks, type(self).__name__)
        self._placed = PlacedArrays(**masks)

    def __call__(self, model: Any, *, epoch: float = 0.0) -> Any:
        """Return the term, a scalar with gradient.

        Args:
            model: the model.
            epoch: number of completed epochs, with the completed fraction of the current one.

        Raises:
            UsageError: the model lacks parameters of the traced model.
        """
        arrays = {name: ops.upcast(value) for name, value in self._parameters(model).items()}
        masks = self._placed.beside(next(iter(arrays.values())), model)
        return 0.5 * self.strength_at(epoch) * sum(ops.sum(v * v * masks[name]) for name, v in arrays.items())

    def strength_at(self, epoch: float) -> float:
        """Return the strength after a number of epochs."""
        steps = math.floor(epoch / self.epochs * self.increments) + 1
        return self.strength * min(steps / self.increments, 1.0)


def _removed_parameters(graph: Graph, keep: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """Return masks that are True for the removed entries of each parameter that loses some.

    Axes that lose nothing have length 1 in a mask.
    """
    masks = {}
    for name in graph.parameters:
        axes = graph.tensors[name].axes
        kept = [graph.kept(labels, keep) for labels in axes]
        if any(mask is not None for mask in kept):
            removed = np.zeros((1,) * len(axes), bool)
            for axis, mask in enumerate(kept):
                if mask is not None:
                    removed = removed | ~mask.reshape([-1 if other == axis else 1 for other in range(len(axes))])
            masks[name] = removed
    return masks
