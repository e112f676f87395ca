"""Expected cost of a model whose units are kept with given probabilities, and the shift that makes it meet a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.pruning.learned.hard_concrete import open_probability
from kirsch.pruning.learned.unit_slots import products, unit_slots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group

HALVINGS = 26
"""Number of bisections in float32: the shift is then exact up to its rounding."""

SPAN = 25.0
"""Beyond the largest and smallest location plus this number, all gates are open or closed up to 1e-10."""


class ExpectedCost:
    """A cost as a fraction of the original, as a differentiable function of the probabilities that units are kept.

    The numbers of kept indices of the axes of a weight are replaced by their expectations. This is exact if the units
    on the two axes are independent, and if each probability is 0 or 1; it is too low by the variance of the number of
    kept units where one group is on both axes of a weight.

    Args:
        graph: graph of the model.
        groups: groups whose units may be removed; the units of the first group come first.
        quantity: "macs", "parameters" or "size".

    Attributes:
        arrays: numpy arrays that `__call__` needs as arrays of the framework.
    """

    def __init__(self, graph: Graph, groups: Sequence[Group], quantity: str) -> None:
        polynomial = graph.prices.polynomial(quantity)
        sizes = [group.size for group in groups]
        first = np.cumsum([0, *sizes[:-1]]).tolist()
        slots = unit_slots(graph, list(zip(groups, first, strict=True)), sum(sizes))
        components, entry = np.unique(polynomial.components, return_inverse=True)
        original = getattr(graph.cost, quantity)
        self._axes = int(polynomial.array.max(initial=-1)) + 1
        self.arrays = {
            "coefficient": polynomial.coefficient / original,
            "factor": polynomial.factor.T.copy(),
            "slots": slots[:, components],
            "entry": entry.reshape(-1),
            "axis": polynomial.array,
        }

    def __call__(self, probability: Any, arrays: Mapping[str, Any]) -> Any:
        """Return the expected cost as a fraction of the original, a scalar.

        Args:
            probability: probability that each unit is kept, shape (units,).
            arrays: the attribute `arrays`, as arrays of the library and device of `probability`.
        """
        kept = ops.take_along_axis(products(probability, arrays["slots"]), arrays["entry"])
        counts = ops.segment_sum(kept, arrays["axis"], self._axes)
        counts = ops.concatenate([ops.ones_like(probability[:1]), counts])
        cost = ops.cast(arrays["coefficient"], ops.dtype(probability))
        for factor in range(arrays["factor"].shape[0]):
            cost = cost * ops.take_along_axis(counts, arrays["factor"][factor])
        return ops.sum(cost)

    def shift(self, location: Any, target: Any, arrays: Mapping[str, Any], halvings: int = HALVINGS) -> Any:
        """Return the number b for which gates with the locations + b have the expected cost `target`, a scalar.

        The cost increases with b, so that b is found by bisection. Its gradient is that of the implicit function: a
        step along the gradient of a loss of the shifted locations keeps the expected cost, to first order. The loss is
        thereby minimized under the constraint; the multiplier of the Lagrangian is the exact one at each step.

        Args:
            location: log α of the gates, shape (units,), without shift.
            target: expected cost as a fraction of the original, a number or scalar.
            arrays: see `__call__`.
            halvings: number of bisections.
        """

        def cost_at(values: Any, shift: Any) -> Any:
            return self(open_probability(values + shift), arrays)

        fixed = ops.stop_gradient(location)
        low, high = -ops.amax(fixed) - SPAN, -ops.amin(fixed) + SPAN
        for _ in range(halvings):
            middle = 0.5 * (low + high)
            is_above = cost_at(fixed, middle) > target
            low, high = ops.where(is_above, low, middle), ops.where(is_above, middle, high)
        shift, step = 0.5 * (low + high), 0.01
        slope = (cost_at(fixed, shift + step) - cost_at(fixed, shift - step)) / (2 * step)
        excess = cost_at(location, shift)
        # The value of the last term is 0. It has the gradient of the implicit function, -(∂cost/∂location) / slope.
        return shift - (excess - ops.stop_gradient(excess)) / ops.clip(slope, 1e-6)
