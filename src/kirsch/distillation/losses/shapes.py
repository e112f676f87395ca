"""Checks of the shapes that losses compare."""

from __future__ import annotations

from typing import Any

from kirsch.errors import ShapeError


def check_same_shape(student: Any, teacher: Any, noun: str = "logits") -> None:
    """Raise a ShapeError that names both shapes if they differ.

    Args:
        student, teacher: arrays.
        noun: plural name of the arrays, for the message.
    """
    if tuple(student.shape) != tuple(teacher.shape):
        classes = " for the same classes." if noun == "logits" else ", of the same size."
        raise ShapeError(
            f"The student's {noun} have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}.",
            f"They must be {noun} of the same samples{classes}",
        )


def check_same_samples(student: Any, teacher: Any, noun: str = "features") -> None:
    """Raise a ShapeError that names both numbers of samples if they differ."""
    if student.shape[0] != teacher.shape[0]:
        raise ShapeError(
            f"The student's {noun} have {student.shape[0]} samples, the teacher's {teacher.shape[0]}.",
            "They must be of the same samples.",
        )


def check_maps(student: Any, teacher: Any) -> None:
    """Raise a ShapeError unless both are feature maps (N, C, H, W) of the same samples."""
    for role, maps in (("student", student), ("teacher", teacher)):
        if len(maps.shape) != len("NCHW"):
            raise ShapeError(
                f"The {role}'s maps have shape {tuple(maps.shape)}; (N, C, H, W) is needed.",
                fix="Choose the output of a convolution, or a loss that takes features or tokens.",
            )
    check_same_samples(student, teacher, "maps")
