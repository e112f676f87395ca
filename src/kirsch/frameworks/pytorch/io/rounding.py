"""Simulate random rounding errors in the operations of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch has no annotations here
    """Multiply the inputs of each operation by 1 + u·eps, with u uniform in [-1, 1] and eps the machine epsilon.

    Other runtimes sum in another order and have errors of about this size. If the outputs change much more, as after
    the normalization of a constant, no two runtimes agree on the outputs of the model.

    Args:
        seed: seed of the random numbers.

    Source: Monte Carlo arithmetic, Parker 1997, UCLA CSD-970002.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        options, schema = kwargs or {}, func._schema  # noqa: SLF001 - has no public name
        # In-place operations and views need the original tensor.
        if not (schema.is_mutable or any(value.alias_info is not None for value in schema.returns)):
            args, options = tree_map(self._perturbed, (args, options))
        return func(*args, **options)

    def _perturbed(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        uniform = torch.rand(value.shape, generator=self._generator, dtype=torch.float64) * 2 - 1
        factor = 1 + uniform.to(value.device) * torch.finfo(value.dtype).eps
        return (value * factor).to(value.dtype)
