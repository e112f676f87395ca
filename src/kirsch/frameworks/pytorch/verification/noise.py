"""Noise for parameters and inputs: zeros and equal values would hide a wrong cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from kirsch.frameworks.pytorch.verification.dtypes import cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers by path; a tied tensor has several paths."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


POOL = 1_048_583
"""Number of random numbers from which the noise of all tensors is taken.

Noise is computed each time that an operation reads a tensor, so it must be cheap: it is a part of this pool, repeated
for larger tensors. The number is prime, so that the rows of a matrix have different noise.
"""


PART = 1 << 15
"""Number of entries whose noise is computed at a time."""


SMALL = 1 << 14
"""Largest number of entries of a tensor that is stored after it has been computed."""


class Noise(Mapping[int, torch.Tensor]):
    """Noise for each floating tensor of a model, by the tensor's id, computed at each access.

    The standard deviation is 0.1. For tensors of two or more axes, it is 0.1 times their mean absolute value, and at
    least 0.001. The noise has the sign of the value, because variances and arguments of logarithms must stay positive.
    Infinite values, as in attention masks, stay infinite.

    Args:
        model: model with the parameters and buffers.
        factor: factor of the noise. With another factor than 1, only running variances keep their signs, and the
            noise can activate any unit. The noise for -factor has the opposite sign.
        seed: seed of the noise.
    """

    def __init__(self, model: nn.Module, factor: float = 1.0, seed: int = 0) -> None:
        self._factor = factor
        self._pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed)).repeat(2)
        self._tensors: dict[int, tuple[str, torch.Tensor, int, float]] = {}
        offset = 0
        for name, value in named_tensors(model).items():
            if value.is_floating_point() and id(value) not in self._tensors:
                self._tensors[id(value)] = name, value, offset, self._deviation(value)
                offset = (offset + value.numel()) % POOL

    def _deviation(self, value: torch.Tensor) -> float:
        if value.dim() <= 1 or not value.numel():
            return 0.1
        values = value.detach().float()
        size = float(values.abs().mean())
        if not math.isfinite(size):
            size = float(values.nan_to_num(posinf=0.0, neginf=0.0).abs().mean())
        return 0.1 * max(size, 1e-2)

    def __getitem__(self, key: int) -> torch.Tensor:
        """Return the noise of a tensor, float32 on the CPU."""
        value = self._tensors[key][1]
        with _disable_current_modes():
            return self.add_to(torch.zeros(value.shape), key)

    def add_to(self, target: torch.Tensor, key: int) -> torch.Tensor:
        """Add the noise of a tensor in place to a contiguous tensor of the same shape, and return it.

        Parts of the noise are added one after another, because memory for all of it would take longer to allocate than
        the noise to compute.
        """
        name, value, offset, deviation = self._tensors[key]
        flat, values = target.view(-1), value.detach().reshape(-1)
        for start in range(0, len(flat), PART):
            part = slice(start, min(start + PART, len(flat)))
            first = (offset + start) % POOL
            noise = self._pool[first : first + part.stop - start] * (self._factor * deviation)
            if name.endswith("running_var"):
                noise.abs_()
            elif self._factor == 1:  # positive noise on zero biases activates units
                noise.copysign_(values[part].to("cpu"))
            flat[part].add_(noise.to(target.device))
        return target

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[int]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class ConvertedTensors(Mapping[str, torch.Tensor]):
    """Parameters and buffers of a model by path, in a dtype and with noise, computed at each access.

    So only the tensors that an operation reads exist in this dtype.

    Args:
        model: the model.
        noise: the noise of its tensors; None for no noise.
        dtype: dtype of the floating-point tensors.
    """

    def __init__(self, model: nn.Module, noise: Noise | None, dtype: torch.dtype) -> None:
        self._tensors, self._noise, self._dtype = named_tensors(model), noise, dtype
        self._small: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._small:
            value = self._converted(self._tensors[name])
            if value.numel() > SMALL:
                return value
            self._small[name] = value
        return self._small[name]

    def _converted(self, value: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            if self._noise is None or id(value) not in self._noise:
                converted: torch.Tensor = cast(value, self._dtype)
                return converted
            copy = value.detach().to(self._dtype, copy=True, memory_format=torch.contiguous_format)
            return self._noise.add_to(copy, id(value))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def seeded(forward: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the outputs of a run from a fixed seed, so that equal models draw equal random numbers."""
    torch.manual_seed(0)
    return forward()


def without_constant(value: Any) -> Any:
    """Return an input, with noise added if all its entries are equal: all-zero inputs would hide a wrong cut."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return value
    if bool((value != value.flatten()[0]).any()):
        return value
    noise = 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).abs()
    return value + noise.to(value.device, value.dtype) * torch.where(value < 0, -1, 1)
