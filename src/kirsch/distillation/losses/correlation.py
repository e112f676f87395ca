"""Losses that relate the outputs of a batch to each other: samples to samples, and classes to classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch.distillation.arrays import constant, log_softmax, namespace, normalized, root, rows_that_count, same_shape
from kirsch.distillation.losses.logits import check_convention, check_temperature, soft_target
from kirsch.distillation.losses.loss import check_at_least, loss
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

FLOORS = {"kirsch": None, "dist-kd": 1e-8, "mmrazor": 1e-8, "ofakd": 1e-8, "torchdistill": None}
"""Convention of "dist" → what is added to the product of lengths."""


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
    """One less Pearson's correlation of the softened outputs, within each sample and within each class.

    inter · mean over samples + intra · mean over classes, times temperature². A student need not match the teacher's
    probabilities, only what is larger and by how much in proportion; so a much stronger teacher can be followed.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating; the teacher takes no gradient. The positions of
            sequences are samples.
        inter, intra: weights of the correlations within samples (of the classes) and within classes (of the samples).
        temperature: > 0.
        convention: "kirsch" divides by the lengths as they are, so that classes of tiny probabilities count like
            others. "dist-kd", the authors' code, "mmrazor" and "ofakd" add 1e-8 to the product of lengths: with many
            classes a student that equals its teacher is then charged for those of tiny probabilities. "torchdistill"
            raises each length to at least 1e-8.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, from 0 to 2 T² (inter + intra); 0 when the softened outputs agree, but for what a convention adds. Where
        one side is constant there is no correlation, and where both are there is nothing to charge.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0, or a weight is below 0.
        UnknownNameError: there is no such convention.
        DataError: the mask is false everywhere.

    Source: Huang et al. 2022, arXiv:2205.10536. Usual for ImageNet are inter = intra = 1, temperature 1, and weight 2
        beside the labels.
    """
    check_convention(convention, FLOORS)
    check_at_least(0, inter=inter, intra=intra)
    p_s, p_t = _outputs(student, teacher, temperature, mask)
    within_samples = 1 - _correlation(p_s, p_t, -1, convention).mean()
    within_classes = 1 - _correlation(p_s, p_t, 0, convention).mean()
    return (inter * within_samples + intra * within_classes) * temperature**2


def _correlation(first: Any, second: Any, axis: int, convention: str) -> Any:
    """Pearson's correlation along an axis of two matrices (N, K)."""
    xp = namespace(first)
    sides = [array - xp.mean(array, axis=axis, keepdims=True) for array in (first, second)]
    if convention == "torchdistill":
        return xp.sum(normalized(sides[0], axis, 1e-8) * normalized(sides[1], axis, 1e-8), axis=axis)
    added = FLOORS[convention]
    if added is not None:
        lengths = root(xp.sum(sides[0] ** 2, axis=axis)) * root(xp.sum(sides[1] ** 2, axis=axis))
        return xp.sum(sides[0] * sides[1], axis=axis) / (lengths + added)
    tops = [xp.amax(xp.abs(side), axis=axis, keepdims=True) for side in sides]
    flat = [
        top <= 8 * xp.finfo(array.dtype).eps * xp.amax(xp.abs(array), axis=axis, keepdims=True)
        for top, array in zip(tops, (first, second), strict=True)
    ]
    # Divided by the largest first: the squares of tiny probabilities would be 0. What rounding leaves of a constant is.
    scaled = [
        xp.where(still, 0.0 * side, side / constant(xp.where(still, xp.ones_like(top), top)))
        for side, top, still in zip(sides, tops, flat, strict=True)
    ]
    cosine = xp.sum(normalized(scaled[0], axis) * normalized(scaled[1], axis), axis=axis, keepdims=True)
    return xp.where(flat[0] & flat[1], xp.ones_like(cosine), cosine)


@loss("batch-correlation", relational=True)
def batch_correlation(student: Any, teacher: Any, *, temperature: float = 4.0, mask: Any = None) -> Any:
    """How far apart the inner products of samples are: ‖P_s P_sᵀ - P_t P_tᵀ‖² / N, of the softened outputs.

    No temperature² is multiplied with: the products of softened outputs fade faster than with T, and the published
    weights are without.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating; the teacher takes no gradient. The positions of
            sequences are samples.
        temperature: > 0.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0; 0 when the softened outputs agree. For samples without relation it grows with N.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.
        DataError: the mask is false everywhere.

    Source: Jin, Wang, Lin 2023 (multi-level logit distillation), CVPR, section 3 (batch level), temperature 4.
    """
    p_s, p_t = _outputs(student, teacher, temperature, mask)
    return ((p_s @ p_s.T - p_t @ p_t.T) ** 2).sum() / len(p_s)


@loss("class-correlation", relational=True)
def class_correlation(student: Any, teacher: Any, *, temperature: float = 4.0, mask: Any = None) -> Any:
    """How far apart the inner products of classes are: ‖P_sᵀ P_s - P_tᵀ P_t‖² / K, of the softened outputs.

    Args, returns and errors are those of `batch_correlation`; it grows with N² where the batch repeats itself.

    Source: Jin, Wang, Lin 2023 (multi-level logit distillation), CVPR, section 3 (class level), temperature 4.
    """
    p_s, p_t = _outputs(student, teacher, temperature, mask)
    return ((p_s.T @ p_s - p_t.T @ p_t) ** 2).sum() / p_s.shape[-1]


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
    """Soft targets, batch correlation and class correlation, each summed over several temperatures.

    Of a student that sees two views of an image (weak and strong), it is called for each, with the teacher's scores of
    the same view. Of the code that the authors published, and of that which standardizes scores, three things are not
    taken over. Their choice of confident samples and classes multiplies a mean that is taken already, so that it
    chooses nothing and halves the loss: here every sample counts, and `mask` chooses. The terms of the strong view at
    temperatures 2 and 6 are computed from the weak one: here a view is one call. The correlations of the strong view
    are computed and not added: here each call adds them.

    Args:
        student, teacher: scores, shape (N, K) or (N, L, K), floating; the teacher takes no gradient.
        temperatures: each > 0, at least one.
        instance, batch, classes: weights of `kd`, `batch-correlation` and `class-correlation`.
        standardize: as in `kd`, for that part.
        mask: shape (N,) or (N, L), true where a position counts; None counts all.

    Returns:
        Scalar, >= 0 up to rounding; 0 when the outputs agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: a temperature is not above 0, or there is none, or a weight is below 0.
        DataError: the mask is false everywhere.

    Source: Jin, Wang, Lin 2023 (multi-level logit distillation), CVPR, over 480 epochs for CIFAR-100.
    """
    check_at_least(0, instance=instance, batch=batch, classes=classes)
    if not temperatures:
        raise UsageError("There are no temperatures, so there is nothing to learn.", fix="Give at least one.")
    parts = [
        instance * soft_target(student, teacher, temperature=temperature, standardize=standardize, mask=mask)
        + batch * batch_correlation(student, teacher, temperature=temperature, mask=mask)
        + classes * class_correlation(student, teacher, temperature=temperature, mask=mask)
        for temperature in temperatures
    ]
    return sum(parts[1:], parts[0])


def _outputs(student: Any, teacher: Any, temperature: float, mask: Any) -> tuple[Any, Any]:
    """Both softened outputs (n, K) of the samples or positions that count."""
    check_temperature(temperature)
    xp = namespace(student)
    same_shape(student, teacher)
    p_s, p_t = (xp.exp(log_softmax(rows_that_count(scores, mask) / temperature)) for scores in (student, teacher))
    return p_s, p_t
