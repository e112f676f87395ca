"""Detection of outputs that come from a sigmoid or a softmax, by tracing a run, since values alone are ambiguous."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kirsch.frameworks.pytorch.features.capture import dry_run
from kirsch.frameworks.pytorch.inference.predict import tensors

if TYPE_CHECKING:
    from torch import nn

_SATURATING = "sigmoid hardsigmoid _softmax _safe_softmax softmax tanh hardtanh exp"
SATURATING = frozenset(_SATURATING.split())
"""Operators with a bounded range, and `exp`, with which the code of a model may compute a sigmoid or a softmax.

`clamp` counts if it has both bounds.
"""

_LEARNED = """
mm addmm bmm baddbmm mv addmv addbmm dot linear matmul einsum convolution _convolution conv1d conv2d conv3d
mkldnn_convolution mkldnn_linear embedding _embedding_bag lstm gru rnn_tanh rnn_relu native_layer_norm
native_batch_norm native_group_norm _native_batch_norm_legit_no_training cudnn_batch_norm
"""
LEARNED = frozenset(_LEARNED.split())
"""Operators of layers. Their outputs do not count as outputs of a sigmoid or softmax that comes before the layer."""

LOGARITHM = "log_sigmoid_forward"
_KEEP_LOGARITHM = "clone _to_copy cat stack clamp clamp_min nan_to_num index index_select flip roll"
KEEP_LOGARITHM = frozenset(_KEEP_LOGARITHM.split())
"""Operators whose result counts as a logarithm of a sigmoid if their input is one. Subtraction is not among them: the
difference of log(sigmoid(x)) and log(sigmoid(-x)) is the logit x."""


class _Marks(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in PyTorch
    """Records the memory of results that come from a saturating operator without a layer in between.

    Args:
        logarithm: record instead the results of `logsigmoid`, and of operators in `KEEP_LOGARITHM` that follow it.
    """

    def __init__(self, *, logarithm: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in PyTorch
        self.logarithm = logarithm
        self.kept: dict[int, torch.Tensor] = {}  # keeps the tensor alive, so that its memory is not reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in LEARNED or name.startswith("_scaled_dot_product"):
            return out
        follows = any(self.holds(part) for part in tree_leaves((args, kwargs)))
        if self._begins(name, args) or (follows and (not self.logarithm or name in KEEP_LOGARITHM)):
            for part in tree_leaves(out):
                if isinstance(part, torch.Tensor):
                    self.kept[_memory(part)] = part
        return out

    def _begins(self, name: str, args: Any) -> bool:
        """Return whether the result of an operator is recorded even if none of its inputs is a recorded result."""
        if self.logarithm:
            return name == LOGARITHM
        bounded = name == "clamp" and len([bound for bound in args[1:] if bound is not None]) == len(("min", "max"))
        return bounded or name in SATURATING

    def holds(self, value: Any) -> bool:
        """Return whether a tensor shares the memory of a recorded result."""
        return isinstance(value, torch.Tensor) and _memory(value) in self.kept


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_squashed(model: nn.Module, layer: str, inputs: Any, *, logarithm: bool = False) -> bool:
    """Return whether the value at a layer comes from a saturating operator, with no layer in between.

    Without `logarithm`, use the result only if all values are from 0 to 1. A difference of two sigmoids also comes from
    sigmoids, but it can be below 0.

    Args:
        model, layer, inputs: model, layer and batch of the run.
        logarithm: test instead for a result of `logsigmoid` that only operators in `KEEP_LOGARITHM` have changed.
    """
    inputs = tensors(inputs, model)
    with _Marks(logarithm=logarithm) as marks:
        value = dry_run(model, (layer,), inputs)[layer]
    return bool(marks.holds(value))
