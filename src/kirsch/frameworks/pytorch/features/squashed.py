"""Whether the outputs of a model come from a sigmoid or a softmax: found in a run, since values alone may not tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kirsch.frameworks.pytorch.features.capture import dry_run

if TYPE_CHECKING:
    from torch import nn

_SATURATING = "sigmoid hardsigmoid _softmax _safe_softmax softmax tanh hardtanh exp"
SATURATING = frozenset(_SATURATING.split())
"""Operators that map any number into a bounded range, or are a part of writing such an operator by hand.

`clamp` is one where it has both bounds.
"""

_LEARNED = """
mm addmm bmm baddbmm mv addmv addbmm dot linear matmul einsum convolution _convolution conv1d conv2d conv3d
mkldnn_convolution mkldnn_linear embedding _embedding_bag lstm gru rnn_tanh rnn_relu native_layer_norm
native_batch_norm native_group_norm _native_batch_norm_legit_no_training cudnn_batch_norm
"""
LEARNED = frozenset(_LEARNED.split())
"""Operators of layers. What they return is no longer the result of an activation before them."""

LOGARITHM = "log_sigmoid_forward"
_COPIES = "clone _to_copy cat stack clamp clamp_min nan_to_num index index_select flip roll"
COPIES = frozenset(_COPIES.split())
"""Operators that leave a logarithm of a sigmoid what it is; a difference of two of them is a logit."""


class _Marks(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch tells no types
    """Remembers in which memory results lie that come from a saturating operator without a layer between.

    Args:
        logarithm: those of `logsigmoid` instead, and their copies.
    """

    def __init__(self, *, logarithm: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the same
        self.logarithm = logarithm
        self.kept: dict[int, torch.Tensor] = {}  # with the tensor, so that its memory is not given to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in LEARNED or name.startswith("_scaled_dot_product"):
            return out
        follows = any(self.holds(part) for part in tree_leaves((args, kwargs)))
        if self._begins(name, args) or (follows and (not self.logarithm or name in COPIES)):
            for part in tree_leaves(out):
                if isinstance(part, torch.Tensor):
                    self.kept[_memory(part)] = part
        return out

    def _begins(self, name: str, args: Any) -> bool:
        """Return whether an operator gives such a result whatever it is given."""
        if self.logarithm:
            return name == LOGARITHM
        bounded = name == "clamp" and len([bound for bound in args[1:] if bound is not None]) == len(("min", "max"))
        return bounded or name in SATURATING

    def holds(self, value: Any) -> bool:
        """Return whether a tensor lies in the memory of such a result."""
        return isinstance(value, torch.Tensor) and _memory(value) in self.kept


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def squashed(model: nn.Module, layer: str, inputs: Any, *, logarithm: bool = False) -> bool:
    """Return whether the value at a layer comes out of a sigmoid, a softmax or the like, by operators without weights.

    Only meaningful for values that are all from 0 to 1: a difference of two sigmoids comes out of them as well.

    Args:
        model, layer, inputs: of the run.
        logarithm: whether the value is that of `logsigmoid` instead, by copies alone.
    """
    with _Marks(logarithm=logarithm) as marks:
        found = dry_run(model, (layer,), inputs)[layer]
    return bool(marks.holds(found))
