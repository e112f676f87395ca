"""Losses on what convolutions put out, place by place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import log_ndtr

from kirsch.distillation.arrays import (
    check_maps,
    constant,
    deviation,
    flat,
    like,
    log_sigmoid,
    log_softmax,
    namespace,
    normalized,
    pooled,
    relative,
    root,
    same_shape,
    same_size,
)
from kirsch.distillation.losses.logits import check_temperature
from kirsch.distillation.losses.loss import check_above, check_at_least, check_convention, check_whole, loss
from kirsch.errors import ShapeError, UsageError

STANDARD_MARGIN = -math.sqrt(2 / math.pi)
"""Mean of the negative half of a standard normal distribution, as a channel has it that batch normalization begins."""


@loss("fitnet", takes="maps")
def hint(student: Any, teacher: Any) -> Any:
    """Squared difference of the maps, averaged over samples, channels and places.

    Args:
        student, teacher: shape (N, C, H, W), floating.

    Returns:
        Scalar, >= 0; 0 when the maps agree.

    Raises:
        ShapeError: the shapes differ.

    Source: Romero et al. 2015, arXiv:1412.6550, equation 3, without the half. RepDistiller weighs it by 100 on one
        layer in the middle.
    """
    same_shape(student, teacher, "maps")
    return ((student - teacher) ** 2).mean()


@loss("at", takes="maps", widths="any")
def attention_transfer(student: Any, teacher: Any, *, power: float = 2.0, convention: str = "mean") -> Any:
    """Distance of where the maps are active: of the mean over channels of |activation|^power, scaled to length 1.

    Args:
        student, teacher: shape (N, C, H, W), floating; channels and sizes may differ, the larger map is averaged.
        power: > 0; what an activation is raised to before channels are averaged.
        convention: "mean" is the squared difference, averaged over samples and places, as the authors' code and
            RepDistiller have it; "paper" is the length of the difference, averaged over samples, as equation 2 and
            torchdistill have it, which is larger by one to two powers of ten.

    Returns:
        Scalar, >= 0; 0 when the maps are active at the same places.

    Raises:
        ShapeError: these are no maps, or not of the same samples.
        UsageError: the power is not above 0.
        UnknownNameError: there is no such convention.

    Source: Zagoruyko, Komodakis 2017, arXiv:1612.03928, equation 2. Weight 1000 on the last layer of each stage, for
        either convention (RepDistiller, torchdistill).
    """
    check_convention(convention, ("mean", "paper"))
    check_above(0, power=power)
    check_maps(student, teacher)
    student, teacher = same_size(student, teacher)
    squares = (_activity(student, power) - _activity(teacher, power)) ** 2
    return squares.mean() if convention == "mean" else root(squares.sum(-1)).mean()


def _activity(maps: Any, power: float) -> Any:
    """Where maps (N, C, H, W) are active, (N, H · W), each of length 1."""
    return normalized(flat((abs(maps) ** power).mean(1)))


@loss("nst", takes="maps", widths="any")
def neuron_selectivity(student: Any, teacher: Any) -> Any:
    """Squared maximum mean discrepancy between the channels of both, each scaled to length 1, with kernel (x · y)².

    The kernel's sum over pairs of channels is the squared Frobenius norm of a matrix of inner products. That may be of
    channels with channels, or of places with places; the one that costs less is computed, never the products of all
    channels at all places.

    Args:
        student, teacher: shape (N, C, H, W), floating; channels and sizes may differ, the larger map is averaged.

    Returns:
        Scalar, >= 0 up to rounding, averaged over samples; 0 when the channels agree, in any order.

    Raises:
        ShapeError: these are no maps, or not of the same samples.

    Source: Huang, Wang 2017, arXiv:1707.01219, with the polynomial kernel (c = 0, d = 2). Weight 50 (RepDistiller).
    """
    check_maps(student, teacher)
    first, second = (normalized(part.reshape(*part.shape[:2], -1)) for part in same_size(student, teacher))
    (_, wide, places), (_, other, _) = first.shape, second.shape
    if places * (wide + other) < wide * wide + other * other + wide * other:
        between = first.swapaxes(1, 2) @ first / wide - second.swapaxes(1, 2) @ second / other  # (N, H·W, H·W)
        return (between * between).sum((1, 2)).mean()
    pairs = [left @ right.swapaxes(1, 2) for left, right in ((first, first), (second, second), (first, second))]
    own, its, both = ((pair * pair).mean() for pair in pairs)  # (N, C, C') each
    return own + its - 2 * both


@loss("ab", takes="maps", least_at_teacher=False)
def activation_boundary(student: Any, teacher: Any, *, margin: float = 1.0, convention: str = "repdistiller") -> Any:
    """Squared distance by which the student misses to be on the teacher's side of 0, by a margin.

    Args:
        student, teacher: before the rectifier, shape (N, C, H, W), floating.
        margin: > 0; how far from 0 the student is asked to go. A student that equals the teacher pays where the
            teacher is nearer to 0.
        convention: summed over channels and places, averaged over samples, and then times 3 / 1000 for
            "repdistiller"; as it is for "torchdistill".

    Returns:
        Scalar, >= 0; 0 where every student's value lies on the teacher's side of 0, by the margin.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the margin is not above 0.
        UnknownNameError: there is no such convention.

    Source: Heo et al. 2019, arXiv:1811.03233, the alternative loss. Weight 2^(i - n + 1) for stage i of n, in a
        phase of its own before other training (RepDistiller: 30 epochs).
    """
    check_convention(convention, ("repdistiller", "torchdistill"))
    check_above(0, margin=margin)
    check_maps(student, teacher)
    same_shape(student, teacher, "maps")
    missed = namespace(student).where(teacher > 0, margin - student, student + margin).clip(min=0)
    total = (missed * missed).sum() / len(student)
    return total * 3 / 1000 if convention == "repdistiller" else total


@loss("ft", takes="maps")
def factor_transfer(
    student: Any, teacher: Any, *, power: float = 1.0, activity_power: float = 2.0, convention: str = "repdistiller"
) -> Any:
    """|difference|^power of the factors, scaled to length 1, averaged over everything.

    Args:
        student, teacher: factors, or the maps themselves, shape (N, C, H, W), floating; sizes may differ for
            "repdistiller", the larger is averaged.
        power: > 0; 1 or 2 in the paper.
        activity_power: > 0; what "repdistiller" raises an activation to before it averages channels.
        convention: "repdistiller" compares where factors are active, with their channels averaged as in "at"; "paper"
            compares all values of a factor, as torchdistill and mmrazor do.

    Returns:
        Scalar, >= 0; 0 when the factors agree up to their length.

    Raises:
        ShapeError: channels differ, or, for "paper", sizes.
        UsageError: a power is not above 0.
        UnknownNameError: there is no such convention.

    Source: Kim et al. 2018, arXiv:1802.04977. Weight 200 (RepDistiller).
    """
    check_convention(convention, ("repdistiller", "paper"))
    check_above(0, power=power, activity_power=activity_power)
    check_maps(student, teacher)
    if convention == "paper":
        same_shape(student, teacher, "factors")
        first, second = normalized(flat(student)), normalized(flat(teacher))
    else:
        student, teacher = same_size(student, teacher)
        same_shape(student, teacher, "factors")
        first, second = _activity(student, activity_power), _activity(teacher, activity_power)
    return (abs(first - second) ** power).mean()


@loss("ofd", takes="maps")
def overhaul(student: Any, teacher: Any, *, margin: Any = STANDARD_MARGIN, convention: str = "sum") -> Any:
    """Squared distance to the teacher's maps, cut off below at a margin, but for values that need not be that low.

    Where the teacher is not active, a student below the teacher costs nothing: the rectifier hides both.

    Args:
        student, teacher: before the rectifier, shape (N, C, H, W), floating.
        margin: <= 0, one number or one for each channel; `margins` gives them for batch normalization.
        convention: summed over channels and places, averaged over samples, for "sum", as the authors' code and
            mdistiller; a thousandth of that for "mmrazor".

    Returns:
        Scalar, >= 0; 0 when the maps agree.

    Raises:
        ShapeError: the shapes differ, or there is another number of margins than of channels.
        UsageError: a margin is above 0.
        UnknownNameError: there is no such convention.

    Source: Heo et al. 2019, arXiv:1904.01866, margin ReLU and partial L2. Weight 1e-3 for CIFAR, 1e-4 for ImageNet,
        halved for each stage before the last.
    """
    check_convention(convention, ("sum", "mmrazor"))
    check_maps(student, teacher)
    same_shape(student, teacher, "maps")
    xp = namespace(student)
    floor = _by_channel(like(margin, teacher), teacher.shape[1], "margin")
    if not bool((floor <= 0).all()):
        raise UsageError(f"`margin` is {margin}; numbers of at most 0 are needed.")
    target = xp.maximum(teacher, floor)
    charged = (teacher > 0) | (student > target)
    squares = xp.where(charged, student - target, xp.zeros_like(student)) ** 2
    total = squares.sum() / len(student)
    return total / 1000 if convention == "mmrazor" else total


def _by_channel(values: Any, channels: int, what: str) -> Any:
    """One number, or one a channel, in a shape that goes with maps."""
    count = math.prod(values.shape)
    if count not in (1, channels):
        raise ShapeError(f"There are {count} numbers for {what!r}; 1 or one for each of {channels} channels is needed.")
    return values.reshape(1, -1, 1, 1)


def margins(mean: Any, std: Any) -> Any:
    """The mean of what is negative of normal distributions: E[x | x < 0], the margins of "ofd".

    Args:
        mean, std: one a channel, shape (C,): the offset and the scale of a batch normalization; a scale's sign does
            not matter.

    Returns:
        Numbers <= 0 of shape (C,), float64, in numpy. They are exact also where hardly anything is negative, for which
        the authors' code puts -3 |std| (less than 1 of 1000 activations).

    Source: Heo et al. 2019, arXiv:1904.01866, the margin ReLU.
    """
    mean, std = np.asarray(mean, np.float64), np.abs(np.asarray(std, np.float64))
    spread = std > 0
    scale = np.where(spread, std, 1.0)
    z = mean / scale
    # The density over the share of what is negative, by logarithms: either alone underflows.
    hazard = np.exp(-0.5 * z * z - 0.5 * math.log(2 * math.pi) - log_ndtr(-z))
    return np.minimum(np.where(spread, mean - scale * hazard, mean), 0.0)


@loss("hcl", takes="maps")
def hierarchical_context(student: Any, teacher: Any, *, sizes: tuple[int, ...] = (4, 2, 1)) -> Any:
    """Mean squared difference of the maps and of the maps averaged to smaller sizes, each with half the weight.

    Args:
        student, teacher: shape (N, C, H, W), floating.
        sizes: heights and widths to average to, the largest first; those that are not below H are left out.

    Returns:
        Scalar, >= 0, a weighted mean over sizes; 0 when the maps agree.

    Raises:
        ShapeError: the shapes differ.
        UsageError: a size is none.

    Source: Chen et al. 2021, arXiv:2104.09044. Weight 5 for CIFAR, 1 for ImageNet, 8 from ResNet-50 to MobileNet,
        with a warm-up of 20 epochs on CIFAR.
    """
    check_maps(student, teacher)
    same_shape(student, teacher, "maps")
    for size in sizes:
        check_whole(1, size=size)
    difference = student - teacher  # averages of the difference are differences of the averages
    total, weights = (difference * difference).mean(), 1.0
    weight = 1.0
    for size in sizes:
        if size < student.shape[2]:
            weight /= 2
            weights += weight
            total = total + weight * (pooled(difference, (size, size)) ** 2).mean()
    return total / weights


def channel_wise(student: Any, teacher: Any, *, temperature: float = 1.0) -> Any:
    """Kullback-Leibler divergence between where each channel is high, times temperature², averaged over channels.

    A softmax runs over the places of each channel; the divergence runs from the teacher to the student.

    Args:
        student, teacher: scores of pixels or maps, shape (N, C, H, W), floating.
        temperature: > 0.

    Returns:
        Scalar in nats, >= 0 up to rounding, averaged over samples and channels; 0 when the channels agree up to an
        offset.

    Raises:
        ShapeError: the shapes differ.
        UsageError: the temperature is not above 0.

    Source: Shu et al. 2021, arXiv:2011.13256. Temperature 1, weight 5 on the scores of a segmentation and 10 on each
        level of a detector's pyramid (mmrazor).
    """
    check_temperature(temperature)
    check_maps(student, teacher)
    same_shape(student, teacher, "maps")
    log_s, log_t = (log_softmax(part.reshape(*part.shape[:2], -1) / temperature) for part in (student, teacher))
    return relative(log_t, log_s).sum(-1).mean() * temperature**2


channel_wise_maps = loss("cwd", takes="maps")(channel_wise)
channel_wise_pixels = loss("cwd-pixels", takes="pixels", activation="identity")(channel_wise)


@loss("pkd", takes="maps", relational=True)
def pearson(student: Any, teacher: Any, *, eps: float = 1e-6) -> Any:
    """Half the mean squared difference of the maps, each channel standardized over samples and places: 1 - correlation.

    Args:
        student, teacher: shape (N, C, H, W), floating.
        eps: >= 0, added to the standard deviation.

    Returns:
        Scalar, >= 0; 0 when every channel agrees up to scale and offset.

    Raises:
        ShapeError: the shapes differ.
        UsageError: `eps` is below 0.

    Source: Cao et al. 2022, arXiv:2207.02039. Weight 6 in detection, 10 in three dimensions (mmrazor).
    """
    check_at_least(0, eps=eps)
    check_maps(student, teacher)
    same_shape(student, teacher, "maps")
    first, second = (
        (part - part.mean((0, 2, 3), keepdims=True)) / (deviation(part, (0, 2, 3)) + eps) for part in (student, teacher)
    )
    return 0.5 * ((first - second) ** 2).mean()


@loss("mgd", takes="maps")
def generation(student: Any, teacher: Any, *, convention: str = "sum") -> Any:
    """Squared difference of what is generated from the student's masked maps and the teacher's maps.

    Args:
        student, teacher: shape (N, C, H, W), floating; the student's are those that a generator made.
        convention: summed over channels and places, averaged over samples, for "sum"; averaged over everything for
            "modelopt".

    Returns:
        Scalar, >= 0; 0 when the maps agree.

    Raises:
        ShapeError: the shapes differ.
        UnknownNameError: there is no such convention.

    Source: Yang et al. 2022, arXiv:2205.01529. Weight 2e-5; ModelOpt: weight 1 on the mean, 0.65 of the places masked.
    """
    check_convention(convention, ("sum", "modelopt"))
    check_maps(student, teacher)
    same_shape(student, teacher, "maps")
    squares = (student - teacher) ** 2
    return squares.mean() if convention == "modelopt" else squares.sum() / len(student)


@loss("l2-normalized", takes="features")
def normalized_distance(student: Any, teacher: Any) -> Any:
    """Squared distance of the features of each sample, scaled to length 1: 2 - 2 cosine, averaged over samples.

    Args:
        student, teacher: shape (N, ...), floating.

    Returns:
        Scalar from 0 to 4; 0 when the features agree up to their length.

    Raises:
        ShapeError: the shapes differ.

    Source: mmrazor's `L2Loss` with `normalize=True`.
    """
    same_shape(student, teacher, "features")
    return ((normalized(flat(student)) - normalized(flat(teacher))) ** 2).sum(-1).mean()


@loss("vid", takes="maps", learned=True)
def variational(student: Any, teacher: Any, *, variance: float = 5.0, eps: float = 1e-5) -> Any:
    """Negative logarithm of a normal density at the teacher's maps, without its constant, averaged over everything.

    Args:
        student: "mean" (N, C, H, W), and "scale" with one number a channel, of which log(1 + exp(scale)) + eps is the
            variance; or the mean alone.
        teacher: shape (N, C, H, W), floating; takes no gradient, though the student's side is learned.
        variance: > eps; of every channel where the mean comes alone: what training starts from.
        eps: > 0, the smallest variance.

    Returns:
        Scalar, of any sign: (mean - teacher)² / variance / 2 + log(variance) / 2.

    Raises:
        ShapeError: the mean has another shape than the teacher, or there are more or fewer scales than channels.
        UsageError: the variance is not above `eps`, or that not above 0.

    Source: Ahn et al. 2019, arXiv:1904.05835. Weight 1; the mean by three convolutions of 1 × 1 (RepDistiller).
    """
    teacher = constant(teacher)
    check_above(0, eps=eps)
    check_above(eps, variance=variance)
    if isinstance(student, dict):
        mean, scale = student["mean"], student["scale"]
    else:
        mean, scale = student, like([_scale_of(variance - eps)], student)
    check_maps(mean, teacher)
    same_shape(mean, teacher, "maps")
    scale = _by_channel(scale, teacher.shape[1], "scale")
    spread = eps - log_sigmoid(-scale)
    return 0.5 * ((mean - teacher) ** 2 / spread + namespace(spread).log(spread)).mean()


def _scale_of(variance: float) -> float:
    """The number of which log(1 + exp(number)) is the variance."""
    return variance + math.log(-math.expm1(-variance))  # the exponential of a large variance would overflow
