"""Operators along space: pooling, resizing, and space moved into channels or back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.frameworks.pytorch.operators.rule import RULES, rule
from kirsch.graph import relations
from kirsch.graph.labels import Tensor

if TYPE_CHECKING:
    from kirsch.frameworks.pytorch.operators.rule import Rule
    from kirsch.frameworks.pytorch.step import Step


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
