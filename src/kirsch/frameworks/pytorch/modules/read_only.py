"""Copies of models that share the memory of the parameters, and runs that must not change it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kirsch.frameworks.pytorch.modules.copying import copy_of

if TYPE_CHECKING:
    from collections.abc import Iterable


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters are new objects with the memory of those of the model."""
    shared = {id(value): nn.Parameter(value.detach(), value.requires_grad) for value in model.parameters()}
    return copy_of(model, shared)


class ChangeInPlaceError(RuntimeError):
    """An operation would change a tensor that is read-only."""


class ReadOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch has no annotations here
    """Raise a ChangeInPlaceError before an operation that would change the memory of some tensors.

    Args:
        tensors: tensors that are only read, such as parameters that two models share.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()} - {0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        options = kwargs or {}
        if func._schema.is_mutable:  # noqa: SLF001 - has no public name
            parameters = func._schema.arguments  # noqa: SLF001
            values = [
                *zip(parameters, args, strict=False),
                *((p, options.get(p.name)) for p in parameters[len(args) :]),
            ]
            for parameter, value in values:
                writes = parameter.alias_info is not None and parameter.alias_info.is_write
                if writes and any(map(self._is_read_only, tree_leaves(value))):
                    raise ChangeInPlaceError(f"{func} changes a parameter in place.")
        return func(*args, **options)

    def _is_read_only(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self._memory
