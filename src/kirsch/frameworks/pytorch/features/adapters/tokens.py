"""Adapters of tokens and vectors, also between tokens and feature maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from kirsch.errors import ShapeError
from kirsch.frameworks.adapters.shapes import Shape, infer_prefix, map_size, token_size
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter

if TYPE_CHECKING:
    from torch import Tensor


@ADAPTERS.register("linear")
class Linear(Adapter):
    """The adapter "linear": a linear layer on the last axis of the student's value.

    Args:
        student, teacher: shape (N, ..., D), with at least two axes; all axes except the last must agree.
        options: see `LinearOptions`.

    Raises:
        ShapeError: the axes before the last differ.
    """

    def __init__(self, student: Shape, teacher: Shape, *, bias: bool) -> None:
        super().__init__()
        if len(student) < len("ND") or tuple(student[1:-1]) != tuple(teacher[1:-1]) or len(student) != len(teacher):
            raise ShapeError(
                f"The student's value has shape {tuple(student)}, the teacher's {tuple(teacher)}.",
                "The adapter 'linear' can only change the last axis.",
                "Choose layers with the same number of positions.",
            )
        self.linear = nn.Linear(student[-1], teacher[-1], bias=bias)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the converted value and the teacher's value."""
        return self.linear(self.cast(student)), teacher


@ADAPTERS.register("tokens-to-map")
class TokensToMap(Adapter):
    """The adapter "tokens-to-map": arranges the student's tokens as maps.

    Args:
        student: shape (N, L, D), L = H W + prefix.
        teacher: shape (N, C, H, W).
        options: see `TokensToMapOptions`.

    Raises:
        ShapeError: the number of tokens is not the number of positions plus the prefix.
    """

    def __init__(self, student: Shape, teacher: Shape, *, prefix: int | None) -> None:
        super().__init__()
        length, width = token_size(student, "student", "tokens-to-map")
        channels, *size = map_size(teacher, "teacher", "tokens-to-map")
        self.prefix = infer_prefix(length, (size[0], size[1]), prefix)
        self.linear = nn.Linear(width, channels)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return maps of the teacher's shape, and the teacher's maps."""
        tokens = self.linear(self.cast(student[:, self.prefix :]))  # (N, H W, C)
        return tokens.transpose(1, 2).unflatten(2, teacher.shape[2:]), teacher


@ADAPTERS.register("map-to-tokens")
class MapToTokens(Adapter):
    """The adapter "map-to-tokens": flattens the student's maps to tokens.

    Args:
        student: shape (N, C, H, W).
        teacher: shape (N, L, D), L = H W + prefix.
        options: see `MapToTokensOptions`.

    Raises:
        ShapeError: the number of tokens is not the number of positions plus the prefix.
    """

    def __init__(self, student: Shape, teacher: Shape, *, prefix: int | None) -> None:
        super().__init__()
        channels, *size = map_size(student, "student", "map-to-tokens")
        length, width = token_size(teacher, "teacher", "map-to-tokens")
        self.prefix = infer_prefix(length, (size[0], size[1]), prefix)
        self.linear = nn.Linear(channels, width)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the tokens (N, H W, D) of student and teacher."""
        return self.linear(self.cast(student).flatten(2).transpose(1, 2)), teacher[:, self.prefix :]
