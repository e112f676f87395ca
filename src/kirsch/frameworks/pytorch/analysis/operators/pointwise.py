"""Rules of elementwise operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.frameworks.pytorch.analysis.operators.rule import letters, rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import OperationContext

ELEMENTWISE = """
add sub rsub mul div pow neg abs exp expm1 log log1p sqrt rsqrt square reciprocal sigmoid tanh relu relu6 gelu silu
mish elu selu celu rrelu softplus softsign leaky_relu hardtanh hardswish hardsigmoid hardshrink softshrink
tanhshrink threshold log_sigmoid logsigmoid clamp clamp_min clamp_max maximum minimum where masked_fill eq ne lt le
gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor __and__ __or__
isnan isinf isfinite isclose floor_divide exp2 log2 log10 sinh cosh tan asin acos atan asinh acosh atanh erfc erfinv
logit xlogy logaddexp hypot copysign heaviside sgn real imag conj conj_physical special_expit floor ceil round trunc
sign sin cos erf lerp addcmul addcdiv atan2 fmod remainder to _to_copy clone detach contiguous alias lift_fresh_copy
dropout feature_dropout alpha_dropout native_dropout bernoulli zero exponential normal_functional ones_like
zeros_like empty_like full_like rand_like randn_like nan_to_num fill copy complex polar angle
"""


_LINEAR = """
add sub rsub mul div neg to _to_copy clone detach contiguous alias lift_fresh_copy dropout feature_dropout alpha_dropout
native_dropout zeros_like ones_like empty_like full_like rand_like randn_like fill copy zero
"""
LINEAR = frozenset(_LINEAR.split())
"""Elementwise operators that are linear; a product of two activations is not."""


@rule(*ELEMENTWISE.split())
def _elementwise(op: OperationContext) -> Tensor:
    tensors = op.tensors()
    several = len(tensors) > 1 and not any(op.is_weight(tensor) for tensor in tensors)
    if op.name == "add" and several and op.is_residual():
        for axis in tensors[0].axes:
            op.facts.mark(axis, "summed")
    if op.name == "mul" and not several:
        for tensor in tensors:
            op.mark_weight(tensor, "scale")
    out = relations.elementwise(op.facts, tensors, op.shape)
    if op.name not in LINEAR or (several and op.name in ("mul", "div")):
        op.mark_activated(out)
    return out


@rule("type_as")
def _type_as(op: OperationContext) -> Tensor:
    x, other = op.args
    relations.freeze(op.facts, [other], "only the data type of the tensor is used")
    return Tensor.of(op.shape, x.axes)


@rule("prelu")
def _prelu(op: OperationContext) -> Tensor:
    x, weight = op.args
    if weight.shape[0] == 1:
        return Tensor.of(op.shape, x.axes)
    return relations.relate(op.facts, [(x, letters(x)), (weight, letters(x)[1])], letters(x), op.shape)


@rule("glu")
def _glu(op: OperationContext) -> Tensor:
    x = op.args[0]
    dim = op.arg(1, "dim", -1) % len(x.shape)
    half = op.shape[dim]
    first = relations.gather(op.facts, x, dim, np.arange(half))
    second = relations.gather(op.facts, x, dim, np.arange(half, 2 * half))
    return relations.elementwise(op.facts, [first, second], op.shape)
