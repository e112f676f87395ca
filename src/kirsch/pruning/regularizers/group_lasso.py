"""Group lasso over coupled units."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np

from kirsch import ops
from kirsch.annotations import AtLeastZero, Between, Names
from kirsch.arguments import checked
from kirsch.errors import UsageError
from kirsch.graph.graph import Graph
from kirsch.pruning.options import Kinds, PlanOptions
from kirsch.pruning.selection import removable_groups
from kirsch.pruning.traced_parameters import PlacedArrays, TracedParameters
from kirsch.pruning.unit_sums import UnitSums


class GroupLasso:
    """strength · Σ γ · √p · ‖w‖₂ over the units of a traced model; w are the p parameters of a unit in all its layers.

    The parameters of a unit are its slices of all parameters that are removed with it: weights that produce or read the
    unit, biases and scales. The whole unit is driven to zero, and its removal then changes little. Because of √p, a
    strength acts on each parameter as with `L1`, whatever the number of parameters of a unit.

    The factor γ of a unit is 1 for the unit with the largest norm in its group, and 2^alpha for that with the smallest:
    γ = 2^(alpha · (max − ‖w‖) / (max − min)); it is 1 if all norms are equal. No gradient flows through γ.

    Apply it to the model that was traced or to a copy of it, as the argument `regularizers` of `kirsch.fit` does.

    Args:
        graph: result of `kirsch.trace`.
        strength: >= 0; 1e-4 to 1e-3 is usual.
        alpha: 0 to 16; 0 is the plain group lasso.
        kinds, exclude, keep_outputs: units that are not penalized, as in `kirsch.plan`.

    Raises:
        UsageError: no unit of the model can be removed with these options.

    Source: Yuan, Lin 2006, "Model selection and estimation in regression with grouped variables", equation 2.1, for the
        norm and √p; Wen et al. 2016, arXiv:1608.03665, for channels; Fang et al. 2023, arXiv:2301.12900, section 3.3,
        for coupled layers and γ, there with the squared norm.
    """

    @checked
    def __init__(
        self,
        graph: Graph,
        strength: AtLeastZero,
        *,
        alpha: Annotated[float, Between(0, 16)] = 4.0,
        kinds: Kinds = None,
        exclude: Names = (),
        keep_outputs: Names = (),
    ) -> None:
        options = PlanOptions(kinds=kinds, exclude=exclude, keep_outputs=keep_outputs)
        groups = removable_groups(graph, options)
        if not groups:
            raise UsageError(
                f"No unit of {graph.model_name} can be removed with these `kinds`, `exclude` and `keep_outputs`.",
                "The group lasso has nothing to penalize.",
                "Print the graph, print(kirsch.trace(...)), for the reasons, or exclude fewer layers.",
            )
        self.strength, self.alpha = strength, alpha
        parameters = set(graph.parameters)
        self._sums = UnitSums(graph, {g: {key: 1.0 for key in g.footprint if key[0] in parameters} for g in groups})
        self._parameters = TracedParameters(graph, (name for name, _ in self._sums.axes), type(self).__name__)
        sizes = [group.size for group in groups]
        self._placed = PlacedArrays(
            root=np.sqrt(self._sums.counts).astype(np.float32), group=np.repeat(np.arange(len(groups)), sizes)
        )
        self._groups = len(groups)

    def __call__(self, model: Any) -> Any:
        """Return the term, a scalar with gradient. The gradient of a unit whose parameters are all 0 is 0.

        Raises:
            UsageError: the model lacks parameters of the traced model.
        """
        arrays = {name: ops.upcast(value) for name, value in self._parameters(model).items()}
        norms = ops.safe_sqrt(self._sums(model, {name: value * value for name, value in arrays.items()}))
        placed = self._placed.beside(norms, model)
        return self.strength * ops.sum(
            norms * placed["root"] * self._factors(ops.stop_gradient(norms), placed["group"])
        )

    def _factors(self, norms: Any, group: Any) -> Any:
        """Return γ of each unit, shape (units,)."""
        largest = ops.take_along_axis(ops.segment_max(norms, group, self._groups), group)
        smallest = -ops.take_along_axis(ops.segment_max(-norms, group, self._groups), group)
        span = largest - smallest
        share = (largest - norms) / ops.where(span > 0, span, ops.ones_like(span))  # 0 / 1 where all norms are equal
        return ops.exp(self.alpha * math.log(2) * share)
