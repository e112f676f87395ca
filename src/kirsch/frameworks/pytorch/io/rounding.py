"""How far rounding alone moves the outputs of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch annotates neither
    """Each operation gets inputs that are off by a random part of the precision of their type.

    Another runtime adds in another order, so that its results are off by about as much. Where the outputs move far,
    as after a normalization of what is constant, no two runtimes agree, and neither does the model with itself in
    float64. (Monte Carlo arithmetic: Parker 1997, UCLA CSD-970002.)

    Args:
        seed: of the random numbers.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        options, schema = kwargs or {}, func._schema  # noqa: SLF001 - has no public name
        # What is written into, or shares memory with its result, must stay the same tensor.
        if not (schema.is_mutable or any(value.alias_info is not None for value in schema.returns)):
            args, options = tree_map(self._moved, (args, options))
        return func(*args, **options)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        apart = torch.rand(value.shape, generator=self._generator, dtype=torch.float64) * 2 - 1
        factor = 1 + apart.to(value.device) * torch.finfo(value.dtype).eps
        return (value * factor).to(value.dtype)
