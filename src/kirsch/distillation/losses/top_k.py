"""Soft targets from the k most probable classes of a teacher, computed in the step or read from a store."""

from __future__ import annotations

import math
from typing import Any

from kirsch import ops
from kirsch.distillation.losses.logits import check_temperature
from kirsch.distillation.losses.loss import check_integer, check_same_shape, loss
from kirsch.errors import DataError, ShapeError, UnknownNameError


@loss("top-k")
def top_k(
    student: Any, teacher: Any, *, k: int = 128, tail: str = "bucket", temperature: float = 1.0, mask: Any = None
) -> Any:
    """Return the soft-target loss of the teacher's k most probable classes and a tail, times temperature².

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating; no gradient reaches the teacher.
        k: >= 1; with k >= K there is no tail, and the loss equals `kd`.
        tail: treatment of the other classes, a key of `TAILS`:

            - "bucket": the other classes form one class, whose probability is their sum. The loss is never above the
              divergence over all K classes. It is 0 only if student and teacher have equal probabilities for the k
              classes and equal sums over the other classes.
            - "zero": the teacher's probabilities of the other classes become 0; its k probabilities are divided by
              their sum.
            - "renormalized": as "zero", but also for the student, so the loss does not depend on the student's
              probabilities of the other classes.
            - "uniform": the sum of the teacher's probabilities of the other classes is spread evenly over these
              classes.
        temperature: > 0; applied before the k classes are selected.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; 0 if the student's probabilities equal the teacher's after the treatment of
        the tail. A student that equals the teacher has loss 0 with "bucket" and "renormalized", but in general not with
        "zero" and "uniform".

    Raises:
        ShapeError: the shapes differ.
        UsageError: k is not an integer of at least 1, or the temperature is not above 0.
        UnknownNameError: the tail is unknown.
        DataError: the mask is false everywhere.

    Source: Values of `tail`: "bucket" puts all other classes into one, as TRL does with a teacher server, and
        DistillKit with stored logits (named "symmetric uniform" there). "zero" is a loss of DistillKit, "renormalized"
        of NVIDIA's Model Optimizer for Megatron. "uniform" is the loss of Wu et al. 2022 (TinyViT), arXiv:2207.10666,
        minus the entropy of the targets; k is 10 for ImageNet-1k, 100 for ImageNet-22k.
    """
    check_temperature(temperature)
    check_same_shape(student, teacher)
    check_integer(1, k=k)
    log_t = ops.log_softmax(ops.zero_masked(teacher, mask) / temperature)
    log_p, columns = ops.top_k(log_t, min(k, log_t.shape[-1]))
    log_tail = None
    if k < log_t.shape[-1]:
        log_tail = ops.logsumexp(log_t, mask=~_multi_hot_mask(columns, log_t))[..., 0]
    log_s = ops.log_softmax(ops.zero_masked(student, mask) / temperature)
    divergence = _divergence(log_s, columns, log_p, log_tail, tail)
    return ops.masked_mean(divergence, mask) * temperature**2


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
    """Return the soft-target loss, times temperature², from the stored k most probable classes of a teacher.

    Args:
        student: logits, shape (N, K) or (N, L, K), floating.
        indices: classes, shape (N, k) or (N, L, k), integers without repetition in a row.
        log_probabilities: log-probabilities of these classes, same shape.
        log_tail: logarithm of the sum of all other probabilities, shape (N,) or (N, L); minus infinity if there are
            none.
        tail: see `top_k`.
        temperature: > 0, for student and teacher.
        stored_temperature: > 0, the temperature at which the teacher's logits were stored. If it differs from
            `temperature`, the stored probabilities are softened again with the tail as a single class, as DistillKit
            does. This is an approximation: the loss is then above 0 even if the student equals the teacher.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar in nats, >= 0 up to rounding; equal to `top_k` if `temperature` is `stored_temperature`.

    Raises:
        ShapeError: the shapes do not match.
        UsageError: a temperature is not above 0.
        UnknownNameError: the tail is unknown.
        DataError: a class is out of range or repeated in a row, or the mask is false everywhere.

    Source: as for `top_k`.
    """
    check_temperature(temperature)
    check_temperature(stored_temperature)
    if tuple(indices.shape) != tuple(log_probabilities.shape) or not (
        tuple(indices.shape[:-1]) == tuple(log_tail.shape) == tuple(student.shape[:-1])
    ):
        raise ShapeError(
            f"The stored indices have shape {tuple(indices.shape)}, the log-probabilities "
            f"{tuple(log_probabilities.shape)}, the tails {tuple(log_tail.shape)}; the student's logits have shape "
            f"{tuple(student.shape)}.",
            "Indices and log-probabilities must have the same shape, and all four arrays the same leading axes: (N,) "
            "or (N, L).",
        )
    student, log_p, log_tail = (
        ops.upcast(student),
        ops.detach(ops.upcast(log_probabilities)),
        ops.detach(ops.upcast(log_tail)),
    )
    with ops.without_autocast(student):
        indices = ops.cast(indices, "int64")  # 8 bits cannot be compared with 1000 classes
        _check_classes(indices, student.shape[-1], mask)
        indices, log_p, log_tail = (ops.zero_masked(array, mask) for array in (indices, log_p, log_tail))
        log_p, log_tail = ops.cast_like(log_p, student), ops.cast_like(log_tail, student)
        if temperature != stored_temperature:
            log_p, log_tail = _resoften(log_p, log_tail, stored_temperature / temperature)
        log_s = ops.log_softmax(ops.zero_masked(student, mask) / temperature)
        return ops.masked_mean(_divergence(log_s, indices, log_p, log_tail, tail), mask) * temperature**2


def _check_classes(indices: Any, classes: int, mask: Any) -> None:
    """Raise a DataError if an unmasked class is out of range or repeated in a row."""
    if mask is not None:
        ops.check_mask_shape(mask, indices.shape[:-1])
        ops.check_mask_is_true_somewhere(mask)
    wrong = ops.zero_masked((indices < 0) | (indices >= classes), mask)
    ordered = ops.sort(indices)
    repeated = ops.zero_masked(ordered[..., 1:] == ordered[..., :-1], mask)

    def first(values: Any, condition: Any) -> int:
        return int(ops.convert_to_numpy(values)[ops.convert_to_numpy(condition)][0])

    ops.raise_if(
        wrong,
        lambda: DataError(
            f"The store contains class {first(indices, wrong)}.",
            f"The student has {classes} classes, numbered from 0 to {classes - 1}.",
            "Check that the store belongs to a teacher with the same classes, and that its indices have enough bits.",
        ),
    )
    ops.raise_if(
        repeated,
        lambda: DataError(
            f"The store contains class {first(ordered[..., 1:], repeated)} twice for one sample.",
            "Its probability would count twice.",
            "Rebuild the store.",
        ),
    )


def _multi_hot_mask(columns: Any, like: Any) -> Any:
    """Return booleans with the shape of `like`, (..., K), that are true at the class numbers `columns`, (..., k)."""
    return ops.multi_hot(columns, like.shape[-1], "bool")


def _resoften(log_p: Any, log_tail: Any, power: float) -> tuple[Any, Any]:
    """Raise the stored probabilities and the tail to a power, and divide them by their new sum."""
    log_p, log_tail = power * log_p, power * log_tail
    total = ops.logaddexp(ops.logsumexp(log_p)[..., 0], log_tail)
    return log_p - total[..., None], log_tail - total


def _divergence(log_s: Any, columns: Any, log_p: Any, log_tail: Any, tail: str) -> Any:
    """Return the divergence of each sample; log_tail is None or minus infinity if there is no tail."""
    if tail not in TAILS:
        raise UnknownNameError("tail", tail, TAILS)
    return TAILS[tail](log_s, columns, log_p, log_tail)


def _renormalized(log_s: Any, columns: Any, log_p: Any, _: Any) -> Any:
    log_q = ops.take_along_axis(log_s, columns)
    return ops.sum(ops.kl_terms(log_p - ops.logsumexp(log_p), log_q - ops.logsumexp(log_q)), -1)


def _zero(log_s: Any, columns: Any, log_p: Any, _: Any) -> Any:
    return ops.sum(ops.kl_terms(log_p - ops.logsumexp(log_p), ops.take_along_axis(log_s, columns)), -1)


def _bucket(log_s: Any, columns: Any, log_p: Any, log_tail: Any) -> Any:
    top = ops.sum(ops.kl_terms(log_p, ops.take_along_axis(log_s, columns)), -1)
    if columns.shape[-1] == log_s.shape[-1]:
        return top
    return top + ops.kl_terms(log_tail, ops.logsumexp(log_s, mask=~_multi_hot_mask(columns, log_s))[..., 0])


def _uniform(log_s: Any, columns: Any, log_p: Any, log_tail: Any) -> Any:
    top = ops.sum(ops.kl_terms(log_p, ops.take_along_axis(log_s, columns)), -1)
    count = log_s.shape[-1] - columns.shape[-1]
    if count == 0:
        return top
    log_tail_s = ops.where(_multi_hot_mask(columns, log_s), ops.zeros_like(log_s), log_s)
    return top + ops.kl_terms(log_tail, ops.sum(log_tail_s, axis=-1) / count + math.log(count))


TAILS = {"bucket": _bucket, "zero": _zero, "renormalized": _renormalized, "uniform": _uniform}
"""Treatments of the classes beyond the k most probable; see `top_k`."""
