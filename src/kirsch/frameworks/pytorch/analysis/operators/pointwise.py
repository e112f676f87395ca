"""Operators that act on each number by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.frameworks.pytorch.analysis.operators.rule import letters, rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import Step

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
"""Those that leave a product of two matrices one; a product of two activations does not."""


@rule(*ELEMENTWISE.split())
def _elementwise(step: Step) -> Tensor:
    tensors = step.tensors()
    several = len(tensors) > 1 and not any(step.is_weight(tensor) for tensor in tensors)
    if step.name == "add" and several and step.is_residual():
        for axis in tensors[0].axes:
            step.facts.mark(axis, "summed")
    out = relations.elementwise(step.facts, tensors, step.shape)
    if step.name not in LINEAR or (several and step.name in ("mul", "div")):
        step.activated(out)
    return out


@rule("type_as")
def _type_as(step: Step) -> Tensor:
    x, other = step.args
    relations.freeze(step.facts, [other], "only its type is used")
    return Tensor.of(step.shape, x.axes)


@rule("prelu")
def _prelu(step: Step) -> Tensor:
    x, weight = step.args
    if weight.shape[0] == 1:
        return Tensor.of(step.shape, x.axes)
    return relations.relate(step.facts, [(x, letters(x)), (weight, letters(x)[1])], letters(x), step.shape)


@rule("glu")
def _glu(step: Step) -> Tensor:
    x = step.args[0]
    dim = step.arg(1, "dim", -1) % len(x.shape)
    half = step.shape[dim]
    first = relations.gather(step.facts, x, dim, np.arange(half))
    second = relations.gather(step.facts, x, dim, np.arange(half, 2 * half))
    return relations.elementwise(step.facts, [first, second], step.shape)
