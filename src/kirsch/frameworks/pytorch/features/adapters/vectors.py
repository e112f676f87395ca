"""Adapters that compute one vector for each sample: embeddings, and logits from a stage."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional

from kirsch.errors import ShapeError, UsageError
from kirsch.frameworks.adapters.shapes import Shape, width_of
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SIDE = 7
"""Height and width to which a stage is reduced before averaging, as in the last stage of most networks."""


class Embedding(nn.Module):
    """Linear layer that computes one vector for each sample.

    Args:
        shape: (N, D), (N, L, D) or (N, C, H, W).
        size: width of the vector.
        pool: average tokens and maps over their positions first; else they are flattened.
        normalize: scale the vector to norm 1.
    """

    def __init__(self, shape: Shape, size: int, *, pool: bool, normalize: bool) -> None:
        super().__init__()
        self.pool, self.normalize = pool, normalize
        self.linear = nn.Linear(width_of(shape) if pool else math.prod(shape[1:]), size)

    def forward(self, values: Tensor) -> Tensor:
        """Return vectors, shape (N, size)."""
        vectors = self.linear(average_positions(values) if self.pool else values.flatten(1))
        return functional.normalize(vectors, dim=-1) if self.normalize else vectors


def average_positions(values: Tensor) -> Tensor:
    """Average maps and tokens over their positions, (N, D); return vectors unchanged."""
    if values.ndim == len("NCHW"):
        return values.mean((2, 3))
    return values.mean(1) if values.ndim == len("NLD") else values


@ADAPTERS.register("embed")
class Embed(Adapter):
    """The adapter "embed": an embedding of each value by a linear layer.

    Args:
        student, teacher: shape (N, D), (N, L, D) or (N, C, H, W).
        options: see `EmbedOptions`.
    """

    def __init__(self, student: Shape, teacher: Shape, *, size: int, pool: bool, normalize: bool) -> None:
        super().__init__()
        self.student = Embedding(student, size, pool=pool, normalize=normalize)
        self.teacher = Embedding(teacher, size, pool=pool, normalize=normalize)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the embeddings (N, size) of student and teacher."""
        return self.student(self.cast(student)), self.teacher(self.cast(teacher.detach()))


@ADAPTERS.register("ofa")
class Projector(Adapter):
    """The adapter "ofa": logits from a stage of the student.

    Args:
        student: shape (N, C, H, W), (N, L, D) or (N, D).
        teacher: logits, shape (N, K).
        options: see `ProjectorOptions`.

    Raises:
        ShapeError: the teacher's value is not (N, K).
        UsageError: `width` is set, but the stage is not halved.
    """

    def __init__(self, student: Shape, teacher: Shape, *, classes: int | None, width: int | None) -> None:
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
        """Return the logits (N, K) of student and teacher."""
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
