"""Operators along space: pooling, resizing, and space moved into channels or back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.frameworks.pytorch.analysis.operators.rule import RULES, rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.analysis.operation import Step
    from kirsch.frameworks.pytorch.analysis.operators.rule import Rule


@rule("pixel_shuffle")
def _pixel_shuffle(step: Step) -> Tensor:
    x = step.args[0]
    channels = x.axes[-3]
    if channels is None:
        return Tensor.of(step.shape, [*x.axes[:-3], None, None, None])
    relations.freeze(step.facts, [x], "it becomes space", [-2, -1])
    cells = channels.reshape(step.shape[-3], -1)
    rows, positions = step.facts.split(cells, "pixel shuffle")
    step.facts.freeze(positions, "it becomes space", boundary=True)
    return Tensor.of(step.shape, [*x.axes[:-3], rows, None, None])


@rule("pixel_unshuffle")
def _pixel_unshuffle(step: Step) -> Tensor:
    x = step.args[0]
    relations.freeze(step.facts, [x], "it is unfolded into channels", [-2, -1])
    times = step.shape[-3] // x.shape[-3]
    channels = relations.gather(step.facts, x, len(x.shape) - 3, np.repeat(np.arange(x.shape[-3]), times)).axes[-3]
    return Tensor.of(step.shape, [*x.axes[:-3], channels, None, None])


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(step: Step) -> Tensor:
    """(groups, C / groups) → (C / groups, groups)."""
    x, groups = step.args[0], step.args[1]
    axes, channels = list(x.axes), x.axes[1]
    if channels is not None:
        rows, columns = step.facts.split(channels.reshape(groups, -1), "channel shuffle")
        axes[1] = step.facts.merge([columns, rows], [len(channels) // groups, groups], "channel shuffle")
        step.follow(rows, step.given(1, "groups"))
    return Tensor.of(step.shape, axes)


@rule("im2col")
def _unfold(step: Step) -> Tensor:
    """Each channel becomes one axis position for each place of the window."""
    x = step.args[0]
    relations.freeze(step.facts, [x], "a window slides along it", [-2, -1])
    size = x.shape[-3]
    channels = relations.gather(step.facts, x, len(x.shape) - 3, np.repeat(np.arange(size), step.shape[-2] // size))
    return Tensor.of(step.shape, [*channels.axes[:-2], None])


@rule("col2im")
def _fold(step: Step) -> Tensor:
    x = step.args[0]
    relations.freeze(step.facts, [x], "windows are laid along it", [-1])
    columns = x.axes[-2]
    if columns is None:
        return Tensor.of(step.shape, [*x.axes[:-2], None, None, None])
    rows, places = step.facts.split(columns.reshape(step.shape[-3], -1), "fold")
    step.facts.freeze(places, "it is a place in a window", boundary=True)
    return Tensor.of(step.shape, [*x.axes[:-2], rows, None, None])


@rule("unfold")
def _windows(step: Step) -> Tensor:
    x = step.args[0]
    dim = step.args[1] % len(x.shape)
    relations.freeze(step.facts, [x], "a window slides along it", [dim])
    return Tensor.of(step.shape, [*(None if place == dim else axis for place, axis in enumerate(x.axes)), None])


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(step: Step) -> Tensor:
    """Values (N, C, ...) read at the places of a grid (N, ..., 2 or 3)."""
    x, grid = step.args[:2]
    others = [dim for dim in range(len(x.shape)) if dim != 1]
    relations.freeze(step.facts, [x], "it is read at the places of a grid", others)
    relations.freeze(step.facts, [grid], "it says where to read")
    return Tensor.of(step.shape, [None, x.axes[1], *[None] * (len(x.shape) - 2)])


def _spatial(rank: int) -> Rule:
    def pooled(step: Step) -> list[Tensor]:
        x = step.args[0]
        dims = range(len(x.shape) - rank, len(x.shape))
        relations.freeze(step.facts, [x], "it is pooled or resized", dims)
        return [Tensor.of(shape, [*x.axes[: len(x.shape) - rank], *[None] * rank]) for shape in step.shapes]

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
