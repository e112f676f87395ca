"""Operators that compute a statistic over some axes: normalizations, softmax, reductions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kirsch.frameworks.pytorch.analysis.operation import axes_of
from kirsch.frameworks.pytorch.analysis.operators.rule import letters, rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import Step


@rule(
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "batch_norm",
    "native_batch_norm",
    "instance_norm",
)
def _per_channel_norm(step: Step) -> Tensor:
    x = step.args[0]
    running = step.name == "_native_batch_norm_legit_no_training"
    running |= step.name == "native_batch_norm" and not step.args[5]
    if not running:  # a weight may be standardized by this operator
        others = [dim for dim in range(len(x.shape)) if dim != 1]
        relations.freeze(step.facts, [x], "a normalization computes its statistics over it", others)
    own = [(t, letters(x)[1]) for t in step.args[1:5] if isinstance(t, Tensor)]
    out = relations.relate(step.facts, [(x, letters(x)), *own], letters(x), step.shape)
    step.activated(out)
    return out


@rule("layer_norm", "native_layer_norm", "rms_norm")
def _layer_norm(step: Step) -> Tensor:
    x, sizes = step.args[0], step.args[1]
    own = [t for t in (step.arg(2, "weight"), step.arg(3, "bias")) if isinstance(t, Tensor)]
    own_letters = letters(x)[-len(sizes) :]
    out = relations.relate(step.facts, [(x, letters(x)), *((t, own_letters) for t in own)], letters(x), step.shape)
    step.activated(out)
    normalized = out.axes[-len(sizes) :]
    given = step.given(1, "normalized_shape")
    known = given if isinstance(given, (tuple, list)) and len(given) == len(sizes) else [None] * len(sizes)
    for axis, size in zip(normalized, known, strict=True):
        step.follow(axis, size)
    step.facts.statistic(normalized)
    return out


@rule("_weight_norm")
def _weight_norm(step: Step) -> Tensor:
    """The result is g · v / |v|, with a length over all axes of v but one; over all for the axis -1."""
    v, g = step.args[:2]
    dim = step.arg(2, "dim", 0)
    out = relations.elementwise(step.facts, [v, g], step.shape)
    step.facts.statistic([axis for place, axis in enumerate(v.axes) if place != dim])
    return out


@rule("group_norm", "native_group_norm")
def _group_norm(step: Step) -> Tensor:
    """A decomposed program gives the sizes (N, C, H·W) before the number of groups."""
    native = step.name == "native_group_norm"
    x, groups = step.args[0], step.args[6 if native else 1]
    others = [dim for dim in range(len(x.shape)) if dim != 1]
    relations.freeze(step.facts, [x], "a normalization computes its statistics over it", others)
    weights = step.args[1:3] if native else (step.arg(2, "weight"), step.arg(3, "bias"))
    own = [(t, letters(x)[1]) for t in weights if t is not None]
    out = relations.relate(step.facts, [(x, letters(x)), *own], letters(x), step.shape)
    step.activated(out)
    channels = out.axes[1]
    if channels is None:
        return out
    given = step.given(6, "group") if native else step.given(1, "num_groups")
    if native:
        step.follow(channels, step.given(4, "C"))
    if groups == len(channels):
        step.follow(channels, given)
    elif groups > 1:
        rows = step.facts.split(channels.reshape(groups, -1), "norm groups")[0]
        step.follow(rows, given)
    if groups < len(channels):
        step.facts.statistic([channels])
    return out


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(step: Step) -> Tensor:
    x = step.args[0]
    dims = axes_of(step.arg(1, "dim"), len(x.shape))
    if step.softmax == "kept":
        step.facts.statistic([x.axes[dim] for dim in dims])
    else:
        relations.freeze(step.facts, [x], "a softmax spans it", dims)
    return Tensor.of(step.shape, x.axes)


@rule("mean", "sum", "nansum", "amax", "amin", "linalg_vector_norm", "norm", "var", "std")
def _reduction(step: Step) -> Tensor:
    x = step.args[0]
    dims = axes_of(step.arg(2 if step.name.endswith("norm") else 1, "dim"), len(x.shape))
    if isinstance(step.arg(1, "dim"), bool):  # var(x, unbiased)
        dims = axes_of(None, len(x.shape))
    step.facts.statistic([x.axes[dim] for dim in dims])
    return _without(step, x, dims)


@rule("linalg_norm")
def _linalg_norm(step: Step) -> Tensor | list[Tensor]:
    """The length of vectors; without an order, that of all numbers of a matrix."""
    order, dim = step.arg(1, "ord"), step.arg(2, "dim")
    one = isinstance(dim, int) or (isinstance(dim, (list, tuple)) and len(dim) == 1)
    if order is not None and not (one and isinstance(order, (int, float))):
        relations.freeze(step.facts, [step.args[0]], "a norm of matrices spans it")
        return [Tensor.of(shape) for shape in step.shapes]
    x = step.args[0]
    dims = axes_of(dim, len(x.shape))
    step.facts.statistic([x.axes[place] for place in dims])
    return _without(step, x, dims)


@rule(
    "var_mean", "std_mean", "prod", "any", "all", "logsumexp", "median", "nanmedian", "mode", "aminmax", "count_nonzero"
)
def _whole_reduction(step: Step) -> Tensor | list[Tensor]:
    """What is left of these when a part of the axis goes is not worked out."""
    x = step.args[0]
    dims = axes_of(None if isinstance(step.arg(1, "dim"), bool) else step.arg(1, "dim"), len(x.shape))
    relations.freeze(step.facts, [x], f"{step.name} spans it", dims)
    return [_without(step, x, dims)] * len(step.shapes)


@rule("max", "min")
def _extreme(step: Step) -> Tensor | list[Tensor]:
    other = step.arg(1, "other")
    if isinstance(other, Tensor):
        return relations.elementwise(step.facts, [step.args[0], other], step.shape)
    if len(step.shapes) == 1:
        return _whole_reduction(step)
    x = step.args[0]
    (dim,) = axes_of(step.args[1], len(x.shape))
    step.facts.statistic([x.axes[dim]])
    values = _without(step, x, [dim])
    return [values, replace(values, points=x.axes[dim])]


def _without(step: Step, x: Tensor, dims: list[int]) -> Tensor:
    return relations.drop(step.facts, x, dims, keepdim=len(step.shape) == len(x.shape))
