"""Operators that compute a statistic over some axes: normalisations, softmax, reductions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.frameworks.pytorch.operators.rule import letters, rule
from kirsch.frameworks.pytorch.step import axes_of
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.step import Step


@rule(
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "batch_norm",
    "instance_norm",
)
def _per_channel_norm(step: Step) -> Tensor:
    x = step.args[0]
    if step.name != "_native_batch_norm_legit_no_training":  # a weight may be standardised by this operator
        others = [dim for dim in range(len(x.shape)) if dim != 1]
        relations.freeze(step.facts, [x], "a normalisation computes its statistics over it", others)
    own = [(t, letters(x)[1]) for t in step.args[1:5] if isinstance(t, Tensor)]
    return relations.relate(step.facts, [(x, letters(x)), *own], letters(x), step.shape)


@rule("layer_norm")
def _layer_norm(step: Step) -> Tensor:
    x, sizes = step.args[0], step.args[1]
    own = [t for t in (step.arg(2, "weight"), step.arg(3, "bias")) if t is not None]
    own_letters = letters(x)[-len(sizes) :]
    out = relations.relate(step.facts, [(x, letters(x)), *((t, own_letters) for t in own)], letters(x), step.shape)
    normalized = out.axes[-len(sizes) :]
    given = step.given(1, "normalized_shape")
    known = given if isinstance(given, (tuple, list)) and len(given) == len(sizes) else [None] * len(sizes)
    for axis, size in zip(normalized, known, strict=True):
        step.follow(axis, size)
    step.facts.statistic(normalized)
    return out


@rule("group_norm")
def _group_norm(step: Step) -> Tensor:
    x, groups = step.args[0], step.args[1]
    others = [dim for dim in range(len(x.shape)) if dim != 1]
    relations.freeze(step.facts, [x], "a normalisation computes its statistics over it", others)
    own = [(t, letters(x)[1]) for t in (step.arg(2, "weight"), step.arg(3, "bias")) if t is not None]
    out = relations.relate(step.facts, [(x, letters(x)), *own], letters(x), step.shape)
    channels = out.axes[1]
    if channels is None:
        return out
    given = step.given(1, "num_groups")
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
    relations.freeze(step.facts, [x], "a softmax spans it", axes_of(step.arg(1, "dim"), len(x.shape)))
    return Tensor.of(step.shape, x.axes)


@rule("mean", "sum", "amax", "amin", "linalg_vector_norm")
def _reduction(step: Step) -> Tensor:
    x = step.args[0]
    place = 2 if step.name == "linalg_vector_norm" else 1
    dims = axes_of(step.arg(place, "dim"), len(x.shape))
    keepdim = len(step.shape) == len(x.shape)
    step.facts.statistic([x.axes[dim] for dim in dims])
    return relations.drop(step.facts, x, dims, keepdim=keepdim)
