"""Noise for parameters and inputs: zeros and equal values would hide a wrong cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers by path; a tied tensor has several paths."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


POOL = 131_071
"""Number of random numbers from which the noise of all tensors is taken.

Noise is computed each time that an operation reads a tensor, so it must be cheap: it is a part of this pool, repeated
for larger tensors. The number is prime, so that the rows of a matrix have different noise. The pool fits into the cache
of a processor core.
"""


PART = 1 << 15
"""Number of entries whose noise is computed at a time."""


SAMPLE = 1 << 16
"""Number of entries of a large tensor from which its mean absolute value is estimated."""


LARGE = 1 << 18
"""Number of entries from which a tensor has noise only if it needs it, because noise takes time."""

SLICE = 32
"""Number of entries of each slice of a large tensor by which slices are compared."""

SMALL = 1e-3
"""Mean absolute value below which a large tensor has noise, so that its entries have an effect on the outputs."""


NUMPY_DTYPES = frozenset([torch.float16, torch.float32, torch.float64])


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a new tensor without values.

    On the CPU, numpy allocates the memory, because it asks the system for large pages: most of the time to write a new
    large tensor is the time to map its pages. It has no bfloat16.
    """
    if torch.device(device).type != "cpu" or dtype not in NUMPY_DTYPES:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype))


def with_noise(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor and its noise, in float32, or in float64 for a tensor in float64.

    Kept entries of a pruned tensor and of its original thus have equal sums.
    """
    return value.detach() + noise.to(value.device)


class Noise(Mapping[int, torch.Tensor]):
    """Noise for each floating tensor of a model, by the tensor's id, computed at each access.

    The standard deviation is 0.1. For tensors of two or more axes, it is 0.1 times their mean absolute value, and at
    least 0.001. The noise has the sign of the value, because variances and arguments of logarithms must stay positive.
    Infinite values, as in attention masks, stay infinite. Large tensors that are not small and in which no two slices
    along an axis are equal have no noise, because a wrong index changes the outputs without it. With another factor
    than 1, they have noise, too.

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

    def changes(self, key: int) -> bool:
        """Return whether a tensor has noise; the noise of any other is zero."""
        return self._tensors[key][3] > 0

    def _deviation(self, value: torch.Tensor) -> float:
        if value.dim() <= 1 or not value.numel():
            return 0.1
        # The odd step visits all columns of a matrix with an even number of columns.
        entries = value.detach().reshape(-1)[:: value.numel() // SAMPLE | 1]
        size = float(entries.float().nan_to_num(posinf=0.0, neginf=0.0).abs().mean())
        if self._factor == 1 and value.numel() >= LARGE and size >= SMALL and _slices_differ(value.detach()):
            return 0.0
        return 0.1 * max(size, 1e-2)

    def __getitem__(self, key: int) -> torch.Tensor:
        """Return the noise of a tensor, float32 on the CPU."""
        with _disable_current_modes():
            noise = empty(self._tensors[key][1].shape, torch.float32)
            for part, values in self._parts(key):
                noise.view(-1)[part] = values
        return noise

    def added(self, key: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a new contiguous tensor in a dtype: the tensor with its noise, see `with_noise`."""
        with _disable_current_modes():
            value = self._tensors[key][1]
            result = empty(value.shape, dtype, value.device)
            if not self.changes(key):
                return result.copy_(value.detach())
            for part, noise in self._parts(key):
                result.view(-1)[part] = with_noise(value.reshape(-1)[part], noise)
        return result

    def _parts(self, key: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield slices of a flattened tensor and their noise, which takes less time than the noise of all entries."""
        name, value, offset, deviation = self._tensors[key]
        values = value.detach().reshape(-1)
        for start in range(0, len(values), PART):
            part = slice(start, min(start + PART, len(values)))
            first = (offset + start) % POOL
            noise = self._pool[first : first + part.stop - start] * (self._factor * deviation)
            if name.endswith("running_var"):
                noise.abs_()
            elif self._factor == 1:  # positive noise on zero biases activates units
                noise.copysign_(values[part].to("cpu"))
            yield part, noise

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[int]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _slices_differ(value: torch.Tensor) -> bool:
    """Return whether no two slices of a tensor along one of its axes are equal.

    Only `SLICE` entries in the middle of each slice are compared; if they are equal, the slices are taken as equal.
    """
    for axis in range(value.dim()):
        sample, left = value.movedim(axis, 0), SLICE
        for other in range(value.dim() - 1, 0, -1):
            length = min(sample.shape[other], left)
            sample, left = sample.narrow(other, (sample.shape[other] - length) // 2, length), max(left // length, 1)
        entries = sample.reshape(len(sample), -1).double()
        factors = torch.randn(entries.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        sums = (entries * factors.to(entries.device)).sum(1).cpu().numpy()
        if len(np.unique(sums)) < len(sums) or not np.isfinite(sums).all():
            return False
    return True


class ConvertedTensors(Mapping[str, torch.Tensor]):
    """Parameters and buffers of a model by path, in a dtype and with noise; each access returns a new tensor.

    So only the tensors that an operation reads exist in this dtype, and the reader may change them.

    Args:
        model: the model.
        noise: the noise of its tensors; None for no noise.
        dtype: dtype of the floating-point tensors.
        read_only: the reader changes no tensor, so that those without noise that have this dtype are not copied.
    """

    def __init__(self, model: nn.Module, noise: Noise | None, dtype: torch.dtype, *, read_only: bool = False) -> None:
        self._tensors, self._noise, self._dtype = named_tensors(model), noise, dtype
        self._read_only = read_only

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._tensors[name]
        has_noise = self._noise is not None and id(value) in self._noise and self._noise.changes(id(value))
        if self._read_only and not has_noise and value.dtype is self._dtype:
            return value.detach()
        if self._noise is not None and id(value) in self._noise:
            return self._noise.added(id(value), self._dtype)
        with _disable_current_modes():
            return value.detach().to(self._dtype if value.is_floating_point() else value.dtype, copy=True)

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
