"""CPU kernels of `nms` and `roi_align`, for machines on which the compiled operators of torchvision do not load.

`nms` suppresses boxes greedily by overlap. `roi_align` averages bilinear samples over each cell of a box.
"""

from __future__ import annotations

import torch

from kirsch.frameworks.pytorch.io.vision import import_beside


def nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Return the indices of the boxes (N, 4) that overlap no box of a higher score by more than a threshold.

    The indices are sorted by score, the highest first.
    """
    order, kept = scores.argsort(descending=True, stable=True), []
    overlap = _overlap(dets)
    while len(order):
        best = order[0]
        kept.append(best)
        order = order[1:][overlap[best, order[1:]] <= iou_threshold]
    return torch.stack(kept) if kept else order


def _overlap(boxes: torch.Tensor) -> torch.Tensor:
    """Return the intersection over union of all pairs of boxes (N, 4: two corners), shape (N, N)."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    size = (torch.min(boxes[:, None, 2:], boxes[:, 2:]) - torch.max(boxes[:, None, :2], boxes[:, :2])).clamp(min=0)
    common = size.prod(2)
    return common / (areas[:, None] + areas - common)


def roi_align(
    values: torch.Tensor,
    rois: torch.Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """Return the means (K, C, pooled_height, pooled_width) over the cells of boxes in a map (N, C, H, W).

    Each row of `rois` (K, 5) is the index of an image and two corners.
    """
    offset = 0.5 if aligned else 0.0
    height, width = values.shape[-2:]
    out = values.new_zeros(len(rois), values.shape[1], pooled_height, pooled_width)
    for number, roi in enumerate(rois):
        x1, y1, x2, y2 = (roi[1:] * spatial_scale - offset).tolist()
        box_width, box_height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        rows = _sample_positions(y1, box_height, pooled_height, sampling_ratio)
        columns = _sample_positions(x1, box_width, pooled_width, sampling_ratio)
        image = values[int(roi[0])]
        samples = _interpolation(rows, height, values.dtype) @ image @ _interpolation(columns, width, values.dtype).mT
        cells = samples.unflatten(2, (pooled_width, -1)).unflatten(1, (pooled_height, -1))
        out[number] = cells.mean((2, 4))
    return out


def _sample_positions(start: float, length: float, cells: int, ratio: int) -> torch.Tensor:
    samples = cells * (ratio if ratio > 0 else max(int(-(-length // cells)), 1))
    return start + (torch.arange(samples, dtype=torch.float64) + 0.5) * length / samples


def _interpolation(positions: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return linear interpolation as a matrix (positions, size); positions more than 1 off the axis have weight 0."""
    inside = (positions >= -1) & (positions <= size)
    clamped = positions.clamp(0, size - 1)
    low = clamped.floor().long().clamp(max=size - 1)
    high, share = (low + 1).clamp(max=size - 1), clamped - low
    rows = torch.arange(len(positions))
    matrix = torch.zeros(len(positions), size, dtype=torch.float64)
    matrix.index_put_((rows, low), (1 - share) * inside, accumulate=True)
    matrix.index_put_((rows, high), share * inside, accumulate=True)
    return matrix.to(dtype)


def _fake_nms(dets: torch.Tensor, *_: object) -> torch.Tensor:
    return dets.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _fake_roi_align(
    values: torch.Tensor, rois: torch.Tensor, _: float, high: int, wide: int, *__: object
) -> torch.Tensor:
    return values.new_empty(rois.shape[0], values.shape[1], high, wide)


OPERATORS = {
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor": (nms, _fake_nms),
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor": (roi_align, _fake_roi_align),
}


def register() -> None:
    """Register these operators if torchvision has none. Call it before torchvision is imported."""
    if hasattr(torch.ops.torchvision, "nms"):
        return
    for schema, (kernel, fake) in OPERATORS.items():
        name = f"torchvision::{schema.partition('(')[0]}"
        torch.library.define(name, schema.partition("(")[1] + schema.partition("(")[2])
        torch.library.impl(name, "CPU")(kernel)
        torch.library.register_fake(name)(fake)
    extension = import_beside("torchvision.extension")
    extension._has_ops = lambda: True  # noqa: SLF001 - torchvision calls this before it uses its operators
