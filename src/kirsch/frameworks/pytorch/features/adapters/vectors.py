"""Adapters that compute one vector a sample: embeddings, and logits from a stage."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional

from kirsch.errors import ShapeError, UsageError
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter, Shape

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SIDE = 7
"""Height and width to which a stage is reduced before averaging, as in the last stage of most networks."""


class Embedding(nn.Module):
    """Linear layer that computes one vector a sample.

    Args:
        shape: (N, D), (N, L, D) or (N, C, H, W).
        size: width of the vector.
        pool: average tokens and maps over their positions first; else they are flattened.
        normalize: scale the vector to norm 1.
    """

    def __init__(self, shape: Shape, size: int, *, pool: bool, normalize: bool) -> None:
        super().__init__()
        if size < 1:
            raise UsageError(f"`size` of an embedding is {size}; at least 1 is needed.")
        self.pool, self.normalize = pool, normalize
        self.linear = nn.Linear(width_of(shape) if pool else math.prod(shape[1:]), size)

    def forward(self, values: Tensor) -> Tensor:
        """Return vectors, shape (N, size)."""
        vectors = self.linear(average_positions(values) if self.pool else values.flatten(1))
        return functional.normalize(vectors, dim=-1) if self.normalize else vectors


def width_of(shape: Shape) -> int:
    """Return the channels of maps, or the last axis of tokens and vectors.

    Raises:
        ShapeError: the shape is none of these.
    """
    if len(shape) not in (2, 3, 4):
        raise ShapeError(f"A value has shape {tuple(shape)}; (N, D), (N, L, D) or (N, C, H, W) is needed.")
    return shape[1] if len(shape) == len("NCHW") else shape[-1]


def average_positions(values: Tensor) -> Tensor:
    """Average maps and tokens over their positions, (N, D); return vectors unchanged."""
    if values.ndim == len("NCHW"):
        return values.mean((2, 3))
    return values.mean(1) if values.ndim == len("NLD") else values


@ADAPTERS.register("embed")
class Embed(Adapter):
    """Computes an embedding of each value by a linear layer. Losses with `learned=True` also train the teacher's layer.

    Args:
        student, teacher: shape (N, D), (N, L, D) or (N, C, H, W).
        size: width of the embeddings.
        pool: average tokens and maps over their positions; else they are flattened.
        normalize: scale embeddings to norm 1, as CRD does and CC does not.

    Source: Peng et al. 2019, arXiv:1904.01802, and Tian et al. 2020, arXiv:1910.10699; width 128 in both.
    """

    def __init__(
        self, student: Shape, teacher: Shape, *, size: int = 128, pool: bool = True, normalize: bool = False
    ) -> None:
        super().__init__()
        self.student = Embedding(student, size, pool=pool, normalize=normalize)
        self.teacher = Embedding(teacher, size, pool=pool, normalize=normalize)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the embeddings (N, size) of both."""
        return self.student(self.cast(student)), self.teacher(self.cast(teacher.detach()))


@ADAPTERS.register("ofa")
class Projector(Adapter):
    """Computes logits from a stage of the student, to compare with the teacher's logits.

    The height and width of maps are halved by pairs of separable convolutions until both are at most 7, as the last
    stage of most networks for 224 × 224 images; then the maps are averaged. Tokens are averaged.

    Args:
        student: shape (N, C, H, W), (N, L, D) or (N, D).
        teacher: logits, shape (N, K).
        classes: K; by default that of the teacher.
        width: channels after the last convolution; by default doubled with each halving.

    Raises:
        ShapeError: the teacher's value is not (N, K).
        UsageError: `width` is set, but the stage is not halved.

    Source: Hao et al. 2023, arXiv:2310.19444, which uses transformer blocks for tokens, and as `width` the larger of
        the last widths of student and teacher.
    """

    def __init__(self, student: Shape, teacher: Shape, *, classes: int | None = None, width: int | None = None) -> None:
        super().__init__()
        classes = classes if classes is not None else teacher[-1]
        if len(teacher) != len("NK") or teacher[-1] != classes:
            raise ShapeError(
                f"The teacher's value has shape {tuple(teacher)}; (N, {classes}) is needed.",
                "The adapter 'ofa' computes logits from a stage of the student.",
                "Choose the teacher's logits.",
            )
        channels = width_of(student)
        halvings = 0
        if len(student) == len("NCHW"):
            halvings = max(0, math.ceil(math.log2(max(student[2:]) / SMALLEST_SIDE)))
        widths = [channels << number for number in range(halvings + 1)]
        if width is not None:
            if not halvings:
                raise UsageError(
                    f"The option 'width' has no effect, because a stage of shape {tuple(student)} is not halved.",
                    fix="Remove the option.",
                )
            widths[-1] = width
        self.halve = nn.Sequential(*(_separable(*pair) for pair in pairwise(widths)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the logits (N, K) of both."""
        return self.head(average_positions(self.halve(self.cast(student)))), teacher


def _separable(before: int, after: int) -> nn.Sequential:
    """Return two separable convolutions, the first with stride 2, which halve height and width."""
    return nn.Sequential(
        nn.Conv2d(before, before, 3, stride=2, padding=1, groups=before, bias=False),
        nn.Conv2d(before, before, 1, bias=False),
        nn.BatchNorm2d(before),
        nn.ReLU(),
        nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False),
        nn.Conv2d(before, after, 1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )
