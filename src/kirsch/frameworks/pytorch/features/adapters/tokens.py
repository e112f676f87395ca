"""Adapters of tokens and of vectors, also where the other side has maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from kirsch.errors import ShapeError
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, Adapter, Shape, map_of, tokens_of

if TYPE_CHECKING:
    from torch import Tensor


@ADAPTERS.register("linear")
class Linear(Adapter):
    """Brings the student's last axis to the width of the teacher's.

    Args:
        student, teacher: shape (N, ..., D), of two or more axes that agree but for the last.
        bias: an offset is learned, too.

    Raises:
        ShapeError: the axes before the last differ.

    Source: Jiao et al. 2020, arXiv:1909.10351, equation 8, which has no bias; TinyBERT's code has one.
    """

    def __init__(self, student: Shape, teacher: Shape, *, bias: bool = True) -> None:
        super().__init__()
        if len(student) < len("ND") or tuple(student[1:-1]) != tuple(teacher[1:-1]) or len(student) != len(teacher):
            raise ShapeError(
                f"The student's value has shape {tuple(student)}, the teacher's {tuple(teacher)}.",
                "The adapter 'linear' joins the last axis alone.",
                "Choose layers with as many positions.",
            )
        self.linear = nn.Linear(student[-1], teacher[-1], bias=bias)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Values of the teacher's width, and the teacher's."""
        return self.linear(self.taken(student)), teacher


@ADAPTERS.register("tokens-to-map")
class TokensToMap(Adapter):
    """Lays the student's tokens out as the teacher's map, row by row, and brings them to its channels.

    Args:
        student: shape (N, L, D), L = H W, or more where tokens that are no place come first.
        teacher: shape (N, C, H, W).
        prefix: how many tokens are no place, such as a class token; they are left out. 0 or 1 is found by itself.

    Raises:
        ShapeError: there are not as many tokens as places.
    """

    def __init__(self, student: Shape, teacher: Shape, *, prefix: int | None = None) -> None:
        super().__init__()
        length, width = tokens_of(student, "student", "tokens-to-map")
        channels, *size = map_of(teacher, "teacher", "tokens-to-map")
        self.prefix = prefix_of(length, (size[0], size[1]), prefix)
        self.linear = nn.Linear(width, channels)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """A map like the teacher's, and the teacher's."""
        tokens = self.linear(self.taken(student[:, self.prefix :]))  # (N, H W, C)
        return tokens.transpose(1, 2).unflatten(2, teacher.shape[2:]), teacher


@ADAPTERS.register("map-to-tokens")
class MapToTokens(Adapter):
    """Reads the student's map out as tokens, row by row, and brings them to the width of the teacher's.

    Args:
        student: shape (N, C, H, W).
        teacher: shape (N, L, D), L = H W, or more where tokens that are no place come first.
        prefix: how many tokens are no place, such as a class token; they are left out. 0 or 1 is found by itself.

    Raises:
        ShapeError: there are not as many tokens as places.
    """

    def __init__(self, student: Shape, teacher: Shape, *, prefix: int | None = None) -> None:
        super().__init__()
        channels, *size = map_of(student, "student", "map-to-tokens")
        length, width = tokens_of(teacher, "teacher", "map-to-tokens")
        self.prefix = prefix_of(length, (size[0], size[1]), prefix)
        self.linear = nn.Linear(channels, width)

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Tokens (N, H W, D) of both."""
        return self.linear(self.taken(student).flatten(2).transpose(1, 2)), teacher[:, self.prefix :]


def prefix_of(length: int, size: tuple[int, int], prefix: int | None = None) -> int:
    """How many of the first tokens are no place of a map.

    Raises:
        ShapeError: the others are not as many as there are places.
    """
    places = size[0] * size[1]
    extra = length - places
    if extra not in ((0, 1) if prefix is None else (prefix,)):
        besides = "at most one class token" if prefix is None else f"a prefix of {prefix}"
        raise ShapeError(
            f"There are {length} tokens, and {places} places of a map of {size[0]} × {size[1]}.",
            f"Tokens and places must be as many, besides {besides}.",
            "Choose another layer, or say how many tokens come first by `prefix`.",
        )
    return extra
