"""Losses on the outputs of regression models, where the teacher may be wrong."""

from __future__ import annotations

import math
from typing import Any

from kirsch import ops
from kirsch.distillation.losses.loss import check_same_shape, loss
from kirsch.errors import ShapeError, UsageError


@loss("bounded-regression", takes="values")
def bounded_regression(student: Any, teacher: Any, *, labels: Any, margin: float = 0.0, mask: Any = None) -> Any:
    """Return the student's squared error, or 0 where it is at least `margin` below the teacher's squared error.

    The teacher's outputs are not used as targets, because they are unbounded and may be far from the true values. The
    teacher's error is a bound: a student's error below the bound does not count.

    Args:
        student, teacher: outputs, shape (N, D) or (N,), floating; no gradient reaches the teacher.
        labels: true values, same shape; (N,) and (N, 1) are equivalent.
        margin: >= 0, in the unit of the squared error; how much lower the student's error must be.
        mask: shape (N,), true where a sample counts; None counts all.

    Returns:
        Scalar, >= 0, averaged over samples. A sample adds 0 if the student's squared error, summed over outputs, plus
        the margin is at most the teacher's, and adds the whole squared error otherwise, so the loss is discontinuous.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the margin is below 0.
        DataError: the mask is false everywhere.

    Source: Chen et al. 2017, "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS, section
        3.3 (teacher bounded regression loss).
    """
    if not 0 <= margin < math.inf:
        raise UsageError(f"The margin is {margin}; a number of at least 0 is needed.")
    check_same_shape(student, teacher, "values")
    if len(labels.shape) == 1 and tuple(student.shape[1:]) == (1,):
        labels = labels[:, None]
    if tuple(labels.shape) != tuple(student.shape):
        raise ShapeError(
            f"The labels have shape {tuple(labels.shape)}; the values have shape {tuple(student.shape)}.",
            "One label for each output is needed.",
        )
    truth = ops.cast_like(ops.zero_masked(labels, mask), student)
    error_s, error_t = (ops.sum((ops.zero_masked(values, mask) - truth) ** 2, -1) for values in (student, teacher))
    return ops.masked_mean(ops.where(error_s + margin > error_t, error_s, ops.zeros_like(error_s)), mask)
