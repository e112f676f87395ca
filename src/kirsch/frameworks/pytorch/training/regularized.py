"""Parameters that regularizers act on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


def batch_norm_scales(model: nn.Module) -> Iterator[Tensor]:
    """Return the scale of each batch normalization, as tensors with gradients."""
    norms = torch.nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - the common base has no public name
    return (m.weight for m in model.modules() if isinstance(m, norms) and m.weight is not None)


def weight_arrays(model: nn.Module) -> Iterator[Tensor]:
    """Return the weights with two or more axes, as tensors with gradients."""
    return (p for p in model.parameters() if p.dim() > 1)
