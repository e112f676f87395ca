"""Losses that relate the outputs of a batch to each other: samples with samples, and classes with classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch import ops
from kirsch.distillation.losses.logits import check_temperature, soft_target
from kirsch.distillation.losses.loss import check_at_least, check_convention, check_same_shape, loss
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

DENOMINATOR_EPS = {"kirsch": None, "dist-kd": 1e-8, "mmrazor": 1e-8, "ofakd": 1e-8, "torchdistill": None}
"""Constant that a convention of "dist" adds to the product of the norms."""


@loss("dist", relational=True)
def correlated(
    student: Any,
    teacher: Any,
    *,
    inter: float = 1.0,
    intra: float = 1.0,
    temperature: float = 1.0,
    convention: str = "kirsch",
    mask: Any = None,
) -> Any:
    """Return 1 - Pearson correlation of the softened outputs, within each sample and within each class.

    The loss is inter · mean over samples + intra · mean over classes, times temperature². The student need not match
    the teacher's probabilities, only a linear function of them, which is easier with a much stronger teacher.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating; no gradient reaches the teacher. The positions of
            sequences are samples.
        inter, intra: weights of the correlations within samples (over classes) and within classes (over samples).
        temperature: > 0.
        convention: "kirsch" divides by the exact norms, so that classes with tiny probabilities count like others.
            "dist-kd" (the authors' code), "mmrazor" and "ofakd" add 1e-8 to the product of the norms, so that with many
            classes the loss is above 0 even if the student equals the teacher. "torchdistill" clips each norm to at
            least 1e-8.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, from 0 to 2 T² (inter + intra). With "kirsch", it is 0 if the softened outputs agree.
        The correlation counts as 0 where student or teacher is constant, except that with "kirsch" it counts as 1 where
        both are.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0, or a weight is below 0.
        UnknownNameError: the convention is unknown.
        DataError: the mask is false everywhere.

    Source: Huang et al. 2022, arXiv:2205.10536. For ImageNet inter = intra = 1, temperature 1, and weight 2 beside
        the labels.
    """
    check_convention(convention, DENOMINATOR_EPS)
    check_at_least(0, inter=inter, intra=intra)
    p_s, p_t, rows = _softened_outputs(student, teacher, temperature, mask)
    within_samples = 1 - ops.masked_mean(_correlation(p_s, p_t, -1, convention), rows)
    within_classes = 1 - ops.mean(_correlation(p_s, p_t, 0, convention, rows))
    return (inter * within_samples + intra * within_classes) * temperature**2


def _correlation(first: Any, second: Any, axis: int, convention: str, rows: Any = None) -> Any:
    """Return the Pearson correlation of two matrices (N, K) along an axis; `rows`, (N,), is a mask for axis 0."""
    sides = [_centered(array, axis, rows) for array in (first, second)]
    if convention == "torchdistill":
        return ops.sum(ops.normalize(sides[0], axis, 1e-8) * ops.normalize(sides[1], axis, 1e-8), axis=axis)
    eps = DENOMINATOR_EPS[convention]
    if eps is not None:
        norms = ops.safe_sqrt(ops.sum(sides[0] ** 2, axis=axis)) * ops.safe_sqrt(ops.sum(sides[1] ** 2, axis=axis))
        return ops.sum(sides[0] * sides[1], axis=axis) / (norms + eps)
    peaks = [ops.amax(ops.abs(side), axis=axis, keepdims=True) for side in sides]
    is_constant = [
        peak <= 8 * ops.epsilon(array) * ops.amax(ops.abs(array), axis=axis, keepdims=True)
        for peak, array in zip(peaks, (first, second), strict=True)
    ]
    # Dividing by the largest magnitude first keeps the squares of tiny probabilities from underflowing to 0. A centered
    # constant is set to exactly 0, because its rounding errors would correlate.
    scaled = [
        ops.where(constant, 0.0 * side, side / ops.detach(ops.where(constant, ops.ones_like(peak), peak)))
        for side, peak, constant in zip(sides, peaks, is_constant, strict=True)
    ]
    cosine = ops.sum(ops.normalize(scaled[0], axis) * ops.normalize(scaled[1], axis), axis=axis)
    both_constant = ops.all(is_constant[0] & is_constant[1], axis)
    return ops.where(both_constant, ops.ones_like(cosine), cosine)


def _centered(matrix: Any, axis: int, rows: Any) -> Any:
    """Subtract the mean along an axis; a mask (N,) restricts the mean to unmasked rows, and sets masked rows to 0."""
    if rows is None:
        return matrix - ops.mean(matrix, axis=axis, keepdims=True)
    count = ops.cast(ops.count_nonzero(rows), ops.dtype(matrix))  # masked rows of the matrix are 0
    return ops.zero_masked(matrix - ops.sum(matrix, axis=axis, keepdims=True) / count, rows)


@loss("batch-correlation", relational=True)
def batch_correlation(student: Any, teacher: Any, *, temperature: float = 4.0, mask: Any = None) -> Any:
    """Return ‖P_s P_sᵀ - P_t P_tᵀ‖² / N: the squared difference of the inner products of samples' softened outputs.

    There is no factor T², so that the published weights apply. At high T, the loss falls as 1/T⁴, which T² would not
    compensate.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating; no gradient reaches the teacher. The positions of
            sequences are samples.
        temperature: > 0.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0; 0 if the softened outputs agree. The value grows in proportion to N: N² pairs are summed and
        divided by N.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        DataError: the mask is false everywhere.

    Source: Jin, Wang, Lin 2023 (multi-level logit distillation), CVPR, section 3 (batch level), temperature 4.
    """
    p_s, p_t, rows = _softened_outputs(student, teacher, temperature, mask)
    count = p_s.shape[0] if rows is None else ops.cast(ops.count_nonzero(rows), ops.dtype(p_s))
    return ops.sum((p_s @ ops.swapaxes(p_s, 0, 1) - p_t @ ops.swapaxes(p_t, 0, 1)) ** 2) / count


@loss("class-correlation", relational=True)
def class_correlation(student: Any, teacher: Any, *, temperature: float = 4.0, mask: Any = None) -> Any:
    """Return ‖P_sᵀ P_s - P_tᵀ P_t‖² / K: the squared difference of the inner products of classes' softened outputs.

    Args, returns and errors are those of `batch_correlation`.

    The products are summed over samples, so a batch that contains each sample k times has k² times the loss.

    Source: Jin, Wang, Lin 2023 (multi-level logit distillation), CVPR, section 3 (class level), temperature 4.
    """
    p_s, p_t, _ = _softened_outputs(student, teacher, temperature, mask)
    return ops.sum((ops.swapaxes(p_s, 0, 1) @ p_s - ops.swapaxes(p_t, 0, 1) @ p_t) ** 2) / p_s.shape[-1]


@loss("mlkd", relational=True)
def multi_level(
    student: Any,
    teacher: Any,
    *,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    instance: float = 1.0,
    batch: float = 1.0,
    classes: float = 1.0,
    standardize: bool = False,
    mask: Any = None,
) -> Any:
    """Return the sum of `kd`, `batch-correlation` and `class-correlation` over several temperatures.

    With two views of an image (weak and strong augmentation), call the loss once for each view, with the teacher's
    logits of that view. The published code differs in three details, which are not reproduced. First, for the weak
    view, it multiplies the mean loss by a mask of the less confident half of the samples or classes, and averages the
    products. This halves the loss and does not leave out any sample. Second, it computes the terms of the strong view
    at temperatures 2 and 6 from the weak view. Third, it computes the correlations of the strong view, but does not add
    them to the loss.

    Args:
        student, teacher: logits, shape (N, K) or (N, L, K), floating; no gradient reaches the teacher.
        temperatures: each > 0, at least one.
        instance, batch, classes: weights of `kd`, `batch-correlation` and `class-correlation`.
        standardize: see `kd`; it applies to the term `kd` only.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0 up to rounding; 0 if the outputs agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: a temperature is not above 0, `temperatures` is empty, or a weight is below 0.
        DataError: the mask is false everywhere.

    Source: Jin, Wang, Lin 2023 (multi-level logit distillation), CVPR; 480 epochs for CIFAR-100.
    """
    check_at_least(0, instance=instance, batch=batch, classes=classes)
    if not temperatures:
        raise UsageError("`temperatures` is empty.", fix="Pass at least one temperature.")
    losses = [
        instance * soft_target(student, teacher, temperature=temperature, standardize=standardize, mask=mask)
        + batch * batch_correlation(student, teacher, temperature=temperature, mask=mask)
        + classes * class_correlation(student, teacher, temperature=temperature, mask=mask)
        for temperature in temperatures
    ]
    return sum(losses[1:], losses[0])


def _softened_outputs(student: Any, teacher: Any, temperature: float, mask: Any) -> tuple[Any, Any, Any]:
    """Return the softened outputs (N, K) of student and teacher, 0 where masked, and the mask (N,) or None."""
    check_temperature(temperature)
    check_same_shape(student, teacher)
    p_s, p_t = (ops.exp(ops.log_softmax(ops.zero_masked(logits, mask) / temperature)) for logits in (student, teacher))
    if mask is not None:
        ops.check_mask_shape(mask, student.shape[:-1])
        ops.check_mask_is_true_somewhere(mask)
        p_s, p_t, mask = ops.zero_masked(p_s, mask), ops.zero_masked(p_t, mask), ops.reshape(mask != 0, (-1,))
    classes = student.shape[-1]
    return ops.reshape(p_s, (-1, classes)), ops.reshape(p_t, (-1, classes)), mask
