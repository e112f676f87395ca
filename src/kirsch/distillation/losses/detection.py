"""Losses on what detectors put out: maps below dense heads, scores and boxes of dense heads, sets of queries.

Boxes are (center x, center y, width, height), as shares of the image, so that both terms of a box are of one size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from kirsch.distillation.arrays import (
    as_numpy,
    log_sigmoid,
    log_softmax,
    namespace,
    same_shape,
    weighted_mean,
)
from kirsch.distillation.losses.loss import loss
from kirsch.errors import ShapeError, UnknownNameError, UsageError

BEYOND = 1e30
"""The cost of a pair that is not finite: none is matched to it while another is left."""

TINY = 1e-12
"""The least sum of weights that something is divided by."""


# ------------------------------------------------------------------------------------------------ dense heads


@loss("detection-features", takes="maps")
def detection_features(student: Any, teacher: Any) -> Any:
    """Squared difference of maps, averaged over channels and over cells by how sure the teacher is of an object there.

    Args:
        student: maps, shape (N, C, H, W), or a dict with "maps".
        teacher: maps, shape (N, C, H, W), or a dict of "maps" and "scores": of each class in each cell before the
            logistic function, (N, K, H, W). A cell weighs as much as the largest probability in it; without scores all
            cells weigh 1.

    Returns:
        Scalar, >= 0; 0 when the maps agree wherever the teacher sees something.

    Raises:
        ShapeError: the shapes differ, or the scores are of other cells.
        UsageError: a dict has no "maps".

    Source: Chen et al. 2017 (NeurIPS), "Learning efficient object detection models with knowledge distillation"
        (imitation of maps); weighted as Ultralytics does, behind an adapter of 1 × 1 to the teacher's width.
    """
    near, far = _maps(student, "student"), _maps(teacher, "teacher")
    same_shape(near, far, "maps")
    difference = near - far
    squares = (difference * difference).mean(1)  # (N, H, W)
    xp = namespace(squares)
    weights = xp.ones_like(squares)
    if isinstance(teacher, dict) and "scores" in teacher:
        scores = teacher["scores"]
        if (len(scores), *scores.shape[2:]) != tuple(squares.shape):
            raise ShapeError(
                f"The teacher's scores have shape {tuple(scores.shape)}, its maps {tuple(far.shape)}.",
                "They must be of the same samples and cells.",
            )
        weights = xp.exp(xp.amax(log_sigmoid(scores), axis=1))
    return weighted_mean(squares, weights)


def _maps(side: Any, who: str) -> Any:
    if not isinstance(side, dict):
        return side
    if "maps" not in side:
        raise UsageError(f'The {who} gives {", ".join(sorted(side))}; "maps" are needed.')
    return side["maps"]


@loss("detection-response", takes="sets", over="contents")
def detection_response(
    student: dict[str, Any],
    teacher: dict[str, Any],
    *,
    box_weight: float = 5.0,
    giou_weight: float = 2.0,
    threshold: float = 0.5,
) -> Any:
    """Cross-entropy of each class in each cell, by how far student and teacher are apart, and distance of the boxes.

    Each class is a coin of its own, as in heads with a logistic function: a softmax would have the background, which is
    nearly everywhere, decide. A coin weighs |p_teacher - p_student|, so that the many cells in which both see nothing
    fade, and an object that the student alone sees is charged as one that it misses. The weight takes a gradient, too,
    as in the authors' code. Boxes are compared in the cells in which the teacher sees an object.

    Args:
        student, teacher: "scores" before the logistic function, (N, Q, K), and "boxes" as shares of the image,
            (N, Q, 4), of the same Q cells or anchors.
        box_weight: of Σ |difference| over the four numbers of a box, >= 0.
        giou_weight: of 1 - generalized intersection over union, >= 0.
        threshold: the teacher sees an object where its largest probability is above; 0 to 1.

    Returns:
        Scalar, >= 0: of classes, the sum over cells, divided by the number of those in which the teacher sees an
        object, or by 1; of boxes, the mean over these, weighted by the teacher's largest probability. 0 when scores and
        boxes agree. Boxes add nothing where the teacher sees no object at all.

    Raises:
        ShapeError: the shapes differ, or there is not one box a cell.
        UsageError: an option is out of range, or a side is no dict of scores and boxes.

    Source: classes after Yang et al. 2023, arXiv:2308.14286, and its code, which divides by the cells that labels
        assign an object to. Weights of the box are those of DETR (arXiv:2005.12872), the threshold is ours.
    """
    _check_weights(box_weight=box_weight, giou_weight=giou_weight)
    if not 0 <= threshold <= 1:
        raise UsageError(f"The threshold of objects is {threshold}; a probability from 0 to 1 is needed.")
    _check_sets(student, teacher)
    for part in ("scores", "boxes"):
        same_shape(student[part], teacher[part], part)
    xp = namespace(teacher["scores"])
    log_s, log_t = (log_sigmoid(side["scores"]) for side in (student, teacher))
    p_s, p_t = xp.exp(log_s), xp.exp(log_t)
    crossed = (1.0 - p_t) * student["scores"] - log_s  # -log(1 - p) is the score less log p
    sure = confidence(teacher["scores"], "sigmoid")
    seen = xp.where(sure > threshold, sure, 0.0 * sure)
    boxes = box_distance(student["boxes"], teacher["boxes"], box_weight, giou_weight)
    objects = (seen > 0).sum().clip(min=1)
    return (xp.abs(p_t - p_s) * crossed).sum() / objects + weighted_mean(boxes, seen)


# ------------------------------------------------------------------------------------------------ sets


@loss("detr", takes="sets", over="contents")
def detr(
    student: dict[str, Any],
    teacher: dict[str, Any],
    *,
    classes: str = "softmax",
    class_weight: float = 1.0,
    box_weight: float = 5.0,
    giou_weight: float = 2.0,
    empty_weight: float = 0.1,
) -> Any:
    """Distance of two sets of predictions, each of the teacher's with the student's that it is matched to.

    Queries have no order, so that number i of both need not be of one object. The matching is the one that makes this
    very loss smallest; the gradient holds it fixed. Each pair weighs as much as the teacher is sure of an object; its
    classes weigh no less than those of no object do, so that an object which the student alone sees is charged.

    Args:
        student, teacher: "scores" before the softmax, (N, Q, K), and "boxes" as shares of the image, (N, Q, 4). Q may
            differ: a student with more queries has some left that learn from labels alone; one with fewer learns from
            those that the teacher is surest of.
        classes: "softmax", of which the last class is no object (DETR), or "sigmoid", each class a coin of its own
            (Deformable DETR, DINO).
        class_weight: of the divergence of the classes, >= 0.
        box_weight: of Σ |difference| over the four numbers of a box, >= 0.
        giou_weight: of 1 - generalized intersection over union, >= 0.
        empty_weight: the least weight of the classes of a pair, >= 0: that of no object.

    Returns:
        Scalar, >= 0: the weighted mean of the divergences of the classes, and that of the distances of the boxes; 0
        when the teacher's predictions are among the student's, in any order.

    Raises:
        ShapeError: samples or classes differ, there is not one box a query, or no class beside "no object".
        UsageError: a weight is negative, or a side is no dict of scores and boxes.
        UnknownNameError: there is no such kind of classes.

    Source: Carion et al. 2020, arXiv:2005.12872, equations 1 and 2, and its weights 1, 5, 2, and 0.1 of no object;
        Chang et al. 2023, arXiv:2211.10156 (DETRDistill), for matching the teacher's predictions.
    """
    _check_weights(class_weight=class_weight, box_weight=box_weight, giou_weight=giou_weight, empty_weight=empty_weight)
    _check_sets(student, teacher)
    if classes == "softmax" and student["scores"].shape[-1] == 1:
        raise ShapeError(
            'The scores are of one class, which is "no object".', fix='State classes="sigmoid", or add a class.'
        )
    teacher = surest(teacher, classes, student["scores"].shape[1])
    log_s, log_t = logarithms(student["scores"], classes), logarithms(teacher["scores"], classes)
    shares = namespace(log_t).exp(log_t)
    # Σ p (log p - log q) of all pairs (N, Q_s, Q_t) as a product of matrices: with the classes spelt out it would be
    # larger by a factor of K.
    divergence = (shares * log_t).sum(-1)[:, None, :] - log_s @ shares.swapaxes(1, 2)
    boxes = box_distance(student["boxes"][:, :, None], teacher["boxes"][:, None], box_weight, giou_weight)
    sure = confidence(teacher["scores"], classes)
    told = sure.clip(min=empty_weight)
    shares_of_classes, shares_of_boxes = told / told.sum().clip(min=TINY), sure / sure.sum().clip(min=TINY)
    costs = class_weight * divergence * shares_of_classes[:, None] + boxes * shares_of_boxes[:, None]
    return costs[matched(as_numpy(costs))].sum()


def surest(side: dict[str, Any], classes: str, count: int) -> dict[str, Any]:
    """The queries of which a side is surest, as many as are to be matched, at most all.

    Left to the least sum, a student with fewer queries would be matched to those of which the teacher is least sure,
    since they cost least.
    """
    sure = as_numpy(confidence(side["scores"], classes))
    order = np.argsort(-sure, axis=-1, kind="stable")[:, :count]
    return {name: part[np.arange(len(order))[:, None], order] for name, part in side.items()}


def matched(costs: Any) -> tuple[Any, Any, Any]:
    """The pairs with the least sum of costs in each sample, as indices (samples, rows, columns).

    Args:
        costs: shape (N, R, C), R >= C, numpy; each column gets a row of its own.
    """
    found = []
    for sample, cost in enumerate(costs):
        rows, columns = linear_sum_assignment(np.nan_to_num(cost, nan=BEYOND, posinf=BEYOND))
        found.append((np.full(len(rows), sample), rows, columns))
    samples, rows, columns = (np.concatenate(part) for part in zip(*found, strict=True))
    return samples, rows, columns


# ------------------------------------------------------------------------------------------------ classes and boxes


def logarithms(scores: Any, classes: str) -> Any:
    """Of the probability of each class (..., K), or, of coins, of heads and then of tails (..., 2 K)."""
    if classes == "softmax":
        return log_softmax(scores)
    if classes == "sigmoid":
        return namespace(scores).concatenate([log_sigmoid(scores), log_sigmoid(-scores)], axis=-1)
    raise UnknownNameError("kind of classes", classes, ("softmax", "sigmoid"))


def confidence(scores: Any, classes: str) -> Any:
    """The largest probability of a class that is an object, (...) for scores (..., K)."""
    objects = log_softmax(scores)[..., :-1] if classes == "softmax" else log_sigmoid(scores)
    xp = namespace(scores)
    return xp.exp(xp.amax(objects, axis=-1))


def box_distance(student: Any, teacher: Any, box_weight: float, giou_weight: float) -> Any:
    """Weighted sum of the absolute differences and of 1 - GIoU, (...) for boxes (..., 4) that broadcast."""
    xp = namespace(student)
    return box_weight * xp.abs(student - teacher).sum(-1) + giou_weight * (1.0 - giou(student, teacher))


def giou(first: Any, second: Any) -> Any:
    """Generalized intersection over union, from -1 to 1, (...) for boxes (..., 4) that broadcast.

    A width or height below 0 counts as 0. Boxes without an area have no union, and 0 stands for the ratio; where their
    hull has no area either, they are at one point or on one line, and 1 is the result.

    Source: Rezatofighi et al. 2019, arXiv:1902.09630, algorithm 1.
    """
    xp = namespace(first)
    near, far = _corners(first), _corners(second)
    inner = (xp.minimum(near[1], far[1]) - xp.maximum(near[0], far[0])).clip(min=0)
    outer = xp.maximum(near[1], far[1]) - xp.minimum(near[0], far[0])
    overlap, hull = inner[..., 0] * inner[..., 1], outer[..., 0] * outer[..., 1]
    union = _area(near) + _area(far) - overlap
    ratio, beyond = overlap / _or_one(union), (hull - union) / _or_one(hull)
    return xp.where(hull > 0, ratio - beyond, xp.ones_like(hull))


def _or_one(areas: Any) -> Any:
    """The areas, with 1 for those that are 0."""
    xp = namespace(areas)
    return xp.where(areas > 0, areas, xp.ones_like(areas))


def _corners(boxes: Any) -> tuple[Any, Any]:
    """The corners of least and of greatest x and y, each (..., 2)."""
    half = 0.5 * boxes[..., 2:].clip(min=0)
    return boxes[..., :2] - half, boxes[..., :2] + half


def _area(corners: tuple[Any, Any]) -> Any:
    sides = corners[1] - corners[0]
    return sides[..., 0] * sides[..., 1]


# ------------------------------------------------------------------------------------------------ refusals


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not weight >= 0:
            raise UsageError(f"`{name}` is {weight}; a number of at least 0 is needed.")


def _check_sets(student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Raise an error unless both are scores and boxes of the same samples and classes, with a box for each query."""
    for who, side in (("student", student), ("teacher", teacher)):
        missing = [name for name in ("scores", "boxes") if not isinstance(side, dict) or name not in side]
        if missing:
            given = f"gives {', '.join(sorted(side)) or 'nothing'}" if isinstance(side, dict) else "gives one array"
            raise UsageError(f'The {who} {given}; a dict of "scores" and "boxes" is needed.')
        if side["scores"].ndim != len("NQK"):
            raise ShapeError(f"The {who}'s scores have shape {tuple(side['scores'].shape)}; (N, Q, K) is needed.")
    shapes = [tuple(side["scores"].shape) for side in (student, teacher)]
    if shapes[0][::2] != shapes[1][::2]:
        raise ShapeError(
            f"The student's scores have shape {shapes[0]}, the teacher's {shapes[1]}.",
            "They must be of the same samples for the same classes; the numbers of queries may differ.",
        )
    for who, side, shape in zip(("student", "teacher"), (student, teacher), shapes, strict=True):
        if tuple(side["boxes"].shape) != (*shape[:2], 4):
            raise ShapeError(f"The {who}'s boxes have shape {tuple(side['boxes'].shape)}; {(*shape[:2], 4)} is needed.")
