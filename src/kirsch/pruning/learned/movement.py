"""Movement of the weights of each unit during fine-tuning, as an importance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.arguments import checked
from kirsch.data.arrays import host
from kirsch.errors import NumericError, UsageError
from kirsch.graph.graph import Graph
from kirsch.pruning.importance.gates import gating_entries
from kirsch.pruning.traced_parameters import TracedParameters
from kirsch.pruning.unit_sums import UnitSums

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Movement:
    """Scores of units that are accumulated during fine-tuning: minus the sum over the steps of w · ∂L/∂w.

    The products are added over the weights that read the unit, so that the score is the sum over the steps of minus the
    derivative of the loss for a gate of the unit, as in the importance "taylor". It is negative if the steps shrink the
    weights, and positive if they move them away from zero: what fine-tuning makes smaller is removed. The lookups of an
    embedding table that is tied to the last layer count, too.

    Call the object between the backward pass and the step of the optimizer, with the model in training: a copy of the
    traced model, which may be wrapped. In `kirsch.fit` and `kirsch.distill`, give
    `hooks=kirsch.TrainingHooks(before_step=movement)`. The scores are not a part of the training state. A step with an
    infinite or NaN gradient, which mixed precision skips, does not count.

    Args:
        graph: result of `kirsch.trace`.

    Attributes:
        steps: number of calls.

    Source: Sanh et al. 2020, arXiv:2005.07683, equation 6, with the sum over structures of Lagunas et al. 2021,
        arXiv:2109.04838, section 3. There, the scores are learned while masks remove weights; here, no weight is
        removed before `kirsch.plan`. With gradients that are averaged over processes, all processes have the same
        scores.
    """

    @checked
    def __init__(self, graph: Graph) -> None:
        entries = {group: gating_entries(graph, group) for group in graph.groups}
        self._sums = UnitSums(graph, {g: {(e.name, e.axis): e.factor for e in found} for g, found in entries.items()})
        self._parameters = TracedParameters(graph, (name for name, _ in self._sums.axes), type(self).__name__)
        self._total: Any = None
        self.steps = 0

    def __call__(self, model: Any) -> None:
        """Add the products of the current weights and gradients.

        Raises:
            UsageError: the model is not a copy of the traced model, or it has no gradients.
        """
        parameters, gradients = self._parameters(model), self._parameters.gradients(model)
        if not gradients:
            raise UsageError(
                f"The {type(model).__name__} has no gradients.",
                "Movement reads the gradients of a step.",
                "Call it after loss.backward() and before optimizer.step().",
            )
        products = {}
        for name, parameter in parameters.items():
            weights = ops.upcast(ops.stop_gradient(parameter))
            products[name] = -weights * ops.upcast(gradients[name]) if name in gradients else ops.zeros_like(weights)
        step = self._sums(model, products)
        step = ops.cast(step, ops.widest_float(step))
        step = ops.where(ops.all(ops.isfinite(step)), step, ops.zeros_like(step))
        self._total = step if self._total is None else self._total + step
        self.steps += 1

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Return the scores of the units by group, for the argument `importance` of `kirsch.plan`.

        Raises:
            UsageError: there were no steps.
            NumericError: all scores are 0, for example because the weights of the units are frozen.
        """
        if self._total is None:
            raise UsageError(
                "Movement has no steps.",
                "Its scores are sums over the steps of a training.",
                "Train with hooks=kirsch.TrainingHooks(before_step=movement), or call it before each optimizer.step().",
            )
        total = host(self._total).astype(np.float64)
        if not total.any():
            raise NumericError(
                f"All scores of movement are 0 after {self.steps} steps.",
                "The weights that read the units have no finite gradients.",
                "Check that these weights are trained, and that the losses are finite.",
            )
        return self._sums.by_group(total)
