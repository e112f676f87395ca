"""Losses of detectors: feature maps, logits and boxes of dense heads, and the sets of predictions of DETR models.

A dense head makes one prediction for each cell, a position of the feature map. A DETR model makes one for each query.

Boxes are (center x, center y, width, height), relative to the image size, so that the absolute difference
and the GIoU of two boxes have a similar magnitude.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from kirsch import ops
from kirsch.distillation.losses.loss import check_same_shape, loss
from kirsch.errors import ShapeError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_COST = 1e30
"""Cost of a pair in place of NaN or infinity. Such a pair is only matched if no other is left."""

SMALLEST_SUM = 1e-12
"""Lower bound of a sum of weights before a division."""


# ------------------------------------------------------------------------------------------------ dense heads


@loss("detection-features", takes="maps")
def detection_features(student: Any, teacher: Any) -> Any:
    """Return the squared difference of feature maps, with each cell weighted by the teacher's confidence in an object.

    Args:
        student: maps, shape (N, C, H, W), or a dict with "maps".
        teacher: maps, shape (N, C, H, W), or a dict of "maps" and "logits", the logits of each class in each cell,
            (N, K, H, W), before a sigmoid. The weight of a cell is its largest probability, or 1 without "logits".

    Returns:
        Scalar, >= 0, averaged over channels and, with the weights, over cells; 0 if the maps agree in the cells with a
        weight above 0.

    Raises:
        ShapeError: the shapes differ, or the logits have other cells than the maps.
        UsageError: a dict has no "maps".

    Source: Chen et al. 2017 (NeurIPS), "Learning efficient object detection models with knowledge distillation"
        (imitation of maps), with the weights of cells as in Ultralytics. There, a 1 × 1 convolution first maps the
        student to the teacher's width.
    """
    maps_s, maps_t = _maps(student, "student"), _maps(teacher, "teacher")
    check_same_shape(maps_s, maps_t, "maps")
    difference = maps_s - maps_t
    squares = ops.mean(difference * difference, 1)  # (N, H, W)
    weights = ops.ones_like(squares)
    if isinstance(teacher, dict) and "logits" in teacher:
        logits = teacher["logits"]
        if (logits.shape[0], *logits.shape[2:]) != tuple(squares.shape):
            raise ShapeError(
                f"The teacher's logits have shape {tuple(logits.shape)}, its maps {tuple(maps_t.shape)}.",
                "They must be of the same samples and cells.",
            )
        weights = ops.exp(ops.amax(ops.log_sigmoid(logits), axis=1))
    return ops.weighted_mean(squares, weights)


def _maps(side: Any, role: str) -> Any:
    if not isinstance(side, dict):
        return side
    if "maps" not in side:
        raise UsageError(f'The {role} returns {", ".join(sorted(side))}; "maps" are needed.')
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
    """Return the weighted binary cross-entropy of the classes, plus the distance of the boxes, for dense heads.

    Each class is a Bernoulli distribution, as in heads with a sigmoid; in a softmax the background, which fills most
    cells, would dominate. The weight of a class in a cell is |p_teacher - p_student|, so that the many cells without
    objects add little, and an object that only the student predicts adds as much as one that only the teacher predicts.
    The gradient flows through the weight, too, as in the authors' code. Boxes are compared in the cells where the
    teacher detects an object.

    Args:
        student, teacher: dict of "logits", the logits before a sigmoid, (N, Q, K), and "boxes" relative to the image
            size, (N, Q, 4), of the same Q cells or anchors.
        box_weight: weight of Σ |difference| over the four numbers of a box, >= 0.
        giou_weight: weight of 1 - generalized intersection over union, >= 0.
        threshold: the teacher detects an object where its largest probability is above the threshold; 0 to 1.

    Returns:
        Scalar, >= 0; 0 if logits and boxes agree. The term of the classes is the sum over cells, divided by the number
        of cells with an object, at least 1. The term of the boxes is the mean over these cells, weighted by the
        teacher's largest probability, or 0 if there are none.

    Raises:
        ShapeError: the shapes differ, or the number of boxes is not the number of cells.
        UsageError: an option is out of range, or a side is not a dict of "logits" and "boxes".

    Source: boxes: L1 distance and generalized IoU with the weights of DETR; classes: Yang et al. 2023,
        arXiv:2308.14286, and its code, which divides by the number of cells to which the labels assign an object. DETR
        is arXiv:2005.12872. The threshold is Kirsch's own choice.
    """
    _check_weights(box_weight=box_weight, giou_weight=giou_weight)
    if not 0 <= threshold <= 1:
        raise UsageError(f"`threshold` is {threshold}; a probability from 0 to 1 is needed.")
    _check_sets(student, teacher)
    for part in ("logits", "boxes"):
        check_same_shape(student[part], teacher[part], part)
    log_s, log_t = (ops.log_sigmoid(side["logits"]) for side in (student, teacher))
    p_s, p_t = ops.exp(log_s), ops.exp(log_t)
    cross_entropy = (1.0 - p_t) * student["logits"] - log_s  # since -log(1 - p) = logit - log p
    confident = confidence(teacher["logits"], "sigmoid")
    weights = ops.where(confident > threshold, confident, 0.0 * confident)
    boxes = box_distance(student["boxes"], teacher["boxes"], box_weight, giou_weight)
    objects = ops.clip(ops.cast(ops.count_nonzero(weights > 0), ops.dtype(weights)), 1)
    return ops.sum(ops.abs(p_t - p_s) * cross_entropy) / objects + ops.weighted_mean(boxes, weights)


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
    """Return the distance of each prediction of the teacher from the student's prediction that is matched with it.

    Queries have no order, so query i of student and teacher may belong to different objects. The matching minimizes
    this loss, and no gradient flows through it. The weight of a pair is the teacher's confidence in an object. For the
    divergence of the classes, the weight is at least `empty_weight`, so that an object that only the student detects
    adds to the loss.

    Args:
        student, teacher: dict of "logits", (N, Q, K), and "boxes" relative to the image size, (N, Q, 4). Q may differ:
            if the student has more queries, its unmatched queries learn from labels alone; if it has fewer,
            it learns from the teacher's most confident queries.
        classes: "softmax", whose last class is "no object" (DETR), or "sigmoid" for independent classes (Deformable
            DETR, DINO).
        class_weight: weight of the divergence of the classes, >= 0.
        box_weight: weight of Σ |difference| over the four numbers of a box, >= 0.
        giou_weight: weight of 1 - generalized intersection over union, >= 0.
        empty_weight: smallest weight of the classes of a pair, >= 0, for pairs without an object.

    Returns:
        Scalar, >= 0: the weighted mean of the divergences of the classes plus the weighted mean of the distances of the
        boxes; 0 if the teacher's predictions are among the student's, in any order.

    Raises:
        ShapeError: samples or classes differ, the number of boxes is not the number of queries, or "no object" is the
            only class.
        UsageError: a weight is negative, or a side is not a dict of "logits" and "boxes".
        UnknownNameError: `classes` is unknown.

    Source: Carion et al. 2020, arXiv:2005.12872, equations 1 and 2, and its weights 1, 5, 2, and 0.1 for "no object";
        Chang et al. 2023, arXiv:2211.10156 (DETRDistill), for the matching of the teacher's predictions.
    """
    _check_weights(class_weight=class_weight, box_weight=box_weight, giou_weight=giou_weight, empty_weight=empty_weight)
    _check_sets(student, teacher)
    if classes == "softmax" and student["logits"].shape[-1] == 1:
        raise ShapeError(
            'The logits have one class, which is "no object".', fix='Set classes="sigmoid", or add a class.'
        )
    teacher = most_confident(teacher, classes, student["logits"].shape[1])
    log_s, log_t = (
        class_log_probabilities(student["logits"], classes),
        class_log_probabilities(teacher["logits"], classes),
    )
    p_t = ops.exp(log_t)
    # Σ p (log p - log q) of all pairs (N, Q_s, Q_t) as a matrix product, which needs K times less memory than
    # broadcasting over the classes.
    divergence = ops.sum(p_t * log_t, -1)[:, None, :] - log_s @ ops.swapaxes(p_t, 1, 2)
    boxes = box_distance(student["boxes"][:, :, None], teacher["boxes"][:, None], box_weight, giou_weight)
    box_weights = confidence(teacher["logits"], classes)
    class_weights = ops.clip(box_weights, empty_weight)
    class_weights, box_weights = (
        weights / ops.clip(ops.sum(weights), SMALLEST_SUM) for weights in (class_weights, box_weights)
    )
    costs = class_weight * divergence * class_weights[:, None] + boxes * box_weights[:, None]
    rows = match_pairs(ops.convert_to_numpy(costs))
    return ops.sum(ops.take_along_axis(costs, rows[:, None], axis=1))


def most_confident(side: dict[str, Any], classes: str, count: int) -> dict[str, Any]:
    """Return the `count` queries with the highest confidence, or all if there are fewer.

    Without this selection, a student with fewer queries would be matched to the teacher's least confident queries,
    because the costs of these queries are the lowest.
    """
    confident = ops.convert_to_numpy(confidence(side["logits"], classes))
    order = np.argsort(-confident, axis=-1, kind="stable")[:, :count]  # (N, count)
    return {name: ops.take_along_axis(array, order[:, :, None], axis=1) for name, array in side.items()}


def match_pairs(costs: NDArray[Any]) -> NDArray[np.int64]:
    """Return the row that is matched to each column, shape (N, C), so that the sum of costs of each sample is smallest.

    Args:
        costs: shape (N, R, C), R >= C; each column is matched to a different row.
    """
    matched = np.empty((costs.shape[0], costs.shape[2]), np.int64)
    for sample, cost in enumerate(costs):
        rows, columns = linear_sum_assignment(np.nan_to_num(cost, nan=LARGEST_COST, posinf=LARGEST_COST))
        matched[sample, columns] = rows
    return matched


# ------------------------------------------------------------------------------------------------ classes and boxes


def class_log_probabilities(logits: Any, classes: str) -> Any:
    """Return log p of each class (..., K) for a softmax, or log p and then log(1 - p), (..., 2 K), for a sigmoid."""
    if classes == "softmax":
        return ops.log_softmax(logits)
    if classes == "sigmoid":
        return ops.concatenate([ops.log_sigmoid(logits), ops.log_sigmoid(-logits)], axis=-1)
    raise UnknownNameError("kind of classes", classes, ("softmax", "sigmoid"))


def confidence(logits: Any, classes: str) -> Any:
    """Return the largest probability of any class but "no object", (...) for logits (..., K)."""
    objects = ops.log_softmax(logits)[..., :-1] if classes == "softmax" else ops.log_sigmoid(logits)
    return ops.exp(ops.amax(objects, axis=-1))


def box_distance(student: Any, teacher: Any, box_weight: float, giou_weight: float) -> Any:
    """Return the weighted sum of the absolute differences and of 1 - GIoU, (...) for boxes (..., 4) that broadcast."""
    return box_weight * ops.sum(ops.abs(student - teacher), -1) + giou_weight * (1.0 - giou(student, teacher))


def giou(first: Any, second: Any) -> Any:
    """Return the generalized intersection over union, from -1 to 1, (...) for boxes (..., 4) that broadcast.

    A width or height below 0 counts as 0. For two boxes without area the intersection over union counts as 0; if their
    hull has no area either, the result is 1.

    Source: Rezatofighi et al. 2019, arXiv:1902.09630, algorithm 1.
    """
    low_1, high_1 = _corners(first)
    low_2, high_2 = _corners(second)
    inner = ops.clip(ops.minimum(high_1, high_2) - ops.maximum(low_1, low_2), 0)
    outer = ops.maximum(high_1, high_2) - ops.minimum(low_1, low_2)
    overlap, hull = inner[..., 0] * inner[..., 1], outer[..., 0] * outer[..., 1]
    union = _area(high_1 - low_1) + _area(high_2 - low_2) - overlap
    iou, outside = overlap / _replace_zeros(union), (hull - union) / _replace_zeros(hull)
    return ops.where(hull > 0, iou - outside, ops.ones_like(hull))


def _replace_zeros(areas: Any) -> Any:
    """Return the areas, with 1 in place of 0."""
    return ops.where(areas > 0, areas, ops.ones_like(areas))


def _corners(boxes: Any) -> tuple[Any, Any]:
    """Return the corners with the smallest and with the largest x and y, each (..., 2)."""
    half = 0.5 * ops.clip(boxes[..., 2:], 0)
    return boxes[..., :2] - half, boxes[..., :2] + half


def _area(sides: Any) -> Any:
    return sides[..., 0] * sides[..., 1]


# ------------------------------------------------------------------------------------------------ checks


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not weight >= 0:
            raise UsageError(f"`{name}` is {weight}; a number of at least 0 is needed.")


def _check_sets(student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Raise an error unless both sides have logits and boxes of the same samples and classes, one box per query."""
    for role, side in (("student", student), ("teacher", teacher)):
        missing = [name for name in ("logits", "boxes") if not isinstance(side, dict) or name not in side]
        if missing:
            found = f"{', '.join(sorted(side)) or 'an empty dict'}" if isinstance(side, dict) else "one array"
            raise UsageError(f'The {role} returns {found}; a dict of "logits" and "boxes" is needed.')
        if len(side["logits"].shape) != len("NQK"):
            raise ShapeError(f"The {role}'s logits have shape {tuple(side['logits'].shape)}; (N, Q, K) is needed.")
    shapes = [tuple(side["logits"].shape) for side in (student, teacher)]
    if shapes[0][::2] != shapes[1][::2]:
        raise ShapeError(
            f"The student's logits have shape {shapes[0]}, the teacher's {shapes[1]}.",
            "They must be of the same samples for the same classes; the numbers of queries may differ.",
        )
    for role, side, shape in zip(("student", "teacher"), (student, teacher), shapes, strict=True):
        if tuple(side["boxes"].shape) != (*shape[:2], 4):
            raise ShapeError(
                f"The {role}'s boxes have shape {tuple(side['boxes'].shape)}; {(*shape[:2], 4)} is needed."
            )
