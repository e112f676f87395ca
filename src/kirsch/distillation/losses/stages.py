"""Losses on the feature maps of several stages and on the relations between successive stages."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from kirsch import figures, ops
from kirsch.distillation.losses.loss import check_convention, check_integer, check_maps, check_same_shape, loss
from kirsch.distillation.losses.maps import hierarchical_context
from kirsch.errors import ShapeError, UsageError

EXTRA_DIRECTIONS = 3
"""Number of additional singular vectors of the student to match with the teacher's, as in RepDistiller."""


@loss("fsp", takes="stages")
def flow(student: Any, teacher: Any, *, convention: str = "mean") -> Any:
    """Return the squared difference of the flow matrices (FSP), summed over pairs of successive stages.

    A flow matrix holds the inner products, over positions, of the channels of one stage and the channels of the next.

    Args:
        student, teacher: maps of two or more stages, shape (N, C, H, W) each, floating; sizes may differ. The larger
            map of a pair is pooled to the size of the other.
        convention: "mean" pools by the average, and averages the squared difference over samples and pairs of channels,
            as RepDistiller does; "torchdistill" pools by the maximum, takes the norm of the difference over the
            channels of the first stage, and sums the norms over the channels of the second.

    Returns:
        Scalar, >= 0; 0 if all flow matrices agree.

    Raises:
        ShapeError: there are fewer than two stages, or student and teacher differ in stages, samples or channels.
        UnknownNameError: the convention is unknown.

    Source: Yim et al. 2017, "A gift from knowledge distillation", equations 1 and 2. RepDistiller uses weight 50 in
        a separate phase before the other training.
    """
    check_convention(convention, ("mean", "torchdistill"))
    _check_stages(student, teacher)
    total = 0.0
    for (low_s, high_s), (low_t, high_t) in zip(pairwise(student), pairwise(teacher), strict=True):
        if convention == "mean":
            difference = _flow_matrix(*ops.pool_to_common_size(low_s, high_s)) - _flow_matrix(
                *ops.pool_to_common_size(low_t, high_t)
            )
            total = total + ops.mean(difference * difference)
        else:
            difference = _flow_matrix(*_max_pool_pair(low_s, high_s)) - _flow_matrix(*_max_pool_pair(low_t, high_t))
            total = total + ops.sum(ops.safe_sqrt(ops.sum(difference * difference, 1))) / difference.shape[0]
    return total


def _check_stages(student: Any, teacher: Any) -> None:
    """Raise a ShapeError unless student and teacher have the same number of stages, samples and channels."""
    if len(student) != len(teacher) or len(student) < len("ab"):
        raise ShapeError(
            f"The student has {figures.counted(len(student), 'stage')}, the teacher {len(teacher)}.",
            "Relations between stages need the same number of stages in student and teacher, at least two.",
        )
    for number, (maps_s, maps_t) in enumerate(zip(student, teacher, strict=True)):
        check_maps(maps_s, maps_t)
        if maps_s.shape[1] != maps_t.shape[1]:
            raise ShapeError(
                f"Stage {number} has {maps_s.shape[1]} channels in the student, {maps_t.shape[1]} in the teacher."
            )


def _flow_matrix(low: Any, high: Any) -> Any:
    """Return the mean over positions of the products of channels: (N, C, H, W) and (N, D, H, W) give (N, C, D)."""
    first, second = (ops.reshape(maps, (*maps.shape[:2], -1)) for maps in (low, high))
    return first @ ops.swapaxes(second, 1, 2) / first.shape[2]


def _max_pool_pair(low: Any, high: Any) -> tuple[Any, Any]:
    """Return two maps at the smaller height and width; larger maps are pooled by the maximum."""
    size = min(low.shape[2], high.shape[2]), min(low.shape[3], high.shape[3])
    return _adaptive_max_pool(low, size), _adaptive_max_pool(high, size)


def _adaptive_max_pool(maps: Any, size: tuple[int, int]) -> Any:
    """Return the maps pooled by the maximum to a height and width, as `F.adaptive_max_pool2d` does."""
    for axis, out_size in zip((2, 3), size, strict=True):
        in_size = maps.shape[axis]
        bounds = [(i * in_size // out_size, -(-(i + 1) * in_size // out_size)) for i in range(out_size)]
        moved = ops.swapaxes(maps, axis, 0)
        maps = ops.swapaxes(ops.stack([ops.amax(moved[start:end], 0) for start, end in bounds]), axis, 0)
    return maps


@loss("kd-svd", takes="stages")
def singular_vectors(student: Any, teacher: Any, *, count: int = 1, convention: str = "signed") -> Any:
    """Return the squared difference of Gaussian kernels between the singular vectors of successive stages.

    The vectors are the right singular vectors of a map as a matrix of positions and channels. For each of the teacher's
    vectors, the student's vector with the largest absolute cosine is used, with the teacher's sign.

    The gradient of the singular vectors is computed by perturbation theory. Terms with equal singular values, which
    would be infinite, are left out.

    Args:
        student, teacher: maps of two or more stages, shape (N, C, H, W) each, floating; sizes may differ.
        count: >= 1; number of singular vectors of the teacher to compare.
        convention: the sign of a singular vector is arbitrary, and the kernel depends on it. "signed" makes the largest
            entry of each of the teacher's vectors positive; "repdistiller" keeps the sign of the linear algebra
            library, so the value depends on the machine; "mdistiller" also keeps this sign, and uses the width of the
            map in place of the channels.

    Returns:
        Scalar, >= 0, summed over pairs of stages, averaged over samples; 0 if the vectors agree.

    Raises:
        ShapeError: there are fewer than two stages, or student and teacher differ in stages, samples or channels, or,
            for "mdistiller", in widths.
        UsageError: a map has fewer than `count` singular vectors.
        UnknownNameError: the convention is unknown.

    Source: Lee, Kim, Song 2018, "Self-supervised knowledge distillation using singular value decomposition", as
        RepDistiller computes it. Weight 1 (RepDistiller).
    """
    check_convention(convention, ("signed", "repdistiller", "mdistiller"))
    check_integer(1, count=count)
    _check_stages(student, teacher)
    if convention == "mdistiller":
        for maps_s, maps_t in zip(student, teacher, strict=True):
            check_same_shape(maps_s[:, :, 0], maps_t[:, :, 0], "rows of maps")
    most = min(min(_matrix(maps, convention).shape[1:]) for maps in (*student, *teacher))
    if count > most:
        raise UsageError(
            f"`count` is {count}; the smallest map has {most} singular vectors.", fix=f"Use at most {most}."
        )
    stages = [_matched_vectors(*pair, count, convention) for pair in zip(student, teacher, strict=True)]
    total = 0.0
    for before, after in pairwise(stages):
        kernel_s, kernel_t = (_kernel(after[side], before[side]) for side in (0, 1))
        total = total + ops.sum((kernel_s - kernel_t) ** 2) / kernel_s.shape[0]
    return total


def _kernel(after: Any, before: Any) -> Any:
    """Return exp(-(x - y)² / 8) for each of k vectors: (N, C, k) and (N, D, k) give (N, C, D, k)."""
    return ops.exp(-((after[:, :, None] - before[:, None]) ** 2) / 8)


def _matched_vectors(student: Any, teacher: Any, count: int, convention: str) -> tuple[Any, Any]:
    """Return singular vectors (N, C, k) of student and teacher, weighted by the teacher's singular values."""
    values, vectors_t = _right_vectors(_matrix(teacher, convention), count)
    _, vectors_s = _right_vectors(_matrix(student, convention), count + EXTRA_DIRECTIONS)
    if convention == "signed":
        magnitudes = ops.abs(vectors_t)
        is_largest = magnitudes == ops.amax(magnitudes, 2, keepdims=True)
        vectors_t = vectors_t * ops.sign(ops.sum(ops.where(is_largest, vectors_t, 0.0 * vectors_t), 2, keepdims=True))
    cosine = ops.detach(vectors_s @ ops.swapaxes(vectors_t, 1, 2))  # (N, k + 3, k)
    nearest = ops.abs(cosine) == ops.amax(ops.abs(cosine), 1, keepdims=True)
    selection = ops.where(nearest, ops.sign(cosine), 0.0 * cosine)
    weights = ops.normalize(values)[:, None]  # (N, 1, k)
    return ops.swapaxes(vectors_s, 1, 2) @ selection * weights, ops.swapaxes(vectors_t, 1, 2) * weights


def _matrix(maps: Any, convention: str) -> Any:
    """Reshape maps to (N, positions, channels), or to (N, channels · rows, columns) for "mdistiller"."""
    if convention == "mdistiller":
        return ops.reshape(maps, (maps.shape[0], -1, maps.shape[3]))
    return ops.swapaxes(ops.reshape(maps, (*maps.shape[:2], -1)), 1, 2)


def _right_vectors(matrix: Any, count: int) -> tuple[Any, Any]:
    """Return the largest singular values (N, k) of matrices (N, P, C) and the right singular vectors (N, k, C).

    The values have no gradient. The vectors have one: to first order, v_i changes by Σ_j v_j (v_jᵀ dG v_i) /
    (s_i² - s_j²) for G = XᵀX. Terms of values that are equal up to rounding are left out, because their vectors are
    only determined up to a rotation.
    """
    _, values, rows = ops.svd(ops.detach(matrix))  # (N, r), (N, r, C)
    values, rows = ops.detach(values), ops.detach(rows)
    gram = ops.swapaxes(matrix, 1, 2) @ matrix
    squares, top = values**2, rows[:, :count]
    rounding = 16 * ops.epsilon(matrix) * squares[:, :1, None]
    change = top @ (gram - ops.detach(gram))  # value 0, but with the gradient of v_iᵀ dG: (N, k, C)
    inside = change @ ops.swapaxes(rows, 1, 2)  # components along the singular vectors, (N, k, r)
    outside = change - inside @ rows  # component in the null space
    top_squares = squares[:, :count, None]
    shift = inside * _safe_inverse(top_squares - squares[:, None], rounding) @ rows
    return values[:, :count], top + shift + outside * _safe_inverse(top_squares, rounding)


def _safe_inverse(gaps: Any, rounding: Any) -> Any:
    """Return 1 / gap, or 0 where the gap is at most the rounding error."""
    is_clear = ops.abs(gaps) > rounding
    return ops.where(is_clear, 1.0 / ops.where(is_clear, gaps, 0.0 * gaps + 1.0), 0.0 * gaps)


@loss("reviewkd", takes="stages")
def reviewed(student: Any, teacher: Any, *, sizes: tuple[int, ...] = (4, 2, 1)) -> Any:
    """Return the sum of the hierarchical context losses (`hcl`) of all stages.

    Args:
        student, teacher: a list of maps (N, C, H, W), one for each stage; the student's maps are the outputs of the
            adapter "review".
        sizes: see `hcl`.

    Returns:
        Scalar, >= 0; 0 if all maps agree.

    Raises:
        ShapeError: the shapes of a stage differ, the numbers of stages differ, or there are no stages.
        UsageError: a size is not a positive integer.

    Source: Chen et al. 2021, arXiv:2104.09044, equation 6.
    """
    if len(student) != len(teacher):
        raise ShapeError(f"The student has {figures.counted(len(student), 'stage')}, the teacher {len(teacher)}.")
    pairs = zip(student, teacher, strict=True)
    return sum(hierarchical_context(maps_s, maps_t, sizes=sizes, axis=1) for maps_s, maps_t in pairs)
