"""Rules of spatial operators: pooling, resizing, and moving values between space and channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.frameworks.pytorch.analysis.operators.rule import RULES, rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import OperationContext
    from kirsch.frameworks.pytorch.analysis.operators.rule import Rule


@rule("pixel_shuffle")
def _pixel_shuffle(op: OperationContext) -> Tensor:
    x = op.args[0]
    channels = x.axes[-3]
    if channels is None:
        return Tensor.of(op.shape, [*x.axes[:-3], None, None, None])
    relations.freeze(op.facts, [x], "the axis becomes a spatial axis", [-2, -1])
    cells = channels.reshape(op.shape[-3], -1)
    rows, positions = op.facts.split(cells, "pixel shuffle")
    op.facts.freeze(positions, "the axis becomes a spatial axis", boundary=True)
    return Tensor.of(op.shape, [*x.axes[:-3], rows, None, None])


@rule("pixel_unshuffle")
def _pixel_unshuffle(op: OperationContext) -> Tensor:
    x = op.args[0]
    relations.freeze(op.facts, [x], "the axis is unfolded into channels", [-2, -1])
    times = op.shape[-3] // x.shape[-3]
    channels = relations.gather(op.facts, x, len(x.shape) - 3, np.repeat(np.arange(x.shape[-3]), times)).axes[-3]
    return Tensor.of(op.shape, [*x.axes[:-3], channels, None, None])


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(op: OperationContext) -> Tensor:
    """Transpose the grid of channels: (groups, C / groups) → (C / groups, groups)."""
    x, groups = op.args[0], op.args[1]
    axes, channels = list(x.axes), x.axes[1]
    if channels is not None:
        rows, columns = op.facts.split(channels.reshape(groups, -1), "channel shuffle")
        axes[1] = op.facts.merge([columns, rows], [len(channels) // groups, groups], "channel shuffle")
        op.tie_size(rows, op.traced_arg(1, "groups"))
    return Tensor.of(op.shape, axes)


@rule("im2col")
def _unfold(op: OperationContext) -> Tensor:
    """Each channel becomes one channel for each position in the window."""
    x = op.args[0]
    relations.freeze(op.facts, [x], "a window slides along the axis", [-2, -1])
    size = x.shape[-3]
    channels = relations.gather(op.facts, x, len(x.shape) - 3, np.repeat(np.arange(size), op.shape[-2] // size))
    return Tensor.of(op.shape, [*channels.axes[:-2], None])


@rule("col2im")
def _fold(op: OperationContext) -> Tensor:
    x = op.args[0]
    relations.freeze(op.facts, [x], "fold sums the windows along the axis", [-1])
    columns = x.axes[-2]
    if columns is None:
        return Tensor.of(op.shape, [*x.axes[:-2], None, None, None])
    rows, positions = op.facts.split(columns.reshape(op.shape[-3], -1), "fold")
    op.facts.freeze(positions, "the axis is a position in a window", boundary=True)
    return Tensor.of(op.shape, [*x.axes[:-2], rows, None, None])


@rule("unfold")
def _windows(op: OperationContext) -> Tensor:
    x = op.args[0]
    dim = op.args[1] % len(x.shape)
    relations.freeze(op.facts, [x], "a window slides along the axis", [dim])
    return Tensor.of(op.shape, [*(None if position == dim else axis for position, axis in enumerate(x.axes)), None])


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(op: OperationContext) -> Tensor:
    """Values (N, C, ...) sampled at the coordinates of a grid (N, ..., 2 or 3)."""
    x, grid = op.args[:2]
    others = [dim for dim in range(len(x.shape)) if dim != 1]
    relations.freeze(op.facts, [x], "grid sampling interpolates along the axis", others)
    relations.freeze(op.facts, [grid], "the axis holds sampling coordinates")
    return Tensor.of(op.shape, [None, x.axes[1], *[None] * (len(x.shape) - 2)])


def _spatial(rank: int) -> Rule:
    def pooled(op: OperationContext) -> list[Tensor]:
        x = op.args[0]
        dims = range(len(x.shape) - rank, len(x.shape))
        relations.freeze(op.facts, [x], "the axis is pooled or resized", dims)
        return [Tensor.of(shape, [*x.axes[: len(x.shape) - rank], *[None] * rank]) for shape in op.shapes]

    return pooled


for _rank in (1, 2, 3):
    for _pool in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool"):
        RULES[f"{_pool}{_rank}d"] = RULES[f"{_pool}{_rank}d_with_indices"] = _spatial(_rank)
    for _mode in ("upsample_nearest", "_upsample_nearest_exact"):
        RULES[f"{_mode}{_rank}d"] = _spatial(_rank)
RULES["upsample_linear1d"] = _spatial(1)
RULES["upsample_bilinear2d"] = RULES["upsample_bicubic2d"] = _spatial(2)
RULES["upsample_trilinear3d"] = _spatial(3)
RULES["_upsample_bilinear2d_aa"] = RULES["_upsample_bicubic2d_aa"] = RULES["lp_pool2d"] = _spatial(2)
