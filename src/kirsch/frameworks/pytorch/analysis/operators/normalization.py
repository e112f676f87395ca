"""Rules of operators that compute a statistic over axes: normalizations, softmax, reductions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kirsch.frameworks.pytorch.analysis.operation import dims_of
from kirsch.frameworks.pytorch.analysis.operators.rule import letters, rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import OperationContext


@rule(
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "batch_norm",
    "native_batch_norm",
    "instance_norm",
)
def _per_channel_norm(op: OperationContext) -> Tensor:
    x = op.args[0]
    running = op.name == "_native_batch_norm_legit_no_training"
    running |= op.name == "native_batch_norm" and not op.args[5]
    if not running:  # weight standardization applies this operator to weights, whose other axes have labels
        others = [dim for dim in range(len(x.shape)) if dim != 1]
        relations.freeze(op.facts, [x], "a normalization computes its statistics over the axis", others)
    if op.name != "instance_norm" and isinstance(op.args[1], Tensor) and op.is_weight(op.args[1]):
        op.facts.mark(op.args[1].axes[0], "batch norm scale")
    parameters = [(t, letters(x)[1]) for t in op.args[1:5] if isinstance(t, Tensor)]
    out = relations.relate(op.facts, [(x, letters(x)), *parameters], letters(x), op.shape)
    op.mark_activated(out)
    return out


@rule("layer_norm", "native_layer_norm", "rms_norm")
def _layer_norm(op: OperationContext) -> Tensor:
    x, sizes = op.args[0], op.args[1]
    last = letters(x)[-len(sizes) :]
    parameters = [(t, last) for t in (op.arg(2, "weight"), op.arg(3, "bias")) if isinstance(t, Tensor)]
    op.mark_weight(op.arg(2, "weight"), "scale")
    op.mark_weight(op.arg(3, "bias"), "shift")
    out = relations.relate(op.facts, [(x, letters(x)), *parameters], letters(x), op.shape)
    op.mark_activated(out)
    normalized = out.axes[-len(sizes) :]
    stated = op.traced_arg(1, "normalized_shape")
    stated = stated if isinstance(stated, (tuple, list)) and len(stated) == len(sizes) else [None] * len(sizes)
    for axis, size in zip(normalized, stated, strict=True):
        op.tie_size(axis, size)
    op.facts.statistic(normalized)
    return out


@rule("_weight_norm")
def _weight_norm(op: OperationContext) -> Tensor:
    """Weight normalization, g · v / |v|, with the norm over all axes of v except `dim`, or over all axes for -1."""
    v, g = op.args[:2]
    dim = op.arg(2, "dim", 0)
    out = relations.elementwise(op.facts, [v, g], op.shape)
    op.facts.statistic([axis for place, axis in enumerate(v.axes) if place != dim])
    return out


@rule("group_norm", "native_group_norm")
def _group_norm(op: OperationContext) -> Tensor:
    """`native_group_norm` of a decomposed program takes N, C and H·W before the number of groups."""
    native = op.name == "native_group_norm"
    x, groups = op.args[0], op.args[6 if native else 1]
    others = [dim for dim in range(len(x.shape)) if dim != 1]
    relations.freeze(op.facts, [x], "a normalization computes its statistics over the axis", others)
    weights = op.args[1:3] if native else (op.arg(2, "weight"), op.arg(3, "bias"))
    parameters = [(t, letters(x)[1]) for t in weights if t is not None]
    out = relations.relate(op.facts, [(x, letters(x)), *parameters], letters(x), op.shape)
    op.mark_activated(out)
    channels = out.axes[1]
    if channels is None:
        return out
    stated = op.traced_arg(6, "group") if native else op.traced_arg(1, "num_groups")
    if native:
        op.tie_size(channels, op.traced_arg(4, "C"))
    if groups == len(channels):
        op.tie_size(channels, stated)
    elif groups > 1:
        rows = op.facts.split(channels.reshape(groups, -1), "norm groups")[0]
        op.tie_size(rows, stated)
    if groups < len(channels):
        op.facts.statistic([channels])
    return out


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(op: OperationContext) -> Tensor:
    x = op.args[0]
    dims = dims_of(op.arg(1, "dim"), len(x.shape))
    if op.softmax == "kept":
        op.facts.statistic([x.axes[dim] for dim in dims])
    else:
        relations.freeze(op.facts, [x], "a softmax is computed over the axis", dims)
    return Tensor.of(op.shape, x.axes)


@rule("mean", "sum", "nansum", "amax", "amin", "linalg_vector_norm", "norm", "var", "std")
def _reduction(op: OperationContext) -> Tensor:
    x = op.args[0]
    dims = dims_of(op.arg(2 if op.name.endswith("norm") else 1, "dim"), len(x.shape))
    if isinstance(op.arg(1, "dim"), bool):  # var(x, unbiased)
        dims = dims_of(None, len(x.shape))
    op.facts.statistic([x.axes[dim] for dim in dims])
    return _reduced(op, x, dims)


@rule("linalg_norm")
def _linalg_norm(op: OperationContext) -> Tensor | list[Tensor]:
    """A norm of vectors; without `ord`, the Frobenius norm of a matrix."""
    order, dim = op.arg(1, "ord"), op.arg(2, "dim")
    vectors = isinstance(dim, int) or (isinstance(dim, (list, tuple)) and len(dim) == 1)
    if order is not None and not (vectors and isinstance(order, (int, float))):
        relations.freeze(op.facts, [op.args[0]], "a matrix norm is computed over the axis")
        return [Tensor.of(shape) for shape in op.shapes]
    x = op.args[0]
    dims = dims_of(dim, len(x.shape))
    op.facts.statistic([x.axes[place] for place in dims])
    return _reduced(op, x, dims)


@rule(
    "var_mean", "std_mean", "prod", "any", "all", "logsumexp", "median", "nanmedian", "mode", "aminmax", "count_nonzero"
)
def _freezing_reduction(op: OperationContext) -> Tensor | list[Tensor]:
    """Freeze the axes of a reduction whose value after a cut is not analyzed."""
    x = op.args[0]
    dims = dims_of(None if isinstance(op.arg(1, "dim"), bool) else op.arg(1, "dim"), len(x.shape))
    relations.freeze(op.facts, [x], f"{op.name} is computed over the axis", dims)
    return [_reduced(op, x, dims)] * len(op.shapes)


@rule("max", "min")
def _extreme(op: OperationContext) -> Tensor | list[Tensor]:
    other = op.arg(1, "other")
    if isinstance(other, Tensor):
        return relations.elementwise(op.facts, [op.args[0], other], op.shape)
    if len(op.shapes) == 1:
        return _freezing_reduction(op)
    x = op.args[0]
    (dim,) = dims_of(op.args[1], len(x.shape))
    op.facts.statistic([x.axes[dim]])
    values = _reduced(op, x, [dim])
    return [values, replace(values, points=x.axes[dim])]


def _reduced(op: OperationContext, x: Tensor, dims: list[int]) -> Tensor:
    return relations.drop(op.facts, x, dims, keepdim=len(op.shape) == len(x.shape))
