"""Differences between the outputs of two runs."""

from __future__ import annotations

import math

import torch

LIMIT = 1e37
"""Larger values are the limits of a dtype, such as `torch.finfo(dtype).min` in masked logits, or sums with them."""


def _without_limits(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor with infinity in place of limits of its dtype, which would make the other values negligible."""
    if not value.is_floating_point():
        return value
    limits = value.double().abs() >= LIMIT
    return value if bool(limits.all()) else torch.where(limits, value.sign() * torch.inf, value)


def distance(reference: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Return the largest difference relative to the largest reference value, over all outputs.

    For integer and boolean outputs (classes, masks), the difference is the fraction of entries that differ. The result
    is NaN if there are no outputs, an output contains NaN, or the reference has no finite value. It is infinite if
    shapes differ.
    """
    pairs = list(zip(reference, found, strict=False))
    if not reference and not found:
        return float("nan")
    if len(reference) != len(found) or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    largest = 0.0
    for a, b in ((_without_limits(a), _without_limits(b)) for a, b in pairs):
        if a.numel():
            if a.is_floating_point() or a.is_complex():
                if not a.isfinite().any():  # equal infinities are ignored below, so nothing would be compared
                    return float("nan")
                finite = ~((a == b) & a.isinf())  # equal infinities, as in masked attention scores, differ by NaN
                difference = float(torch.where(finite, a - b, 0).abs().max())
                difference /= max(float(torch.where(finite, a, 0).abs().max()), 1e-300)
            else:
                difference = float((a != b).double().mean())
            if math.isnan(difference):
                return float("nan")
            largest = max(largest, difference)
    return largest


def power(masked: list[torch.Tensor], dense: list[torch.Tensor]) -> float:
    """Return the largest difference of two runs relative to the largest value of both runs, over all outputs.

    The result is from 0 to 2. Two entries differ by 1 if only one of them is finite, and are equal if neither is.
    """
    largest = 0.0
    for a, b in ((_without_limits(a), _without_limits(b)) for a, b in zip(masked, dense, strict=True)):
        if not a.numel():
            continue
        if not (a.is_floating_point() or a.is_complex()):
            largest = max(largest, float((a != b).double().mean()))
            continue
        finite = a.isfinite() & b.isfinite()
        scale = max(float(torch.where(finite, value, 0).abs().max()) for value in (a, b))
        difference = float(torch.where(finite, a - b, 0).abs().max()) / scale if scale else 0.0
        largest = max(largest, difference, float((a.isfinite() != b.isfinite()).any()))
    return largest
