"""Losses on how the samples of a batch lie to each other."""

from __future__ import annotations

import math
from typing import Any

from kirsch.distillation.arrays import (
    doubled,
    flat,
    log_softmax,
    namespace,
    normalized,
    root,
    same_samples,
    same_shape,
    typed,
)
from kirsch.distillation.losses.logits import check_temperature
from kirsch.distillation.losses.loss import check_above, check_at_least, check_convention, check_whole, loss
from kirsch.errors import UnknownNameError

KERNELS = ("bilinear", "gaussian")


@loss("sp", takes="features", widths="any", relational=True)
def similarity(student: Any, teacher: Any, *, convention: str = "rows") -> Any:
    """Squared difference of the inner products of all pairs of samples, averaged over pairs.

    Args:
        student, teacher: shape (N, ...), floating; widths may differ.
        convention: each row of products is scaled to length 1 for "rows"; to a sum of magnitudes of 1 for
            "torchdistill", whose values are smaller.

    Returns:
        Scalar, >= 0; 0 when the products agree up to a factor a row.

    Raises:
        ShapeError: the numbers of samples differ.
        UnknownNameError: there is no such convention.

    Source: Tung, Mori 2019, arXiv:1907.09682, equations 2 to 4. Weight 3000 on the last maps (RepDistiller).
    """
    check_convention(convention, ("rows", "torchdistill"))
    same_samples(student, teacher)
    first, second = (_products(flat(part), convention) for part in (student, teacher))
    return ((first - second) ** 2).mean()


def _products(features: Any, convention: str) -> Any:
    """Inner products of all pairs, (N, N), each row scaled."""
    products = features @ features.T
    if convention == "rows":
        return normalized(products)
    return products / abs(products).sum(-1, keepdims=True).clip(min=1e-12)


@loss("rkd-distance", takes="features", widths="any", relational=True)
def relational_distance(student: Any, teacher: Any, *, unit: bool = False) -> Any:
    """Smooth difference of the distances of all pairs of samples, in units of their mean, averaged over pairs.

    Args:
        student, teacher: shape (N, ...), floating; widths may differ.
        unit: features are scaled to length 1 before, as mmrazor does.

    Returns:
        Scalar, >= 0; 0 when the distances agree up to one factor, and for a single sample.

    Raises:
        ShapeError: the numbers of samples differ.

    Source: Park et al. 2019, arXiv:1904.05068, equations 5 to 7. Weight 25 (RepDistiller, mmrazor).
    """
    same_samples(student, teacher)
    first, second = (_relative(root(_squared_distances(part, unit=unit))) for part in (student, teacher))
    return _smooth(first - second).mean()


@loss("rkd-angle", takes="features", widths="any", relational=True)
def relational_angle(student: Any, teacher: Any, *, unit: bool = False) -> Any:
    """Smooth difference of the cosines of the angles of all triples of samples, averaged over triples.

    (a - b) · (c - b) is made of the three distances, and these of inner products of samples, so that no difference of
    two samples is ever stored: N³ numbers, and not N² D besides. Distances and products are of 64 bits.

    Args:
        student, teacher: shape (N, ...), floating; widths may differ.
        unit: features are scaled to length 1 before, as mmrazor does.

    Returns:
        Scalar, >= 0; 0 when the angles agree, and for fewer than three samples.

    Raises:
        ShapeError: the numbers of samples differ.

    Source: Park et al. 2019, arXiv:1904.05068, equations 8 and 9. Weight 50 (RepDistiller, mmrazor).
    """
    same_samples(student, teacher)
    first, second = (_cosines(_squared_distances(part, unit=unit)) for part in (student, teacher))
    return _smooth(first - second).mean()


@loss("rkd", takes="features", widths="any", relational=True)
def relational(
    student: Any, teacher: Any, *, distance_weight: float = 25.0, angle_weight: float = 50.0, unit: bool = False
) -> Any:
    """Weighted sum of "rkd-distance" and "rkd-angle".

    Args:
        student, teacher: shape (N, ...), floating; widths may differ.
        distance_weight, angle_weight: >= 0.
        unit: features are scaled to length 1 before, as mmrazor does.

    Returns:
        Scalar, >= 0; 0 when the distances agree up to one factor.

    Raises:
        ShapeError: the numbers of samples differ.
        UsageError: a weight is below 0.

    Source: Park et al. 2019, arXiv:1904.05068. Weights 25 and 50 on the pooled feature (RepDistiller); 1 and 2
        (torchdistill, the paper).
    """
    check_at_least(0, distance_weight=distance_weight, angle_weight=angle_weight)
    distances = relational_distance(student, teacher, unit=unit)
    return distance_weight * distances + angle_weight * relational_angle(student, teacher, unit=unit)


def _squared_distances(features: Any, *, unit: bool) -> Any:
    """Squared distances of all pairs, (N, N), 0 where they are rounding; features are scaled to length 1 for `unit`.

    The products are of 64 bits and around the mean: what lies close together, far from the mean, is told apart by the
    last of their digits.
    """
    xp = namespace(features)
    wide = doubled(flat(features))
    wide = normalized(wide) if unit else wide
    wide = wide - wide.mean(0, keepdims=True)
    products = wide @ wide.T
    lengths = xp.diagonal(products)
    both = lengths[:, None] + lengths[None]
    squares = both - 2 * products
    # Divided by what rounding, of the products or of the features, leaves of no distance, a cosine would be any number.
    rounding = max(32 * float(xp.finfo(wide.dtype).eps), 64 * float(xp.finfo(features.dtype).eps) ** 2)
    apart = squares > rounding * both
    return typed(xp.where(apart, squares, 0.0 * squares), features)


def _relative(distances: Any) -> Any:
    """Distances divided by the mean of those above 0."""
    return distances / (distances.sum() / (distances > 0).sum().clip(min=1)).clip(min=1e-12)


def _cosines(squares: Any) -> Any:
    """Cosine of the angle at sample j between samples i and k, (j, i, k); 0 where two of a leg are the same.

    It is (d_ij² + d_jk² - d_ik²) / (2 d_ij d_jk). Inner products in its place would lose the digits of short legs.
    """
    xp = namespace(squares)
    apart = squares > 0
    distances = root(squares)
    inverse = xp.where(apart, 1.0 / xp.where(apart, distances, 0.0 * squares + 1.0), 0.0 * squares)
    left = xp.stack([0.5 * distances, inverse], -1)  # (j, i, 2)
    right = xp.stack([inverse, 0.5 * distances], -2)  # (j, 2, k)
    return left @ right - 0.5 * squares[None] * inverse[:, :, None] * inverse[:, None]


def _smooth(difference: Any) -> Any:
    """Half the square up to 1, the magnitude less a half beyond."""
    near = difference.clip(-1.0, 1.0)
    return near * (difference - 0.5 * near)


@loss("pkt", takes="features", widths="any", relational=True)
def probabilistic(student: Any, teacher: Any, *, eps: float = 1e-7) -> Any:
    """Divergence between the cosines of each sample with all, as probabilities, averaged over pairs.

    Args:
        student, teacher: shape (N, ...), floating; widths may differ.
        eps: >= 0, added to lengths and probabilities.

    Returns:
        Scalar, >= 0 up to rounding; 0 when the cosines agree.

    Raises:
        ShapeError: the numbers of samples differ.
        UsageError: `eps` is below 0.

    Source: Passalis, Tefas 2018, arXiv:1803.10837, with the cosine kernel. Weight 30000 on the pooled feature
        (RepDistiller): the mean over pairs, not over samples, makes it so large.
    """
    check_at_least(0, eps=eps)
    same_samples(student, teacher)
    first, second = (_probabilities(flat(part), eps) for part in (student, teacher))
    log = namespace(first).log
    return (second * (log(second + eps) - log(first + eps))).mean()


def _probabilities(features: Any, eps: float) -> Any:
    """(1 + cosine) / 2 of all pairs, (N, N), each row divided by its sum."""
    directions = features / (root((features * features).sum(-1, keepdims=True)) + eps)
    similar = (directions @ directions.T + 1) / 2
    return similar / similar.sum(-1, keepdims=True)


@loss("cc", takes="features", learned=True, relational=True)
def correlation(student: Any, teacher: Any) -> Any:
    """Inner product of the distances |student - teacher| of each sample and of the one after it, averaged.

    That is what the authors' code computes; the equations of the paper are "cc-kernel". It follows the order of the
    batch.

    Args:
        student, teacher: embeddings, shape (N, ...), floating; both are learned.

    Returns:
        Scalar, >= 0; 0 when the embeddings agree, and for a single sample.

    Raises:
        ShapeError: the shapes differ.

    Source: Peng et al. 2019, arXiv:1904.01802, as RepDistiller has it from its authors. Weight 0.02 on embeddings of
        width 128.
    """
    same_shape(student, teacher, "features")
    apart = abs(flat(student) - flat(teacher))
    return (apart[:-1] * apart[1:]).sum() / max(len(apart) - 1, 1)


@loss("cc-kernel", takes="features", widths="any", relational=True)
def kernel_correlation(
    student: Any,
    teacher: Any,
    *,
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    convention: str = "paper",
) -> Any:
    """Squared difference of a kernel of all pairs of samples, averaged over pairs.

    Args:
        student, teacher: shape (N, ...), floating; scaled to length 1 here. Widths may differ.
        kernel: "gaussian", exp(-gamma |x - y|²) by its Taylor series in x · y, or "bilinear", x · y.
        gamma, order: of the Gaussian: > 0, and the highest power in the series, >= 1.
        convention: "paper", or "torchdistill": the length of the difference divided by N².

    Returns:
        Scalar, >= 0; 0 when the cosines agree.

    Raises:
        ShapeError: the numbers of samples differ.
        UsageError: gamma or the order is out of range.
        UnknownNameError: there is no such kernel or convention.

    Source: Peng et al. 2019, arXiv:1904.01802, section 3; gamma 0.4, order 2, weight 0.003 there.
    """
    check_convention(convention, ("paper", "torchdistill"))
    check_above(0, gamma=gamma)
    check_whole(1, order=order)
    if kernel not in KERNELS:
        raise UnknownNameError("kernel", kernel, KERNELS)
    same_samples(student, teacher)
    first, second = (normalized(flat(part)) for part in (student, teacher))
    first, second = first @ first.T, second @ second.T
    if kernel == "gaussian":
        first, second = (_gaussian(part, gamma, order) for part in (first, second))
    squares = (first - second) ** 2
    return squares.mean() if convention == "paper" else root(squares.sum()) / len(first) ** 2


def _gaussian(cosines: Any, gamma: float, order: int) -> Any:
    """exp(-2 gamma) Σ_p (2 gamma)^p / p! cosine^p up to the order."""
    series = sum((2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(order + 1))
    return math.exp(-2 * gamma) * series


@loss("crd-batch", takes="features", learned=True, relational=True, least_at_teacher=False)
def batch_contrast(student: Any, teacher: Any, *, temperature: float = 0.07) -> Any:
    """Cross-entropy of finding, by cosine, the teacher's embedding of a sample among those of the batch.

    It needs no memory of other samples; the batch gives N - 1 negatives.

    Args:
        student, teacher: embeddings, shape (N, ...), floating; both are learned.
        temperature: > 0; cosines are divided by it.

    Returns:
        Scalar in nats, >= 0, averaged over the student's samples; log N when nothing can be told apart.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.

    Source: van den Oord et al. 2018, arXiv:1807.03748, equation 4, between two networks as in Tian et al. 2020,
        arXiv:1910.10699; temperature 0.07 there.
    """
    check_temperature(temperature)
    same_shape(student, teacher, "features")
    cosines = normalized(flat(student)) @ normalized(flat(teacher)).T
    return -namespace(cosines).diagonal(log_softmax(cosines / temperature)).mean()
