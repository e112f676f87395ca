"""Losses on the feature maps of convolutions, position by position."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import log_ndtr

from kirsch import ops
from kirsch.distillation.losses.logits import check_temperature
from kirsch.distillation.losses.loss import (
    check_above,
    check_at_least,
    check_convention,
    check_integer,
    check_maps,
    check_same_shape,
    loss,
)
from kirsch.errors import ShapeError, UsageError

STANDARD_MARGIN = -math.sqrt(2 / math.pi)
"""Mean of the negative values of a standard normal distribution, which a newly initialized batch norm gives."""


@loss("fitnet", takes="maps")
def hint(student: Any, teacher: Any) -> Any:
    """Return the squared difference of the maps, averaged over samples, channels and positions.

    Args:
        student, teacher: shape (N, C, H, W), floating.

    Returns:
        Scalar, >= 0; 0 if the maps agree.

    Raises:
        ShapeError: the shapes differ.

    Source: Romero et al. 2015, arXiv:1412.6550, equation 3, without the half. RepDistiller uses weight 100 on one
        layer in the middle.
    """
    check_same_shape(student, teacher, "maps")
    return ops.mean((student - teacher) ** 2)


@loss("at", takes="maps", widths="any")
def attention_transfer(student: Any, teacher: Any, *, power: float = 2.0, convention: str = "mean") -> Any:
    """Return the distance of the attention maps, each the mean over channels of |activation|^power, scaled to norm 1.

    Args:
        student, teacher: shape (N, C, H, W), floating; channels and sizes may differ, larger maps are average-pooled.
        power: > 0; exponent of the activations before channels are averaged.
        convention: "mean" is the squared difference, averaged over samples and positions, as in the authors' code and
            RepDistiller; "paper" is the norm of the difference, averaged over samples, as in equation 2 and
            torchdistill, which is 10 to 100 times larger.

    Returns:
        Scalar, >= 0; 0 if the attention maps agree.

    Raises:
        ShapeError: an input is not (N, C, H, W), or the numbers of samples differ.
        UsageError: the power is not above 0.
        UnknownNameError: the convention is unknown.

    Source: Zagoruyko, Komodakis 2017, arXiv:1612.03928, equation 2. Weight 1000 on the last layer of each stage,
        for either convention (RepDistiller, torchdistill).
    """
    check_convention(convention, ("mean", "paper"))
    check_above(0, power=power)
    check_maps(student, teacher)
    student, teacher = ops.pool_to_common_size(student, teacher)
    squares = (_attention_map(student, power) - _attention_map(teacher, power)) ** 2
    return ops.mean(squares) if convention == "mean" else ops.mean(ops.safe_sqrt(ops.sum(squares, -1)))


def _attention_map(maps: Any, power: float) -> Any:
    """Return the mean over channels of |activation|^power, (N, H · W), scaled to norm 1."""
    return ops.normalize(ops.flatten(ops.mean(ops.abs(maps) ** power, 1)))


@loss("nst", takes="maps", widths="any")
def neuron_selectivity(student: Any, teacher: Any) -> Any:
    """Return the squared maximum mean discrepancy of student's and teacher's channels, with the kernel (x · y)².

    Each channel is first scaled to norm 1. The kernel's sum over pairs of channels is the squared Frobenius norm of a
    matrix of inner products, either of channels with channels or of positions with positions. The cheaper of the two
    ways is computed.

    Args:
        student, teacher: shape (N, C, H, W), floating; channels and sizes may differ, larger maps are average-pooled.

    Returns:
        Scalar, >= 0 up to rounding, averaged over samples; 0 if the channels agree, in any order.

    Raises:
        ShapeError: an input is not (N, C, H, W), or the numbers of samples differ.

    Source: Huang, Wang 2017, arXiv:1707.01219, with the polynomial kernel (c = 0, d = 2). Weight 50 (RepDistiller).
    """
    check_maps(student, teacher)
    first, second = (
        ops.normalize(ops.reshape(part, (*part.shape[:2], -1))) for part in ops.pool_to_common_size(student, teacher)
    )
    (_, channels_s, positions), (_, channels_t, _) = first.shape, second.shape
    if positions * (channels_s + channels_t) < channels_s**2 + channels_t**2 + channels_s * channels_t:
        gram_s, gram_t = (ops.swapaxes(side, 1, 2) @ side / side.shape[1] for side in (first, second))  # (N, H·W, H·W)
        return ops.mean(ops.sum((gram_s - gram_t) ** 2, (1, 2)))
    pairs = [left @ ops.swapaxes(right, 1, 2) for left, right in ((first, first), (second, second), (first, second))]
    within_s, within_t, between = (ops.mean(pair * pair) for pair in pairs)  # (N, C, C') each
    return within_s + within_t - 2 * between


@loss("ab", takes="maps", least_at_teacher=False)
def activation_boundary(student: Any, teacher: Any, *, margin: float = 1.0, convention: str = "repdistiller") -> Any:
    """Return the squared hinge loss that pushes the student's pre-activations to the sign of the teacher's.

    Args:
        student, teacher: maps before the ReLU, shape (N, C, H, W), floating.
        margin: > 0; required distance of the student's values from 0. If values of the teacher are nearer to 0,
            the loss is above 0 even for a student that equals the teacher.
        convention: "torchdistill" sums over channels and positions and averages over samples; "repdistiller"
            multiplies this by 3 / 1000.

    Returns:
        Scalar, >= 0; 0 if every value of the student has the teacher's sign and a magnitude of at least the margin.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the margin is not above 0.
        UnknownNameError: the convention is unknown.

    Source: Heo et al. 2019, arXiv:1811.03233, the alternative loss. Weight 2^(i - n + 1) for stage i of n, in a
        separate phase before other training (RepDistiller: 30 epochs).
    """
    check_convention(convention, ("repdistiller", "torchdistill"))
    check_above(0, margin=margin)
    check_maps(student, teacher)
    check_same_shape(student, teacher, "maps")
    hinge = ops.clip(ops.where(teacher > 0, margin - student, student + margin), 0)
    total = ops.sum(hinge * hinge) / student.shape[0]
    return total * 3 / 1000 if convention == "repdistiller" else total


@loss("ft", takes="maps")
def factor_transfer(
    student: Any, teacher: Any, *, power: float = 1.0, activity_power: float = 2.0, convention: str = "repdistiller"
) -> Any:
    """Return |difference|^power of the outputs of the adapter "factor", which are first scaled to norm 1.

    Args:
        student, teacher: factors (the outputs of the adapter "factor"), or the maps themselves, shape (N, C, H, W),
            floating. For "repdistiller", sizes may differ; larger maps are average-pooled.
        power: > 0; 1 or 2 in the paper.
        activity_power: > 0; exponent of the activations before channels are averaged, for "repdistiller".
        convention: "repdistiller" averages the factors over channels, as "at" does; "paper" compares all values of a
            factor, as torchdistill and mmrazor do.

    Returns:
        Scalar, >= 0, averaged over elements; 0 if the factors agree up to their norm.

    Raises:
        ShapeError: channels differ, or, for "paper", sizes.
        UsageError: a power is not above 0.
        UnknownNameError: the convention is unknown.

    Source: Kim et al. 2018, arXiv:1802.04977. Weight 200 (RepDistiller).
    """
    check_convention(convention, ("repdistiller", "paper"))
    check_above(0, power=power, activity_power=activity_power)
    check_maps(student, teacher)
    if convention == "paper":
        check_same_shape(student, teacher, "factors")
        first, second = ops.normalize(ops.flatten(student)), ops.normalize(ops.flatten(teacher))
    else:
        student, teacher = ops.pool_to_common_size(student, teacher)
        check_same_shape(student, teacher, "factors")
        first, second = _attention_map(student, activity_power), _attention_map(teacher, activity_power)
    return ops.mean(ops.abs(first - second) ** power)


@loss("ofd", takes="maps")
def overhaul(student: Any, teacher: Any, *, margin: Any = STANDARD_MARGIN, convention: str = "sum") -> Any:
    """Return the squared distance to the teacher's clipped maps; where these are <= 0, lower student values add 0.

    The teacher's maps are clipped from below at the margin. Where the clipped maps are at most 0, a lower value of the
    student adds nothing, because a ReLU maps both values to 0.

    Args:
        student, teacher: maps before the ReLU, shape (N, C, H, W), floating.
        margin: <= 0, one number, or one for each channel; `margins` computes them from a batch norm.
        convention: "sum" sums over channels and positions and averages over samples, as the authors' code and
            mdistiller do; "mmrazor" divides this by 1000.

    Returns:
        Scalar, >= 0; 0 if the maps agree.

    Raises:
        ShapeError: the shapes differ, or the number of margins is not the number of channels.
        UsageError: a margin is above 0.
        UnknownNameError: the convention is unknown.

    Source: Heo et al. 2019, arXiv:1904.01866, margin ReLU and partial L2. Weight 1e-3 for CIFAR, 1e-4 for ImageNet,
        with half the weight for each earlier stage.
    """
    check_convention(convention, ("sum", "mmrazor"))
    check_maps(student, teacher)
    check_same_shape(student, teacher, "maps")
    lowest = _per_channel(ops.convert_to_tensor(margin, like=teacher), teacher.shape[1], "margin")
    ops.raise_if(~(lowest <= 0), lambda: UsageError(f"`margin` is {margin}; numbers of at most 0 are needed."))
    target = ops.maximum(teacher, lowest)
    counted = (teacher > 0) | (student > target)
    squares = ops.where(counted, student - target, ops.zeros_like(student)) ** 2
    total = ops.sum(squares) / student.shape[0]
    return total / 1000 if convention == "mmrazor" else total


def _per_channel(values: Any, channels: int, name: str) -> Any:
    """Reshape one number, or one per channel, so that it broadcasts with maps (N, C, H, W)."""
    count = math.prod(values.shape)
    if count not in (1, channels):
        raise ShapeError(f"`{name}` has {count} values; 1 or {channels}, one per channel, are needed.")
    return ops.reshape(values, (1, -1, 1, 1))


def margins(mean: Any, std: Any) -> Any:
    """Return E[x | x < 0] of normal distributions, the margins of "ofd".

    Args:
        mean, std: bias and weight of a batch norm, one value per channel, shape (C,). The sign of the weight has no
            effect.

    Returns:
        Numbers <= 0, numpy float64, shape (C,). They are exact even if negative values are rare. The authors' code uses
        -3 |std| if fewer than 1 of 1000 activations are negative.

    Source: Heo et al. 2019, arXiv:1904.01866, the margin ReLU.
    """
    mean, std = np.asarray(mean, np.float64), np.abs(np.asarray(std, np.float64))
    varies = std > 0
    scale = np.where(varies, std, 1.0)
    z = mean / scale
    # Density divided by the probability of a negative value, from logarithms, because either alone may underflow.
    hazard = np.exp(-0.5 * z * z - 0.5 * math.log(2 * math.pi) - log_ndtr(-z))
    return np.minimum(np.where(varies, mean - scale * hazard, mean), 0.0)


@loss("hcl", takes="maps")
def hierarchical_context(student: Any, teacher: Any, *, sizes: tuple[int, ...] = (4, 2, 1)) -> Any:
    """Return the squared difference of the maps, averaged over full and pooled sizes with weights 1, 1/2, 1/4, ...

    Args:
        student, teacher: shape (N, C, H, W), floating.
        sizes: heights and widths after pooling, the largest first; sizes of H or more are skipped.

    Returns:
        Scalar, >= 0; 0 if the maps agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: a size is not a positive integer.

    Source: Chen et al. 2021, arXiv:2104.09044. Weight 5 for CIFAR, 1 for ImageNet, 8 from ResNet-50 to MobileNet,
        with a warm-up of 20 epochs on CIFAR.
    """
    check_maps(student, teacher)
    check_same_shape(student, teacher, "maps")
    for size in sizes:
        check_integer(1, size=size)
    difference = student - teacher  # pooling is linear: pool the difference once
    total, weights = ops.mean(difference * difference), 1.0
    weight = 1.0
    for size in sizes:
        if size < student.shape[2]:
            weight /= 2
            weights += weight
            total = total + weight * ops.mean(ops.adaptive_average_pool(difference, (size, size)) ** 2)
    return total / weights


def channel_wise(student: Any, teacher: Any, *, temperature: float = 1.0) -> Any:
    """Return the KL divergence between the spatial distributions of each channel, times T², averaged over channels.

    The distribution of a channel is its softmax over positions. The divergence is from the teacher to the student.

    Args:
        student, teacher: maps, shape (N, C, H, W), floating.
        temperature: > 0.

    Returns:
        Scalar in nats, >= 0 up to rounding, averaged over samples and channels; 0 if the channels agree up to an
        offset.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.

    Source: Shu et al. 2021, arXiv:2011.13256. Temperature 1, weight 10 on each level of a detector's feature pyramid
        (mmrazor).
    """
    check_temperature(temperature)
    check_maps(student, teacher)
    check_same_shape(student, teacher, "maps")
    log_s, log_t = (
        ops.log_softmax(ops.reshape(part, (*part.shape[:2], -1)) / temperature) for part in (student, teacher)
    )
    return ops.mean(ops.sum(ops.kl_terms(log_t, log_s), -1)) * temperature**2


channel_wise_maps = loss("cwd", takes="maps")(channel_wise)


@loss("cwd-pixels", takes="pixels", activation="identity")
def channel_wise_pixels(student: Any, teacher: Any, *, temperature: float = 1.0) -> Any:
    """Return the loss "cwd" of the logits of a segmentation model, which have one channel per class.

    Args:
        student, teacher: logits of pixels, shape (N, C, H, W), floating.
        temperature: > 0.

    Returns:
        Scalar in nats, >= 0 up to rounding, averaged over samples and classes; 0 if the channels agree up to an offset.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.

    Source: Shu et al. 2021, arXiv:2011.13256. Temperature 1, weight 5 (mmrazor).
    """
    return channel_wise(student, teacher, temperature=temperature)


@loss("pkd", takes="maps", relational=True)
def pearson(student: Any, teacher: Any, *, eps: float = 1e-6) -> Any:
    """Return half the mean squared difference of maps with standardized channels, which is 1 - Pearson correlation.

    Args:
        student, teacher: shape (N, C, H, W), floating; each channel is standardized over samples and positions.
        eps: >= 0, added to the standard deviation.

    Returns:
        Scalar, >= 0; 0 if every channel agrees up to a positive factor and an offset.

    Raises:
        ShapeError: the shapes differ.
        UsageError: `eps` is below 0.

    Source: Cao et al. 2022, arXiv:2207.02039. Weight 6 in detection, 10 in 3D detection (mmrazor).
    """
    check_at_least(0, eps=eps)
    check_maps(student, teacher)
    check_same_shape(student, teacher, "maps")
    first, second = (
        (part - ops.mean(part, (0, 2, 3), keepdims=True)) / (ops.standard_deviation(part, (0, 2, 3)) + eps)
        for part in (student, teacher)
    )
    return 0.5 * ops.mean((first - second) ** 2)


@loss("mgd", takes="maps")
def generation(student: Any, teacher: Any, *, convention: str = "sum") -> Any:
    """Return the squared difference of the teacher's maps and the maps generated from the student's masked maps.

    Args:
        student, teacher: shape (N, C, H, W), floating; the student's maps are the output of the generator.
        convention: "sum" sums over channels and positions and averages over samples; "modelopt" averages over all
            elements.

    Returns:
        Scalar, >= 0; 0 if the maps agree.

    Raises:
        ShapeError: the shapes differ.
        UnknownNameError: the convention is unknown.

    Source: Yang et al. 2022, arXiv:2205.01529. Weight 2e-5; ModelOpt: weight 1 on the mean, 65 % of positions masked.
    """
    check_convention(convention, ("sum", "modelopt"))
    check_maps(student, teacher)
    check_same_shape(student, teacher, "maps")
    squares = (student - teacher) ** 2
    return ops.mean(squares) if convention == "modelopt" else ops.sum(squares) / student.shape[0]


@loss("l2-normalized", takes="features")
def normalized_distance(student: Any, teacher: Any) -> Any:
    """Return the squared distance of features scaled to norm 1, which is 2 - 2 cosine, averaged over samples.

    Args:
        student, teacher: shape (N, ...), floating.

    Returns:
        Scalar from 0 to 4; 0 if the features agree up to their norm.

    Raises:
        ShapeError: the shapes differ.

    Source: mmrazor's `L2Loss` with `normalize=True`.
    """
    check_same_shape(student, teacher, "features")
    return ops.mean(ops.sum((ops.normalize(ops.flatten(student)) - ops.normalize(ops.flatten(teacher))) ** 2, -1))


@loss("vid", takes="maps", learned=True)
def variational(student: Any, teacher: Any, *, variance: float = 5.0, eps: float = 1e-5) -> Any:
    """Return the negative log-likelihood of the teacher's maps under a normal distribution, without its constant.

    Args:
        student: dict of "mean", (N, C, H, W), and "scale", one number per channel, from which the variance is
            log(1 + exp(scale)) + eps; or the mean alone.
        teacher: shape (N, C, H, W), floating; no gradient reaches the teacher.
        variance: > eps; variance of every channel if only the mean is passed, and the initial value in training.
        eps: > 0, the smallest variance.

    Returns:
        Scalar, of any sign: (mean - teacher)² / variance / 2 + log(variance) / 2, averaged over all elements.

    Raises:
        ShapeError: the mean has another shape than the teacher, or the number of scales is not the number of channels.
        UsageError: `variance` is not above `eps`, or `eps` is not above 0.

    Source: Ahn et al. 2019, arXiv:1904.05835. Weight 1; the mean comes from three 1 × 1 convolutions (RepDistiller).
    """
    teacher = ops.detach(teacher)
    check_above(0, eps=eps)
    check_above(eps, variance=variance)
    if isinstance(student, dict):
        mean, scale = student["mean"], student["scale"]
    else:
        mean, scale = student, ops.convert_to_tensor([inverse_softplus(variance - eps)], like=student)
    check_maps(mean, teacher)
    check_same_shape(mean, teacher, "maps")
    scale = _per_channel(scale, teacher.shape[1], "scale")
    variances = eps - ops.log_sigmoid(-scale)
    return 0.5 * ops.mean((mean - teacher) ** 2 / variances + ops.log(variances))


def inverse_softplus(value: float) -> float:
    """Return x with log(1 + exp(x)) = value."""
    return value + math.log(-math.expm1(-value))  # exp(value) would overflow for large values
