"""Running statistics of batch normalization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kirsch.frameworks.pytorch.inference.predict import arguments_of, call_model, copied, inference, tensors
from kirsch.frameworks.pytorch.modules.modes import set_modes

if TYPE_CHECKING:
    from collections.abc import Iterable


def batch_norms(model: nn.Module) -> list[str]:
    """Return the paths of the batch normalizations with running statistics."""
    return [path for path, module in model.named_modules() if _has_statistics(module)]


def estimate_batch_norms(model: nn.Module, batches: Iterable[tuple[int, Any]]) -> None:
    """Replace the running statistics of batch normalization by those of calibration data, in place.

    Each batch normalization uses the statistics of the batch, so that all layers are estimated in one pass; the other
    modules run in inference mode. The result is the mean of the statistics of the batches, weighted by their sizes.
    Modes, momenta and the counts of batches are restored.

    Args:
        model: the model.
        batches: size and inputs of each batch.
    """
    modules = [module for module in model.modules() if isinstance(module, _BatchNorm) and _has_statistics(module)]
    before = [(module, module.momentum, _count(module)) for module in modules]
    samples = 0
    try:
        with inference(model), torch.no_grad():
            set_modes((module, True) for module in modules)
            for size, inputs in batches:
                samples += size
                for module in modules:
                    module.momentum = size / samples  # 1 for the first batch: the old statistics do not count
                call_model(model, *arguments_of(model, copied(tensors(inputs, model))))
    finally:
        for module, momentum, count in before:
            module.momentum = momentum
            if count is not None and module.num_batches_tracked is not None:
                module.num_batches_tracked.copy_(count)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None


def _count(module: _BatchNorm) -> torch.Tensor | None:
    return None if module.num_batches_tracked is None else module.num_batches_tracked.clone()
