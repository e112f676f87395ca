"""Whether what a model puts out comes from a sigmoid or a softmax: found in a run, since values alone may not tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kirsch.frameworks.pytorch.watch import dry_run

if TYPE_CHECKING:
    from torch import nn

SQUASHING = ("sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "_softmax", "_safe_softmax")
"""Operators whose results are from 0 to 1."""

PASSING = ("clone", "_to_copy", "copy_", "cat", "stack", "index", "index_select", "clamp", "clamp_min", "clamp_max")
"""Operators whose results have the values that they are given."""


class _Marks(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch tells no types
    """Remembers in which memory results of squashing operators lie, that of their views included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the same
        self.kept: list[torch.Tensor] = []  # so that its memory is not given to another tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        passed = name in PASSING and any(self.holds(part) for part in tree_leaves(args))
        if isinstance(out, torch.Tensor) and (name in SQUASHING or passed):
            self.kept.append(out)
        return out

    def holds(self, value: Any) -> bool:
        """Whether a tensor lies in the memory of such a result."""
        return isinstance(value, torch.Tensor) and any(_memory(value) == _memory(kept) for kept in self.kept)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def squashed(model: nn.Module, site: str, inputs: Any) -> bool:
    """Whether the value at a site, for one batch, comes out of a sigmoid or a softmax."""
    with _Marks() as marks:
        found = dry_run(model, (site,), inputs)[site]
    return bool(marks.holds(found))
