"""Choose the adapter for two shapes, and check shapes. The batch is the first axis; channels come before positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from kirsch.errors import ShapeError

Shape: TypeAlias = Sequence[int]
"""Shape of one value, with the batch first, such as a torch.Size."""

MAP, TOKENS, VECTOR = len("NCHW"), len("NLD"), len("ND")


def choose_adapter(student: Shape, teacher: Shape, *, widths: str = "same", takes: str | None = None) -> str | None:
    """Return the name of the adapter that makes two shapes comparable, or None if no adapter is needed.

    Args:
        student, teacher: shapes; the first axis, the batch, is ignored.
        widths: "any" if the loss accepts different widths of student and teacher, else "same".
        takes: kind of values that the loss compares, such as "maps", "features" or "attention"; None if it is unknown.

    Raises:
        ShapeError: no adapter supports these shapes.
    """
    shape_s, shape_t = tuple(student[1:]), tuple(teacher[1:])
    ranks = len(student), len(teacher)
    if shape_s == shape_t or (widths == "any" and (ranks[0] == ranks[1] or takes == "features")):
        return None
    if takes == "attention":
        raise ShapeError(
            f"The student's attention has {shape_s[0]} heads, the teacher's attention has {shape_t[0]}."
            if ranks == (MAP, MAP) and shape_s[1:] == shape_t[1:]
            else f"The student's attention has shape {tuple(student)}, the teacher's {tuple(teacher)}.",
            "An adapter that mixes heads would not return attention weights.",
            'Build the student with as many heads, or use the loss "minilm", which compares relations of positions.',
        )
    if ranks == (MAP, MAP):
        return "conv"
    if ranks[0] == ranks[1] and ranks[0] >= VECTOR and shape_s[:-1] == shape_t[:-1]:
        return "linear"
    if ranks == (TOKENS, MAP) and shape_s[0] - shape_t[1] * shape_t[2] in (0, 1):
        return "tokens-to-map"
    if ranks == (MAP, TOKENS) and shape_t[0] - shape_s[1] * shape_s[2] in (0, 1):
        return "map-to-tokens"
    raise ShapeError(
        f"No adapter fits the student's value of shape {tuple(student)} and the teacher's of shape {tuple(teacher)}.",
        _reason(shape_s, shape_t, ranks),
        "Choose other layers, or a specific adapter.",
    )


def _reason(shape_s: tuple[int, ...], shape_t: tuple[int, ...], ranks: tuple[int, int]) -> str:
    if set(ranks) == {MAP, TOKENS}:
        length, size = (shape_s[0], shape_t[1:]) if ranks[0] == TOKENS else (shape_t[0], shape_s[1:])
        return (
            f"A map of {size[0]} × {size[1]} has {size[0] * size[1]} positions, and there are {length} tokens, of "
            "which one may be a class token."
        )
    if ranks == (TOKENS, TOKENS):
        return f"The student has {shape_s[0]} tokens, the teacher {shape_t[0]}."
    return "The values are of different kinds, such as maps and vectors."


def map_size(shape: Shape, role: str, adapter: str) -> tuple[int, int, int]:
    """Return channels, height and width of feature maps (N, C, H, W).

    Raises:
        ShapeError: the shape has another number of axes.
    """
    _check_rank(shape, "NCHW", role, adapter)
    return shape[1], shape[2], shape[3]


def token_size(shape: Shape, role: str, adapter: str) -> tuple[int, int]:
    """Return length and width of tokens (N, L, D).

    Raises:
        ShapeError: the shape has another number of axes.
    """
    _check_rank(shape, "NLD", role, adapter)
    return shape[1], shape[2]


def _check_rank(shape: Shape, axes: str, role: str, adapter: str) -> None:
    if len(shape) != len(axes):
        raise ShapeError(
            f"The {role}'s value has shape {tuple(shape)}; ({', '.join(axes)}) is needed.",
            f"The adapter {adapter!r} takes only values of this kind.",
            "Choose another adapter, or another layer.",
        )


def infer_prefix(length: int, size: tuple[int, int], prefix: int | None = None) -> int:
    """Return the number of tokens at the start that are not positions of the map.

    Raises:
        ShapeError: the number of tokens is not the number of positions plus the prefix.
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


def width_of(shape: Shape) -> int:
    """Return the number of channels of maps, or the size of the last axis of tokens and vectors.

    Raises:
        ShapeError: the value is neither maps, tokens nor vectors.
    """
    if len(shape) not in (2, 3, 4):
        raise ShapeError(f"A value has shape {tuple(shape)}; (N, D), (N, L, D) or (N, C, H, W) is needed.")
    return shape[1] if len(shape) == len("NCHW") else shape[-1]
