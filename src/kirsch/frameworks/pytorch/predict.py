"""Outputs of a model in inference mode."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from kirsch.errors import DataError
from kirsch.frameworks.pytorch.outputs import named

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """The model in inference mode; each module gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def run(model: nn.Module, args: Any, options: Any) -> list[torch.Tensor]:
    """All tensors that a model puts out in its present mode, without gradient; it may write into its inputs."""
    args, options = tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, (args, options))
    with torch.no_grad():
        return list(named(model(*args, **options)).values())


def logits_of(outputs: Any) -> Any:
    """The scores among what a classifier puts out: a tensor, `.logits`, `["logits"]`, or the first of a tuple."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if hasattr(outputs, "logits"):
        return outputs.logits
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]


def infer(model: nn.Module, inputs: Any) -> torch.Tensor:
    """Scores of one batch, without gradient, from a model that is in inference mode already; it moves to the inputs."""
    if isinstance(inputs, torch.Tensor):
        model.to(inputs.device)
    with torch.no_grad():
        scores: torch.Tensor = logits_of(model(inputs))
    return scores


def predict(model: nn.Module, inputs: Any, *, batch_size: int = 256) -> NDArray[Any]:
    """Scores of a classifier in inference mode.

    Args:
        model: any mode; it keeps it.
        inputs: numpy array or tensor of shape (N, ...).
        batch_size: samples at a time.

    Returns:
        Floating array of shape (N, K).

    Raises:
        DataError: there are no samples.
    """
    if not len(inputs):
        raise DataError("There is nothing to predict: the inputs have no samples.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    out = []
    with inference(model):
        for start in range(0, len(inputs), batch_size):
            part = inputs[start : start + batch_size]
            batch = torch.from_numpy(np.ascontiguousarray(part)) if isinstance(part, np.ndarray) else part
            out.append(infer(model, batch.to(device)).float().cpu().numpy())
    return np.concatenate(out)


def outputs(model: nn.Module, inputs: Any) -> list[NDArray[Any]]:
    """All tensors that a model puts out in inference mode for one batch: a tuple or a dict of arrays."""
    args, options = arguments(inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with inference(model), torch.no_grad():
        found = model(
            *(torch.from_numpy(value).to(device) for value in args),
            **{name: torch.from_numpy(value).to(device) for name, value in options.items()},
        )
    return [value.cpu().numpy() for value in named(found).values()]
