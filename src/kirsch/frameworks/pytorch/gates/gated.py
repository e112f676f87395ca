"""A model whose weights are multiplied by gates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call

from kirsch.errors import UsageError
from kirsch.frameworks.pytorch.inference.predict import device_of
from kirsch.frameworks.pytorch.modules.copying import copy_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.frameworks.gates import Gating


class GatedModel(nn.Module):
    """A model whose weights are multiplied by gates in each forward pass.

    In training mode, the gates are random, and drawn again in each forward pass.

    Args:
        model: the model.
        gating: the function from the trainable values to the factors of the weights.
    """

    step: torch.Tensor

    def __init__(self, model: nn.Module, gating: Gating) -> None:
        super().__init__()
        self.model = model
        self.gating = gating
        self.values = nn.Parameter(torch.zeros(gating.size, device=device_of(model)))  # one axis: no weight decay
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device_of(model)))

    def forward(self, *args: Any, **options: Any) -> Any:
        """Return the outputs of the model with gates."""
        weights: dict[str, torch.Tensor] = dict(self.model.named_parameters())
        if not self.gating.train_weights:
            weights = {name: value.detach() for name, value in weights.items()}
        products = {name: weights[name] * factor.to(weights[name].dtype) for name, factor in self.factors().items()}
        return functional_call(self.model, weights | products, args, options)

    def factors(self) -> dict[str, torch.Tensor]:
        """Return the factors of the weights by path; in training mode, this is a step of the lowering of the budget."""
        uniform = step = None
        if self.training:
            edge = torch.finfo(self.values.dtype).eps
            uniform = torch.rand_like(self.values).clamp(edge, 1 - edge)
            step = self.step.clone()
            self.step += 1
        gates = self.gating.gates(self.values, self, uniform, step)
        return dict(self.gating.factors(gates, self))


def gated(model: nn.Module, gating: Gating) -> GatedModel:
    """Return a copy of a model with gates, in inference mode; the model itself does not change."""
    return GatedModel(copy_of(model), gating).eval()


def gate_values(model: nn.Module) -> NDArray[Any]:
    """Return the locations of the gates without shift: the trainable numbers times the speed.

    Raises:
        UsageError: the model has no gates.
    """
    found = _require_gates(model)
    return found.gating.speed * found.values.detach().double().cpu().numpy()


def without_gates(model: nn.Module) -> nn.Module:
    """Return a copy of the model without gates: the weights are multiplied by the gates that are used after training.

    Raises:
        UsageError: the model has no gates.
    """
    found = _require_gates(model)
    folded = copy_of(found.model)
    training = found.training
    parameters = dict(folded.named_parameters())
    with torch.no_grad():
        for name, factor in found.eval().factors().items():
            parameters[name].mul_(factor.to(parameters[name].dtype))
    found.train(training)
    return folded


def _require_gates(model: nn.Module) -> GatedModel:
    if not isinstance(model, GatedModel):
        raise UsageError(
            f"A {type(model).__name__} has no gates.",
            fix="Give the trained result of kirsch.with_gates, such as kirsch.fit(kirsch.with_gates(...), data).model.",
        )
    return model
