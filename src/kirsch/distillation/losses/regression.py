"""Losses on numbers that student and teacher put out, where the teacher may be wrong."""

from __future__ import annotations

import math
from typing import Any

from kirsch.distillation.arrays import blank, mean_over, namespace, same_shape, typed
from kirsch.distillation.losses.loss import loss
from kirsch.errors import ShapeError, UsageError


@loss("bounded-regression", takes="values")
def bounded_regression(student: Any, teacher: Any, *, labels: Any, margin: float = 0.0, mask: Any = None) -> Any:
    """Squared error of the student against the labels, where it is not better than the teacher's by a margin.

    The teacher is no target, since its numbers can be anything: it only says how good is good enough.

    Args:
        student, teacher: numbers, shape (N, D) or (N,), floating; the teacher takes no gradient.
        labels: the true numbers, of the same shape; (N,) and (N, 1) are the same.
        margin: >= 0, in the unit of the squared error: by so much the student is to be better.
        mask: shape (N,), true where a sample counts; None counts all.

    Returns:
        Scalar, >= 0: 0 when the student's squared error, summed over numbers, plus the margin is at most the teacher's
        in each sample; so, for margin 0, when it equals the teacher. It jumps there: samples that are charged, are
        charged in full.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the margin is below 0.
        DataError: the mask is false everywhere.

    Source: Chen et al. 2017, "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS, section
        3.3 (teacher bounded regression loss).
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise UsageError(f"The margin is {margin}; a number of at least 0 is needed.")
    xp = namespace(student)
    same_shape(student, teacher, "values")
    if labels.ndim == 1 and student.shape[1:] == (1,):
        labels = labels[:, None]
    if tuple(labels.shape) != tuple(student.shape):
        raise ShapeError(
            f"The labels have shape {tuple(labels.shape)}; the values have shape {tuple(student.shape)}.",
            "One true number for each is needed.",
        )
    truth = typed(blank(labels, mask), student)
    mine, theirs = (((blank(values, mask) - truth) ** 2).sum(-1) for values in (student, teacher))
    return mean_over(xp.where(mine + margin > theirs, mine, xp.zeros_like(mine)), mask)
