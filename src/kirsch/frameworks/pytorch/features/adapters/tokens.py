"""Adapters of tokens and vectors, also between tokens and feature maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from kirsch.errors import ShapeError
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter, Shape, map_size, token_size

if TYPE_CHECKING:
    from torch import Tensor


@ADAPTERS.register("linear")
class Linear(Adapter):
    """Converts the last axis of the student's value to the teacher's width by a linear layer.

    Args:
        student, teacher: shape (N, ..., D), with at least two axes, which agree except for the last.
        bias: add a bias.

    Raises:
        ShapeError: the axes before the last differ.

    Source: Jiao et al. 2020, arXiv:1909.10351, equation 8, which has no bias; TinyBERT's code has one.
    """

    def __init__(self, student: Shape, teacher: Shape, *, bias: bool = True) -> None:
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
    """Arranges the student's tokens as maps, row by row, and converts them to the teacher's channels.

    Args:
        student: shape (N, L, D), L = H W + prefix.
        teacher: shape (N, C, H, W).
        prefix: number of tokens at the start that are not positions of the map, such as a class token; they are left
            out. By default 0 or 1, by the shapes.

    Raises:
        ShapeError: the number of tokens is not that of positions plus the prefix.
    """

    def __init__(self, student: Shape, teacher: Shape, *, prefix: int | None = None) -> None:
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
    """Flattens the student's maps to tokens, row by row, and converts them to the teacher's width.

    Args:
        student: shape (N, C, H, W).
        teacher: shape (N, L, D), L = H W + prefix.
        prefix: number of tokens at the start that are not positions of the map, such as a class token; they are left
            out. By default 0 or 1, by the shapes.

    Raises:
        ShapeError: the number of tokens is not that of positions plus the prefix.
    """

    def __init__(self, student: Shape, teacher: Shape, *, prefix: int | None = None) -> None:
        super().__init__()
        channels, *size = map_size(student, "student", "map-to-tokens")
        length, width = token_size(teacher, "teacher", "map-to-tokens")
        self.prefix = infer_prefix(length, (size[0], size[1]), prefix)
        self.linear = nn.Linear(channels, width)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the tokens (N, H W, D) of both."""
        return self.linear(self.cast(student).flatten(2).transpose(1, 2)), teacher[:, self.prefix :]


def infer_prefix(length: int, size: tuple[int, int], prefix: int | None = None) -> int:
    """Return the number of tokens at the start that are not positions of the map.

    Raises:
        ShapeError: the number of tokens is not that of positions plus the prefix.
    """
    positions = size[0] * size[1]
    extra = length - positions
    if extra not in ((0, 1) if prefix is None else (prefix,)):
        allowed = "at most one class token" if prefix is None else f"a prefix of {prefix}"
        raise ShapeError(
            f"There are {length} tokens, and a map of {size[0]} × {size[1]} has {positions} positions.",
            f"The numbers must be equal, except for {allowed}.",
            "Choose another layer, or set `prefix` to the number of tokens before the positions.",
        )
    return extra
