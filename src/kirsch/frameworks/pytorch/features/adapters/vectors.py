"""Adapters that make one vector a sample: embeddings, and scores of a stage."""

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
"""Height and width to which a stage is brought before it is averaged: those of the last stage of most networks."""


class Embedding(nn.Module):
    """One vector a sample, by a linear layer.

    Args:
        shape: (N, D), (N, L, D) or (N, C, H, W).
        size: width of the vector.
        pool: tokens and maps are averaged over their places before; flattened otherwise.
        normalize: to length 1.
    """

    def __init__(self, shape: Shape, size: int, *, pool: bool, normalize: bool) -> None:
        super().__init__()
        if size < 1:
            raise UsageError(f"The size of an embedding is {size}; at least 1 is needed.")
        self.pool, self.normalize = pool, normalize
        self.linear = nn.Linear(width_of(shape) if pool else math.prod(shape[1:]), size)

    def forward(self, values: Tensor) -> Tensor:
        """Shape (N, size)."""
        vectors = self.linear(averaged(values) if self.pool else values.flatten(1))
        return functional.normalize(vectors, dim=-1) if self.normalize else vectors


def width_of(shape: Shape) -> int:
    """Channels of a map, the last axis of tokens and vectors.

    Raises:
        ShapeError: it is neither.
    """
    if len(shape) not in (2, 3, 4):
        raise ShapeError(f"A value has shape {tuple(shape)}; (N, D), (N, L, D) or (N, C, H, W) is needed.")
    return shape[1] if len(shape) == len("NCHW") else shape[-1]


def averaged(values: Tensor) -> Tensor:
    """Maps and tokens averaged over their places, (N, D); vectors as they are."""
    if values.ndim == len("NCHW"):
        return values.mean((2, 3))
    return values.mean(1) if values.ndim == len("NLD") else values


@ADAPTERS.register("embed")
class Embed(Adapter):
    """Embeddings of both values, each by a linear layer; losses that are `learned` reach also the teacher's layer.

    Args:
        student, teacher: shape (N, D), (N, L, D) or (N, C, H, W).
        size: width of the embeddings.
        pool: tokens and maps are averaged over their places; flattened otherwise.
        normalize: to length 1, as CRD does, and CC does not.

    Source: Peng et al. 2019, arXiv:1904.01802, and Tian et al. 2020, arXiv:1910.10699; width 128 in both.
    """

    def __init__(
        self, student: Shape, teacher: Shape, *, size: int = 128, pool: bool = True, normalize: bool = False
    ) -> None:
        super().__init__()
        self.student = Embedding(student, size, pool=pool, normalize=normalize)
        self.teacher = Embedding(teacher, size, pool=pool, normalize=normalize)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Embeddings (N, size) of both."""
        return self.student(self.taken(student)), self.teacher(self.taken(teacher.detach()))


@ADAPTERS.register("ofa")
class Projector(Adapter):
    """Scores from a stage of the student, to be held against the teacher's scores.

    A map is halved by pairs of separable convolutions until no side is above 7, which is how often a network of four
    stages on images of 224 × 224 still halves it; then it is averaged. Tokens are averaged.

    Args:
        student: shape (N, C, H, W), (N, L, D) or (N, D).
        teacher: its scores, shape (N, K).
        classes: K; those of the teacher if left out.
        width: channels at the end of the convolutions; twice as many for each halving if left out.

    Raises:
        ShapeError: the teacher's value is none of K scores.
        UsageError: a width is given where nothing is halved.

    Source: Hao et al. 2023, arXiv:2310.19444, which gives tokens transformer blocks, and takes for `width` the larger
        of the last widths of student and teacher.
    """

    def __init__(self, student: Shape, teacher: Shape, *, classes: int | None = None, width: int | None = None) -> None:
        super().__init__()
        classes = classes if classes is not None else teacher[-1]
        if len(teacher) != len("NK") or teacher[-1] != classes:
            raise ShapeError(
                f"The teacher's value has shape {tuple(teacher)}; (N, {classes}) is needed.",
                "The adapter 'ofa' makes scores of the student's stage.",
                "Capture the teacher's scores.",
            )
        channels = width_of(student)
        halvings = 0
        if len(student) == len("NCHW"):
            halvings = max(0, math.ceil(math.log2(max(student[2:]) / SMALLEST_SIDE)))
        widths = [channels << number for number in range(halvings + 1)]
        if width is not None:
            if not halvings:
                raise UsageError(
                    f"A stage of shape {tuple(student)} is not halved, so there is no 'width' to choose.",
                    fix="Leave it out.",
                )
            widths[-1] = width
        self.halve = nn.Sequential(*(_separable(*pair) for pair in pairwise(widths)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Scores (N, K) of both."""
        return self.head(averaged(self.halve(self.taken(student)))), teacher


def _separable(before: int, after: int) -> nn.Sequential:
    """Half the height and width: two depthwise convolutions, the first with stride 2, each with one of 1 × 1."""
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
