"""Count the parameters of a model, and the multiply-accumulates of a forward pass."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kirsch.frameworks.pytorch.inference.predict import arguments_of, inference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from torch.fx import Node


ATEN = "aten"
"""Namespace of the operators of PyTorch."""

COMPOSITE = DispatchKey.CompositeImplicitAutograd
"""Key of the operators that PyTorch computes by other operators."""


def count(model: nn.Module, example_inputs: Any) -> tuple[int, int]:
    """Return the number of parameters, and the number of multiply-accumulates in one forward pass.

    Args:
        model: the model; its mode is not changed.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Source: torch.utils.flop_counter counts two floating-point operations for each multiply-accumulate. It cannot
        count inside the fast paths of attention and of oneDNN, so these paths are switched off.
    """
    args, options = arguments_of(model, example_inputs)
    counter = _counter()
    with inference(model), torch.no_grad(), torch.random.fork_rng(), plain_kernels(), counter:
        model(*args, **options)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def macs_of(node: Node) -> int | None:
    """Return the multiply-accumulates of one traced operation, from its traced shapes; no value is computed.

    None if they cannot be counted: PyTorch has no formula for operators of other packages, and does not run a
    higher-order operator such as `cond`, whose arguments are programs.
    """
    if isinstance(node.target, HigherOrderOperator):
        return None
    args, options = map_arg((node.args, node.kwargs), lambda source: source.meta.get("val"))
    mode = next((v.fake_mode for v in tree_leaves((args, options)) if isinstance(v, FakeTensor)), FakeTensorMode())
    counter = _counter()
    failed = False
    try:
        with torch.no_grad(), mode, plain_kernels(), counter:
            node.target(*args, **options)  # type: ignore[operator]  # only called for nodes that call a function
    except Exception:  # noqa: BLE001 - operators that need values, and formulas of other packages, raise errors of any class
        failed = True
    macs = int(counter.get_total_flops() // 2)
    return None if not macs and _may_have_products(node.target, counter, failed=failed) else macs


def _may_have_products(operator: Any, counter: FlopCounterMode, *, failed: bool) -> bool:
    """Return whether an operator may compute products that were not counted; `failed`: it raised an error."""
    if not isinstance(operator, OpOverload):  # arithmetic on sizes
        return False
    has_formula = operator.overloadpacket in counter.flop_registry
    if operator.namespace == ATEN:  # PyTorch has a formula for each of its products
        return failed and (has_formula or operator.has_kernel_for_dispatch_key(COMPOSITE))
    if operator.namespace == "torchvision":  # the others choose, pool or interpolate
        return bool(operator.overloadpacket.__name__ == "deform_conv2d")
    return failed or not has_formula


def _counter() -> FlopCounterMode:
    grouped = [getattr(space, name, None) for space, name in GROUPED]
    counter = FlopCounterMode(display=False, custom_mapping={op: _grouped for op in grouped if op is not None})
    # The default tracker registers hooks on gradients, which the tensors do not have here.
    counter.mod_tracker = _NoModuleTracker()  # type: ignore[assignment]
    return counter


GROUPED = ((torch.ops.aten, "_grouped_mm"), (torch.ops.transformers, "grouped_mm_fallback"))
"""Grouped matrix products, which PyTorch does not count; the second one exists if transformers is imported."""


def _grouped(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Return the floating-point operations of a grouped matrix product, from the shapes of its two operands.

    The operands are (G, S, I) or (S, I), and (G, I, O) or (I, O). If an operand has no axis of groups, the groups are
    parts of one of its axes, and each group computes a part of one product.
    """
    groups = rows[0] if len(rows) == len(weight) == len("GSI") else 1
    return int(2 * groups * rows[-2] * rows[-1] * weight[-1])


class _NoModuleTracker:
    """Replacement of `ModuleTracker` that tracks no modules."""

    parents: ClassVar = {"Global"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def plain_kernels(*, recurrent: bool = True) -> Iterator[None]:
    """Compute attention and recurrent layers by separate matrix products within the block, not by fused kernels.

    `recurrent`: also recurrent layers; convolutions then take about twice as long on a CPU.
    """
    fused = torch.backends.mkldnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # setting this flag warns about missing Intel GPUs
            with sdpa_kernel(SDPBackend.MATH), fused:
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
