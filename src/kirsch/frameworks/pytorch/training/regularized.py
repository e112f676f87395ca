"""Parameters and gradients that regularizers and learned pruning use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kirsch.frameworks.pytorch.features.student import StudentWithAdapters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
COMPILED = "_orig_mod"
"""Name under which the result of `torch.compile` holds the module."""


def batch_norm_scales(model: nn.Module) -> Iterator[Tensor]:
    """Return the scale of each batch normalization, as tensors with gradients."""
    norms = torch.nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - the common base has no public name
    return (m.weight for m in model.modules() if isinstance(m, norms) and m.weight is not None)


def weight_arrays(model: nn.Module) -> Iterator[Tensor]:
    """Return the weights with two or more axes, as tensors with gradients."""
    return (p for p in model.parameters() if p.dim() > 1)


def parameters_by_path(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the innermost model by path; tied parameters once.

    DDP, `torch.compile` (of the model or of a submodule) and adapters of a distillation do not change the paths.
    """
    named = _innermost(model).named_parameters()
    return {".".join(part for part in name.split(".") if part != COMPILED): value for name, value in named}


def gradients_by_path(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that a backward pass left, by path; parameters without a gradient are left out."""
    named = parameters_by_path(model).items()
    return {name: value.grad.detach() for name, value in named if value.grad is not None}


def _innermost(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers."""
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif COMPILED in model._modules:  # noqa: SLF001 - the class of compiled modules has no public name
            model = model.get_submodule(COMPILED)
        elif isinstance(model, StudentWithAdapters):
            model = model.student
        else:
            return model
