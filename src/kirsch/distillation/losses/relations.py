"""Losses on the relations between the samples of a batch."""

from __future__ import annotations

import math
from typing import Any

from kirsch import ops
from kirsch.distillation.losses.logits import check_temperature
from kirsch.distillation.losses.loss import (
    check_above,
    check_at_least,
    check_convention,
    check_integer,
    check_same_samples,
    check_same_shape,
    loss,
)
from kirsch.errors import UnknownNameError

KERNELS = ("bilinear", "gaussian")


@loss("sp", takes="features", widths="any", relational=True)
def similarity(student: Any, teacher: Any, *, convention: str = "rows") -> Any:
    """Return the squared difference of the inner products of all pairs of samples, averaged over pairs.

    Args:
        student, teacher: shape (N, ...), floating; widths may differ.
        convention: "rows" scales each row of products to an L2 norm of 1; "torchdistill" to an L1 norm of 1, which
            gives smaller values.

    Returns:
        Scalar, >= 0; 0 if the products agree up to a positive factor for each row.

    Raises:
        ShapeError: the numbers of samples differ.
        UnknownNameError: the convention is unknown.

    Source: Tung, Mori 2019, arXiv:1907.09682, equations 2 to 4. Weight 3000 on the last feature maps (RepDistiller).
    """
    check_convention(convention, ("rows", "torchdistill"))
    check_same_samples(student, teacher)
    first, second = (_products(ops.flatten(part), convention) for part in (student, teacher))
    return ops.mean((first - second) ** 2)


def _products(features: Any, convention: str) -> Any:
    """Return the inner products of all pairs, (N, N), each row scaled."""
    products = features @ ops.swapaxes(features, 0, 1)
    if convention == "rows":
        return ops.normalize(products)
    return products / ops.clip(ops.sum(ops.abs(products), -1, keepdims=True), 1e-12)


@loss("rkd-distance", takes="features", widths="any", relational=True)
def relational_distance(student: Any, teacher: Any, *, unit: bool = False) -> Any:
    """Return the Huber loss of the distances of all pairs of samples, each divided by the mean distance.

    Args:
        student, teacher: shape (N, ...), floating; widths may differ.
        unit: scale features to norm 1 first, as mmrazor does.

    Returns:
        Scalar, >= 0; 0 if the distances agree up to one factor, or for a single sample.

    Raises:
        ShapeError: the numbers of samples differ.

    Source: Park et al. 2019, arXiv:1904.05068, equations 5 to 7. Weight 25 (RepDistiller, mmrazor).
    """
    check_same_samples(student, teacher)
    first, second = (_divide_by_mean(ops.safe_sqrt(_squared_distances(part, unit=unit))) for part in (student, teacher))
    return ops.mean(_huber(first - second))


@loss("rkd-angle", takes="features", widths="any", relational=True)
def relational_angle(student: Any, teacher: Any, *, unit: bool = False) -> Any:
    """Return the Huber loss of the cosines of the angles of all triples of samples, averaged over triples.

    The cosines are computed from the pairwise distances, which are computed from inner products. This stores N³
    numbers, but never the differences of samples, which have N² D numbers. Products and squared distances are
    computed in 64 bits if the device supports them.

    Args:
        student, teacher: shape (N, ...), floating; widths may differ.
        unit: scale features to norm 1 first, as mmrazor does.

    Returns:
        Scalar, >= 0; 0 if the angles agree, or for fewer than three samples.

    Raises:
        ShapeError: the numbers of samples differ.

    Source: Park et al. 2019, arXiv:1904.05068, equations 8 and 9. Weight 50 (RepDistiller, mmrazor).
    """
    check_same_samples(student, teacher)
    first, second = (_cosines(_squared_distances(part, unit=unit)) for part in (student, teacher))
    return ops.mean(_huber(first - second))


@loss("rkd", takes="features", widths="any", relational=True)
def relational(
    student: Any, teacher: Any, *, distance_weight: float = 25.0, angle_weight: float = 50.0, unit: bool = False
) -> Any:
    """Return the weighted sum of "rkd-distance" and "rkd-angle".

    Args:
        student, teacher: shape (N, ...), floating; widths may differ.
        distance_weight, angle_weight: >= 0.
        unit: scale features to norm 1 first, as mmrazor does.

    Returns:
        Scalar, >= 0; 0 if the distances agree up to one factor.

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
    """Return the squared distances of all pairs, (N, N), with 0 for distances that are only rounding errors.

    The features are centered and converted to 64 bits, because the difference of products loses digits for samples that
    are close to each other and far from the mean. With `unit` they are scaled to norm 1 first.
    """
    vectors = ops.cast(ops.flatten(features), ops.widest_float(features))
    vectors = ops.normalize(vectors) if unit else vectors
    vectors = vectors - ops.mean(vectors, 0, keepdims=True)
    products = vectors @ ops.swapaxes(vectors, 0, 1)
    squared_norms = ops.diagonal(products)
    norm_sums = squared_norms[:, None] + squared_norms[None]
    squares = norm_sums - 2 * products
    # A cosine is divided by distances: with a rounding error in place of 0, it would be an arbitrary number.
    rounding = max(32 * ops.epsilon(vectors), 64 * ops.epsilon(features) ** 2)
    return ops.cast_like(ops.where(squares > rounding * norm_sums, squares, 0.0 * squares), features)


def _divide_by_mean(distances: Any) -> Any:
    """Divide distances by the mean of those above 0."""
    count = ops.clip(ops.cast(ops.count_nonzero(distances > 0), ops.dtype(distances)), 1)
    return distances / ops.clip(ops.sum(distances) / count, 1e-12)


def _cosines(squares: Any) -> Any:
    """Return the cosine of the angle at sample j between samples i and k, (j, i, k); 0 if i or k equals j.

    The cosine is (d_ij² + d_jk² - d_ik²) / (2 d_ij d_jk). Inner products would lose the digits of short distances.
    """
    apart = squares > 0
    distances = ops.safe_sqrt(squares)
    inverse = ops.where(apart, 1.0 / ops.where(apart, distances, 0.0 * squares + 1.0), 0.0 * squares)
    left = ops.stack([0.5 * distances, inverse], -1)  # (j, i, 2)
    right = ops.stack([inverse, 0.5 * distances], -2)  # (j, 2, k)
    return left @ right - 0.5 * squares[None] * inverse[:, :, None] * inverse[:, None]


def _huber(difference: Any) -> Any:
    """Return the Huber loss: half the square up to 1, the magnitude minus one half above."""
    clipped = ops.clip(difference, -1.0, 1.0)
    return clipped * (difference - 0.5 * clipped)


@loss("pkt", takes="features", widths="any", relational=True)
def probabilistic(student: Any, teacher: Any, *, eps: float = 1e-7) -> Any:
    """Return the KL divergence of the cosine similarities of each sample to all samples, normalized to probabilities.

    Args:
        student, teacher: shape (N, ...), floating; widths may differ.
        eps: >= 0, added to norms and probabilities.

    Returns:
        Scalar, >= 0 up to rounding, averaged over pairs; 0 if the cosines agree.

    Raises:
        ShapeError: the numbers of samples differ.
        UsageError: `eps` is below 0.

    Source: Passalis, Tefas 2018, arXiv:1803.10837, with the cosine kernel. Weight 30000 on the pooled feature
        (RepDistiller). The weight is large because the mean is over pairs, not over samples.
    """
    check_at_least(0, eps=eps)
    check_same_samples(student, teacher)
    first, second = (_probabilities(ops.flatten(part), eps) for part in (student, teacher))
    return ops.mean(second * (ops.log(second + eps) - ops.log(first + eps)))


def _probabilities(features: Any, eps: float) -> Any:
    """Return (1 + cosine) / 2 of all pairs, (N, N), each row divided by its sum."""
    directions = features / (ops.safe_sqrt(ops.sum(features * features, -1, keepdims=True)) + eps)
    similarities = (directions @ ops.swapaxes(directions, 0, 1) + 1) / 2
    return similarities / ops.sum(similarities, -1, keepdims=True)


@loss("cc", takes="features", learned=True, relational=True)
def correlation(student: Any, teacher: Any) -> Any:
    """Return the inner product of |student - teacher| of a sample and of the next sample, averaged over these pairs.

    This is the formula of the authors' code, and depends on the order of the batch. The loss "cc-kernel" implements the
    equations of the paper.

    Args:
        student, teacher: embeddings, shape (N, ...), floating; both receive a gradient.

    Returns:
        Scalar, >= 0; 0 if the embeddings agree, or for a single sample.

    Raises:
        ShapeError: the shapes differ.

    Source: Peng et al. 2019, arXiv:1904.01802, as in the code of the authors and RepDistiller. Weight 0.02 on
        embeddings of width 128.
    """
    check_same_shape(student, teacher, "features")
    distances = ops.abs(ops.flatten(student) - ops.flatten(teacher))
    return ops.sum(distances[:-1] * distances[1:]) / max(distances.shape[0] - 1, 1)


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
    """Return the squared difference of a kernel over all pairs of samples, averaged over pairs.

    Args:
        student, teacher: shape (N, ...), floating; they are scaled to norm 1. Widths may differ.
        kernel: "gaussian", the Taylor series of exp(-gamma |x - y|²) in x · y, or "bilinear", x · y.
        gamma, order: width of the Gaussian, > 0, and highest power of its series, >= 1; not used by "bilinear".
        convention: "paper", or "torchdistill", the norm of the difference divided by N².

    Returns:
        Scalar, >= 0; 0 if the cosines agree.

    Raises:
        ShapeError: the numbers of samples differ.
        UsageError: `gamma` or `order` is out of range.
        UnknownNameError: the kernel or the convention is unknown.

    Source: Peng et al. 2019, arXiv:1904.01802, section 3; gamma 0.4, order 2, weight 0.003.
    """
    check_convention(convention, ("paper", "torchdistill"))
    check_above(0, gamma=gamma)
    check_integer(1, order=order)
    if kernel not in KERNELS:
        raise UnknownNameError("kernel", kernel, KERNELS)
    check_same_samples(student, teacher)
    first, second = (ops.normalize(ops.flatten(part)) for part in (student, teacher))
    first, second = first @ ops.swapaxes(first, 0, 1), second @ ops.swapaxes(second, 0, 1)
    if kernel == "gaussian":
        first, second = (_gaussian(part, gamma, order) for part in (first, second))
    squares = (first - second) ** 2
    return ops.mean(squares) if convention == "paper" else ops.safe_sqrt(ops.sum(squares)) / first.shape[0] ** 2


def _gaussian(cosines: Any, gamma: float, order: int) -> Any:
    """Return exp(-2 gamma) Σ_p (2 gamma)^p / p! cosine^p up to the order."""
    series = sum((2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(order + 1))
    return math.exp(-2 * gamma) * series


@loss("crd-batch", takes="features", learned=True, relational=True, least_at_teacher=False)
def batch_contrast(student: Any, teacher: Any, *, temperature: float = 0.07) -> Any:
    """Return the InfoNCE loss of the student's and the teacher's embeddings, with the batch as negatives.

    Each sample has N - 1 negatives. Unlike "crd", no memory of other samples is needed.

    Args:
        student, teacher: embeddings, shape (N, ...), floating; both receive a gradient.
        temperature: > 0; the cosine similarities are divided by it.

    Returns:
        Scalar in nats, >= 0, averaged over samples; log N if all similarities are equal.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.

    Source: van den Oord et al. 2018, arXiv:1807.03748, equation 4, between two networks as in Tian et al. 2020,
        arXiv:1910.10699, with temperature 0.07.
    """
    check_temperature(temperature)
    check_same_shape(student, teacher, "features")
    cosines = ops.normalize(ops.flatten(student)) @ ops.swapaxes(ops.normalize(ops.flatten(teacher)), 0, 1)
    return -ops.mean(ops.diagonal(ops.log_softmax(cosines / temperature)))
