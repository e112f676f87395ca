"""Soft targets from the k likeliest classes of a teacher, at hand or from a store."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kirsch.distillation.arrays import (
    blank,
    constant,
    full_precision,
    largest,
    log_softmax,
    log_sum_exp,
    marked,
    mean_over,
    namespace,
    relative,
    rows_that_count,
    same_shape,
    taken,
    typed,
    wide,
)
from kirsch.distillation.losses.logits import check_temperature
from kirsch.distillation.losses.loss import check_whole, loss
from kirsch.errors import DataError, ShapeError, UnknownNameError


@loss("top-k")
def top_k(
    student: Any, teacher: Any, *, k: int = 128, tail: str = "bucket", temperature: float = 1.0, mask: Any = None
) -> Any:
    """Soft targets of the teacher's k likeliest classes, with its other classes as a tail, times temperature².

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating; the teacher takes no gradient.
        k: >= 1; if it is at least K, no class is left over, and this is `kd`.
        tail: what becomes of the classes beyond the k likeliest, a key of `TAILS`:

            - "bucket": they are one class more, with the sum of their probabilities. Never above the divergence of all
              classes, and 0 only where the covered mass agrees, too.
            - "zero": the teacher's probabilities beyond are 0, and the others are divided by their sum.
            - "renormalized": so for the student, too, whose own mass beyond is then never charged.
            - "uniform": the teacher's mass beyond is spread evenly over the classes there.
        temperature: > 0; softens before the k are taken.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 when the student has the probabilities that the tail makes of the
        teacher's. For "bucket" and "renormalized" these are the teacher's own.

    Raises:
        ShapeError: the shapes differ.
        UsageError: k is no whole number of at least 1, or the temperature is not above 0.
        UnknownNameError: there is no such tail.
        DataError: the mask is false everywhere.

    Source: the bucket is that of TRL's and DistillKit's losses from a server or a store (there "symmetric uniform");
        zero is DistillKit's, renormalized that of NVIDIA's Model Optimizer for Megatron. Uniform is Wu et al. 2022
        (TinyViT), arXiv:2207.10666, less the entropy of the targets, with k = 10 for ImageNet-1k, 100 for ImageNet-22k.
    """
    check_temperature(temperature)
    same_shape(student, teacher)
    check_whole(1, k=k)
    log_t = log_softmax(blank(teacher, mask) / temperature)
    columns = largest(log_t, min(k, log_t.shape[-1]))
    log_tail = None
    if k < log_t.shape[-1]:
        log_tail = log_sum_exp(log_t, where=~marked(columns, log_t))[..., 0]
    log_s = log_softmax(blank(student, mask) / temperature)
    return mean_over(_charged(log_s, columns, taken(log_t, columns), log_tail, tail), mask) * temperature**2


def stored_top_k(
    student: Any,
    indices: Any,
    log_probabilities: Any,
    log_tail: Any,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
    stored_temperature: float = 1.0,
    mask: Any = None,
) -> Any:
    """Soft targets of a teacher of which a store holds the k likeliest classes, times temperature².

    Args:
        student: scores, shape (N, K) or (N, L, K), floating.
        indices: classes, shape (N, k) or (N, L, k), whole numbers, each once in a row.
        log_probabilities: of these classes, of the same shape.
        log_tail: logarithm of the sum of all other probabilities, shape (N,) or (N, L); minus infinity where there are
            none.
        tail: as in `top_k`.
        temperature: > 0, of the student and of the record.
        stored_temperature: > 0, of the teacher's scores when they were stored. Where it is another than `temperature`
            the record is softened anew with its tail as a single class, since more is not known of it, as DistillKit
            does; with a tail that weighs something, a student that equals the teacher is then charged a little.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; at the temperature of the store, `top_k` of the scores that were stored.

    Raises:
        ShapeError: the shapes do not fit together.
        UsageError: a temperature is not above 0.
        UnknownNameError: there is no such tail.
        DataError: a class is none of the student's, or twice in a row, or the mask is false everywhere.

    Source: as for `top_k`.
    """
    check_temperature(temperature)
    check_temperature(stored_temperature)
    if tuple(indices.shape) != tuple(log_probabilities.shape) or not (
        tuple(indices.shape[:-1]) == tuple(log_tail.shape) == tuple(student.shape[:-1])
    ):
        raise ShapeError(
            f"The record has indices {tuple(indices.shape)}, log-probabilities {tuple(log_probabilities.shape)} and "
            f"tails {tuple(log_tail.shape)}; the student's scores have shape {tuple(student.shape)}.",
            "They must be of the same samples.",
        )
    student, log_p, log_tail = wide(student), constant(wide(log_probabilities)), constant(wide(log_tail))
    with full_precision(student):
        _check_classes(rows_that_count(indices, mask), student.shape[-1])
        indices, log_p, log_tail = (blank(part, mask) for part in (indices, log_p, log_tail))
        log_p, log_tail = typed(log_p, student), typed(log_tail, student)
        if temperature != stored_temperature:
            log_p, log_tail = _softened(log_p, log_tail, stored_temperature / temperature)
        log_s = log_softmax(blank(student, mask) / temperature)
        return mean_over(_charged(log_s, indices, log_p, log_tail, tail), mask) * temperature**2


def _check_classes(indices: Any, classes: int) -> None:
    lowest, highest = int(indices.min()), int(indices.max())
    if lowest < 0 or highest >= classes:
        raise DataError(
            f"The store names class {lowest if lowest < 0 else highest}.",
            f"The student has {classes} classes, so they go from 0 to {classes - 1}.",
            "Look whether the store is of a teacher with the same classes, and its indices of enough bits.",
        )
    ordered = np.sort(indices, axis=-1) if namespace(indices) is np else indices.long().sort(-1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if bool(twice.any()):
        raise DataError(
            f"The store names class {int(ordered[:, 1:][twice][0])} twice for one sample.",
            "It would count twice.",
            "Build the store anew.",
        )


def _softened(log_p: Any, log_tail: Any, power: float) -> tuple[Any, Any]:
    """The record with each probability, and that of the tail, to a power, divided by their new sum."""
    xp = namespace(log_p)
    log_p, log_tail = power * log_p, power * log_tail
    total = xp.logaddexp(log_sum_exp(log_p)[..., 0], log_tail)
    return log_p - total[..., None], log_tail - total


def _charged(log_s: Any, columns: Any, log_p: Any, log_tail: Any, tail: str) -> Any:
    """The divergence of each sample; log_tail is None, or minus infinity, where no class is left over."""
    if tail not in TAILS:
        raise UnknownNameError("tail", tail, TAILS)
    return TAILS[tail](log_s, columns, log_p, log_tail)


def _renormalized(log_s: Any, columns: Any, log_p: Any, _: Any) -> Any:
    log_q = taken(log_s, columns)
    return relative(log_p - log_sum_exp(log_p), log_q - log_sum_exp(log_q)).sum(-1)


def _zero(log_s: Any, columns: Any, log_p: Any, _: Any) -> Any:
    return relative(log_p - log_sum_exp(log_p), taken(log_s, columns)).sum(-1)


def _bucket(log_s: Any, columns: Any, log_p: Any, log_tail: Any) -> Any:
    kept = relative(log_p, taken(log_s, columns)).sum(-1)
    if columns.shape[-1] == log_s.shape[-1]:
        return kept
    return kept + relative(log_tail, log_sum_exp(log_s, where=~marked(columns, log_s))[..., 0])


def _uniform(log_s: Any, columns: Any, log_p: Any, log_tail: Any) -> Any:
    kept = relative(log_p, taken(log_s, columns)).sum(-1)
    count = log_s.shape[-1] - columns.shape[-1]
    if count == 0:
        return kept
    xp = namespace(log_s)
    beyond = xp.where(marked(columns, log_s), xp.zeros_like(log_s), log_s)
    return kept + relative(log_tail, xp.sum(beyond, axis=-1) / count + math.log(count))


TAILS = {"bucket": _bucket, "zero": _zero, "renormalized": _renormalized, "uniform": _uniform}
"""What becomes of the classes beyond the k likeliest; see `top_k`."""
