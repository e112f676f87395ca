"""Noise for parameters and inputs: zeros and equal values would hide a wrong cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers by path; a tied tensor has several paths."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def noise_of(model: nn.Module, factor: float = 1.0, seed: int = 0) -> dict[int, torch.Tensor]:
    """Return noise for each floating tensor, by its id.

    The standard deviation is 0.1. For tensors of two or more axes, it is 0.1 times their mean absolute value, and at
    least 0.001. The noise has the sign of the value, because variances and arguments of logarithms must stay positive.
    Infinite values, as in attention masks, stay infinite.

    Args:
        model: model with the parameters and buffers.
        factor: factor of the noise. With another factor than 1, only running variances keep their signs, and the
            noise can activate any unit. The noise for -factor has the opposite sign.
        seed: seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    noise_by_id: dict[int, torch.Tensor] = {}
    for name, value in named_tensors(model).items():
        if not value.is_floating_point() or id(value) in noise_by_id:
            continue
        plain = value.detach().to("cpu", torch.float32)
        noise = torch.randn(value.shape, generator=generator)
        size = float(plain.nan_to_num(posinf=0.0, neginf=0.0).abs().mean()) if value.numel() else 0.0
        noise *= factor * (0.1 * max(size, 1e-2) if value.dim() > 1 else 0.1)
        if name.endswith("running_var"):
            noise.abs_()
        elif factor == 1:
            noise = noise.abs() * torch.where(plain < 0, -1, 1)  # positive noise on zero biases activates units
        noise_by_id[id(value)] = noise
    return noise_by_id


def without_constant(value: Any) -> Any:
    """Return an input, with noise added if all its entries are equal: all-zero inputs would hide a wrong cut."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return value
    if bool((value != value.flatten()[0]).any()):
        return value
    noise = 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).abs()
    return value + noise.to(value.device, value.dtype) * torch.where(value < 0, -1, 1)
