"""Gradients of the features and losses of a PyTorch model, for its parameters and for its outputs."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import UsageError
from kirsch.frameworks.pytorch.features.capture import FeatureCapture
from kirsch.frameworks.pytorch.inference.predict import inference, tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn


def mean_gradients(model: nn.Module, layers: Sequence[str], inputs: Any) -> dict[str, float]:
    """Return the norm of the gradient of the mean of each feature for the trainable parameters; 0 without gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _differentiable_run(model, layers, inputs) as values:
        return {layer: norm_of(_gradients(model, values[layer], parameters)) for layer in layers}


def norm_of(gradients: Sequence[torch.Tensor]) -> float:
    """Return the norm of several gradients as one vector."""
    return math.sqrt(sum(float((gradient.detach().float() ** 2).sum()) for gradient in gradients))


def sources_of(model: nn.Module, layers: Sequence[str], candidates: Sequence[str], inputs: Any) -> list[str]:
    """Return the candidates from whose tensors the model computes one of the layers, so that gradients reach them."""
    with _differentiable_run(model, [*layers, *candidates], inputs) as values:
        return [
            name
            for name in candidates
            if values[name].requires_grad and any(_gradients(model, values[layer], [values[name]]) for layer in layers)
        ]


def _gradients(model: nn.Module, value: torch.Tensor, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of the mean of a value for those of the sources that it depends on."""
    if not (value.requires_grad and sources):
        return []
    return [part for part in gradients_of(model, value.float().mean(), sources) if part is not None]


@contextlib.contextmanager
def _differentiable_run(model: nn.Module, layers: Sequence[str], inputs: Any) -> Iterator[dict[str, Any]]:
    """Yield the features of layers for one batch in inference mode, with gradient; the model is not changed."""
    capture = FeatureCapture(model, layers)
    # The recurrent layers of cuDNN have no gradient in inference mode.
    with contextlib.closing(capture), inference(model), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        yield capture(tensors(inputs, model))


def gradients_of(
    model: nn.Module, value: torch.Tensor, sources: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradient of a scalar that a model computed for each source; None if it does not depend on the source.

    The graph is retained.

    Raises:
        UsageError: the model uses reentrant activation checkpoints, which do not support the gradient of one value.
    """
    try:
        return torch.autograd.grad(value, sources, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise UsageError(
            f"{type(model).__name__} uses activation checkpoints with use_reentrant=True.",
            "They do not support the gradient of a single loss term or output.",
            "Set use_reentrant=False; in models of the transformers library by "
            'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).',
        ) from error
