"""Losses on how maps of one network follow from each other, stage after stage."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from kirsch.distillation.arrays import check_maps, constant, namespace, normalized, root, same_shape, same_size
from kirsch.distillation.losses.loss import check_convention, check_whole, loss
from kirsch.distillation.losses.maps import hierarchical_context
from kirsch.errors import ShapeError, UsageError

SPARE = 3
"""How many more directions of the student are looked through for those of the teacher, as RepDistiller does."""


@loss("fsp", takes="stages")
def flow(student: Any, teacher: Any, *, convention: str = "mean") -> Any:
    """Squared difference of how the channels of one stage go with those of the next, summed over pairs of stages.

    Args:
        student, teacher: maps of two or more stages, shape (N, C, H, W) each, floating; sizes may differ. Of a stage
            and the next, the larger map is brought to the size of the other.
        convention: "mean" averages larger maps, and the squared difference of the products over samples and pairs of
            channels, as RepDistiller does; "torchdistill" takes the maximum of places, and sums over the second
            channel the length of the difference along the first.

    Returns:
        Scalar, >= 0; 0 when all products agree.

    Raises:
        ShapeError: there are fewer than two stages, or other stages, samples or channels than the teacher has.
        UnknownNameError: there is no such convention.

    Source: Yim et al. 2017, "A gift from knowledge distillation", equations 1 and 2. Weight 50 in a phase of its own
        before other training (RepDistiller).
    """
    check_convention(convention, ("mean", "torchdistill"))
    _check_stages(student, teacher)
    total = 0.0
    for (low_s, high_s), (low_t, high_t) in zip(pairwise(student), pairwise(teacher), strict=True):
        if convention == "mean":
            difference = _products(*same_size(low_s, high_s)) - _products(*same_size(low_t, high_t))
            total = total + (difference * difference).mean()
        else:
            difference = _products(*_same_peaks(low_s, high_s)) - _products(*_same_peaks(low_t, high_t))
            total = total + root((difference * difference).sum(1)).sum() / len(difference)
    return total


def _check_stages(student: Any, teacher: Any) -> None:
    """Raise a ShapeError unless both are two or more stages with the same samples and channels."""
    if len(student) != len(teacher) or len(student) < len("ab"):
        raise ShapeError(
            f"The student gives {len(student)} stages, the teacher {len(teacher)}.",
            "How one stage follows from another needs two or more of each, and as many.",
        )
    for number, (own, its) in enumerate(zip(student, teacher, strict=True)):
        check_maps(own, its)
        if own.shape[1] != its.shape[1]:
            raise ShapeError(
                f"Stage {number} has {own.shape[1]} channels in the student, {its.shape[1]} in the teacher."
            )


def _products(low: Any, high: Any) -> Any:
    """Mean over places of the products of channels: (N, C, H, W) and (N, D, H, W) give (N, C, D)."""
    first, second = (part.reshape(*part.shape[:2], -1) for part in (low, high))
    return first @ second.swapaxes(1, 2) / first.shape[2]


def _same_peaks(low: Any, high: Any) -> tuple[Any, Any]:
    """Both maps at the smaller height and width; of larger ones, the maximum of the places that fall together."""
    size = min(low.shape[2], high.shape[2]), min(low.shape[3], high.shape[3])
    return _peaks(low, size), _peaks(high, size)


def _peaks(maps: Any, size: tuple[int, int]) -> Any:
    """Maximum of a map in as many spans of its height and width, as adaptive pooling lays them."""
    xp = namespace(maps)
    for axis, wanted in zip((2, 3), size, strict=True):
        count = maps.shape[axis]
        spans = [range(i * count // wanted, -(-(i + 1) * count // wanted)) for i in range(wanted)]
        moved = maps.swapaxes(axis, 0)
        maps = xp.stack([xp.amax(moved[span.start : span.stop], 0) for span in spans]).swapaxes(axis, 0)
    return maps


@loss("kd-svd", takes="stages")
def singular_vectors(student: Any, teacher: Any, *, count: int = 1, convention: str = "signed") -> Any:
    """Squared difference of how the main directions of one stage lie to those of the next, by a Gaussian kernel.

    The directions are the right singular vectors of a map as a matrix of places and channels. Of the student's first,
    those that lie nearest to the teacher's are taken, and turned to its side.

    The gradient goes through the vectors by perturbation theory: it is that of the decomposition, without what singular
    values that are equal would make infinite.

    Args:
        student, teacher: maps of two or more stages, shape (N, C, H, W) each, floating; sizes may differ.
        count: >= 1; how many directions of the teacher are compared.
        convention: a singular vector has no sign of its own, and the kernel sees the sign. "signed" makes the largest
            entry of each of the teacher's positive; "repdistiller" keeps what the linear algebra at hand gives, so that
            the value is that of a machine; "mdistiller" does too, and takes the width of the map where the channels
            stand otherwise.

    Returns:
        Scalar, >= 0, summed over pairs of stages, averaged over samples; 0 when the directions agree.

    Raises:
        ShapeError: there are fewer than two stages, or other stages, samples or channels than the teacher has; for
            "mdistiller", another width.
        UsageError: a map has fewer directions than are compared.
        UnknownNameError: there is no such convention.

    Source: Lee, Kim, Song 2018, "Self-supervised knowledge distillation using singular value decomposition", as
        RepDistiller computes it. Weight 1 (RepDistiller).
    """
    check_convention(convention, ("signed", "repdistiller", "mdistiller"))
    check_whole(1, count=count)
    _check_stages(student, teacher)
    if convention == "mdistiller":
        for own, its in zip(student, teacher, strict=True):
            same_shape(own[:, :, 0], its[:, :, 0], "rows of maps")
    most = min(min(_matrix(part, convention).shape[1:]) for part in (*student, *teacher))
    if count > most:
        raise UsageError(f"`count` is {count}; the smallest map has {most} directions.", fix=f"Choose at most {most}.")
    stages = [_directions(*pair, count, convention) for pair in zip(student, teacher, strict=True)]
    total = 0.0
    for before, after in pairwise(stages):
        own, its = (_closeness(after[side], before[side]) for side in (0, 1))
        total = total + ((own - its) ** 2).sum() / len(own)
    return total


def _closeness(after: Any, before: Any) -> Any:
    """exp(-(x - y)² / 8) of (N, C, k) with (N, D, k), for each of k directions: (N, C, D, k)."""
    return namespace(after).exp(-((after[:, :, None] - before[:, None]) ** 2) / 8)


def _directions(student: Any, teacher: Any, count: int, convention: str) -> tuple[Any, Any]:
    """Main directions (N, C, k) of student and teacher at one stage, times the teacher's share of each."""
    xp = namespace(student)
    shares, its = _right_vectors(_matrix(teacher, convention), count)
    _, own = _right_vectors(_matrix(student, convention), count + SPARE)
    if convention == "signed":
        largest = xp.amax(abs(its), 2, keepdims=True)
        peak = xp.where(abs(its) == largest, its, 0.0 * its).sum(2, keepdims=True)
        its = its * xp.sign(peak)
    cosine = constant(own @ its.swapaxes(1, 2))  # (N, k + 3, k)
    nearest = abs(cosine) == xp.amax(abs(cosine), 1, keepdims=True)
    chosen = xp.where(nearest, xp.sign(cosine), 0.0 * cosine)
    weights = normalized(shares)[:, None]  # (N, 1, k)
    return own.swapaxes(1, 2) @ chosen * weights, its.swapaxes(1, 2) * weights


def _matrix(maps: Any, convention: str) -> Any:
    """A map as (N, places, channels), or as (N, channels and rows, columns)."""
    if convention == "mdistiller":
        return maps.reshape(len(maps), -1, maps.shape[3])
    return maps.reshape(*maps.shape[:2], -1).swapaxes(1, 2)


def _right_vectors(matrix: Any, count: int) -> tuple[Any, Any]:
    """The largest singular values (N, k) of matrices (N, P, C), held constant, and right vectors (N, k, C).

    The vectors carry a gradient: to first order, v_i moves by Σ_j v_j (v_jᵀ dG v_i) / (s_i² - s_j²) for G = XᵀX. Where
    two values are equal to rounding, any rotation of both vectors is as good, and none is followed.
    """
    xp = namespace(matrix)
    _, values, rows = xp.linalg.svd(constant(matrix), full_matrices=False)  # (N, r), (N, r, C)
    values, rows = constant(values), constant(rows)
    gram = matrix.swapaxes(1, 2) @ matrix
    squares, top = values**2, rows[:, :count]
    floor = 16 * float(xp.finfo(matrix.dtype).eps) * squares[:, :1, None]
    force = top @ (gram - constant(gram))  # zero, and yet it moves: (N, k, C)
    inside = force @ rows.swapaxes(1, 2)  # along the vectors there are, (N, k, r)
    beside = force - inside @ rows  # along those whose singular value is 0
    own = squares[:, :count, None]
    moved = (inside * _inverse(own - squares[:, None], floor)) @ rows + beside * _inverse(own, floor)
    return values[:, :count], top + moved


def _inverse(gaps: Any, floor: Any) -> Any:
    """1 / gap, or 0 where the gap is rounding."""
    xp = namespace(gaps)
    clear = abs(gaps) > floor
    return xp.where(clear, 1.0 / xp.where(clear, gaps, 0.0 * gaps + 1.0), 0.0 * gaps)


@loss("reviewkd", takes="stages")
def reviewed(student: Any, teacher: Any, *, sizes: tuple[int, ...] = (4, 2, 1)) -> Any:
    """The hierarchical context loss of each stage, added up.

    Args:
        student, teacher: a list of maps (N, C, H, W) for each stage; the student's are those that the adapter "review"
            fuses.
        sizes: see `hcl`.

    Returns:
        Scalar, >= 0; 0 when all maps agree.

    Raises:
        ShapeError: the shapes of a stage differ, one has more stages, or there are none.
        UsageError: a size is none.

    Source: Chen et al. 2021, arXiv:2104.09044, equation 6.
    """
    if len(student) != len(teacher):
        raise ShapeError(f"The student gives {len(student)} stages, the teacher {len(teacher)}.")
    return sum(hierarchical_context(own, its, sizes=sizes) for own, its in zip(student, teacher, strict=True))
