"""Losses of detectors: closed forms, weights by confidence, and matching compared with all permutations."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from distillation.examples import softmax
from kirsch.distillation.losses.detection import (
    confidence,
    detection_features,
    detection_response,
    detr,
    giou,
    match_pairs,
    most_confident,
)
from kirsch.errors import ShapeError, UnknownNameError, UsageError
from kirsch.testing import LOSS_CHECKS


def random_outputs(seed, queries, samples=2, classes=4):
    """Return the outputs of a detector: random logits, and boxes with an area."""
    random = np.random.default_rng(seed)
    return {
        "logits": 2 * random.standard_normal((samples, queries, classes)),
        "boxes": random.uniform(0.1, 0.6, (samples, queries, 4)),
    }


def tensors(outputs):
    return {name: torch.from_numpy(part) for name, part in outputs.items()}


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


# ------------------------------------------------------------------------------------------------ boxes


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 0.4], 1),
        # Unit squares that overlap by half: 0.5 / 1.5, and the hull equals the union.
        ([0.5, 0.5, 1, 1], [1.0, 0.5, 1, 1], 1 / 3),
        # Unit squares that touch at a side: no overlap, no gap.
        ([0.5, 0.5, 1, 1], [1.5, 0.5, 1, 1], 0),
        # Unit squares with a gap of 1: 1 of the hull's area of 3 is outside the union.
        ([0.5, 0.5, 1, 1], [2.5, 0.5, 1, 1], -1 / 3),
        # Unit squares that overlap by 1/4 at a corner: union 7/4, hull 9/4.
        ([0.5, 0.5, 1, 1], [1.0, 1.0, 1, 1], 1 / 7 - 2 / 9),
        # One inside the other.
        ([0.5, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.5], 1 / 4),
        # A negative width counts as 0: hull and union are the unit square.
        ([0.5, 0.5, 1, 1], [0.5, 0.5, -0.5, 0.5], 0),
        # A box equals itself even if it is tiny or has no area.
        ([0.5, 0.5, 1e-7, 1e-7], [0.5, 0.5, 1e-7, 1e-7], 1),
        ([0.5, 0.5, 0, 0.2], [0.5, 0.5, 0, 0.2], 1),
        ([0.5, 0.5, -1, -1], [0.5, 0.5, 0, 0], 1),
        # Two points: their hull has an area, but their union has none.
        ([0.2, 0.2, 0, 0], [0.5, 0.5, 0, 0], -1),
    ],
)
def test_overlap_of_boxes_equals_its_closed_form(framework, first, second, expected):
    for pair in ((first, second), (second, first)):
        assert float(giou(*(framework(np.array(box, float)) for box in pair))) == pytest.approx(expected, abs=1e-15)


def test_boxes_without_an_area_have_finite_gradients():
    first = torch.tensor([[0.5, 0.5, 0.0, 0.2], [0.2, 0.2, 0.0, 0.0]], requires_grad=True)
    giou(first, torch.tensor([[0.5, 0.5, 0.0, 0.2], [0.5, 0.5, 0.0, 0.0]])).sum().backward()
    assert torch.isfinite(first.grad).all()


@given(st.integers(0, 10_000))
@settings(deadline=None, derandomize=True)
def test_giou_is_bounded_and_invariant_to_shifts_and_scale(seed):
    first, second = np.random.default_rng(seed).uniform(0.05, 1, (2, 20, 4))
    value = giou(first, second)
    assert (value > -1).all()
    assert (value <= 1).all()
    moved = [np.concatenate([3 * box[:, :2] + 7, 3 * box[:, 2:]], 1) for box in (first, second)]
    np.testing.assert_allclose(giou(*moved), value, atol=1e-12)


# ------------------------------------------------------------------------------------------------ maps


def test_cells_are_weighted_by_the_largest_probability(framework):
    """Squared differences 4 and 9 in two cells with largest probabilities 3/4 and 1/4."""
    student, maps = framework([[[[2.0, 3.0]]]]), framework(np.zeros((1, 1, 1, 2)))
    logits = framework(np.log([[[[3.0, 0.25]], [[0.25, 1 / 3]]]]))  # odds
    value = float(detection_features(student, {"maps": maps, "logits": logits}))
    assert value == pytest.approx(0.75 * 4 + 0.25 * 9, rel=1e-13)
    assert float(detection_features(student, maps)) == 6.5


def test_the_gradient_of_feature_maps_is_weighted_and_reaches_the_student_only():
    random = np.random.default_rng(0)
    student, maps = (torch.from_numpy(part) for part in random.standard_normal((2, 2, 3, 4, 4)))
    logits = torch.from_numpy(random.standard_normal((2, 5, 4, 4))).requires_grad_()
    detection_features(student.requires_grad_(), {"maps": maps, "logits": logits}).backward()
    weights = torch.sigmoid(logits.detach()).amax(1)  # (N, H, W)
    expected = 2 * (student.detach() - maps) * weights[:, None] / 3 / weights.sum()
    np.testing.assert_allclose(student.grad, expected, rtol=1e-12)
    assert logits.grad is None


def test_feature_maps_without_confident_cells_add_nothing():
    maps = {"maps": np.zeros((1, 2, 3, 3)), "logits": np.full((1, 4, 3, 3), -1e4)}
    assert detection_features({"maps": np.ones((1, 2, 3, 3))}, maps) == 0


def test_logits_with_other_cells_than_the_maps_are_refused():
    maps = np.zeros((1, 2, 3, 3))
    with pytest.raises(ShapeError, match=r"logits have shape \(1, 4, 3, 2\), its maps \(1, 2, 3, 3\)\. They must be"):
        detection_features(maps, {"maps": maps, "logits": np.zeros((1, 4, 3, 2))})
    with pytest.raises(UsageError, match=r'The teacher returns logits; "maps" are needed'):
        detection_features(maps, {"logits": maps})


# ------------------------------------------------------------------------------------------------ dense heads


def test_detection_response_equals_its_closed_form(framework):
    """Cell 0 has the probability 3/4 in the teacher and 1/2 in the student.

    Cell 1 has the probability 1/4 in both. This is not above the threshold, so its boxes do not count.
    """
    teacher = {
        "logits": framework(np.log([[[3.0], [1 / 3]]])),
        "boxes": framework([[[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.1, 0.1]]]),
    }
    student = {
        "logits": framework(np.log([[[1.0], [1 / 3]]])),
        "boxes": framework([[[1.0, 0.5, 1.0, 1.0], [0.1, 0.1, 0.9, 0.9]]]),
    }
    value = float(detection_response(student, teacher, box_weight=3.0, giou_weight=2.0))
    assert value == pytest.approx(0.25 * math.log(2) + 3 * 0.5 + 2 * (1 - 1 / 3), rel=1e-13)


def test_detection_response_equals_the_formula_of_the_authors_in_pytorch():
    """The formula is cross-entropy times |p_t - p_s|, divided by the number of objects."""
    student, teacher = tensors(random_outputs(0, 6)), tensors(random_outputs(1, 6))
    student["logits"].requires_grad_()
    p_t = torch.sigmoid(teacher["logits"])
    cross_entropy = F.binary_cross_entropy_with_logits(student["logits"], p_t, reduction="none")
    weights = (p_t - torch.sigmoid(student["logits"])).abs()
    objects = int((p_t.amax(-1) > 0.5).sum())
    assert objects > 1
    expected = (cross_entropy * weights).sum() / objects
    value = detection_response(student, teacher, box_weight=0, giou_weight=0)
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(value, student["logits"])[0] for value in (value, expected)]
    torch.testing.assert_close(*gradients)


def with_logits(*cells):
    """Return the outputs of a detector: these logits of cells, and equal boxes."""
    return {"logits": np.array([cells], float), "boxes": np.full((1, len(cells), 4), 0.5)}


def test_detection_response_is_equal_for_an_object_that_only_the_student_or_only_the_teacher_detects(framework):
    def loss_value(*cells):
        student, teacher = (
            {n: framework(part) for n, part in outputs.items()}
            for outputs in (with_logits(*cells), with_logits(*truth))
        )
        return float(detection_response(student, teacher))

    truth = [8.0, -8.0], [-8.0, -8.0]
    invented, missed = loss_value(truth[0], [8.0, -8.0]), loss_value([-8.0, -8.0], truth[1])
    assert loss_value(*truth) == 0
    assert invented == pytest.approx(missed, rel=1e-12)
    assert invented == pytest.approx(8, rel=1e-2)


def test_the_loss_detr_of_an_invented_object_is_a_tenth_of_the_loss_of_a_missed_object(framework):
    def loss_value(*cells):
        student, teacher = (
            {n: framework(part) for n, part in outputs.items()}
            for outputs in (with_logits(*cells), with_logits(*truth))
        )
        return float(detr(student, teacher))

    truth = [8.0, 0.0, 0.0], [0.0, 0.0, 8.0]
    invented, missed = loss_value(truth[0], truth[0]), loss_value(truth[1], truth[1])
    assert invented == pytest.approx(0.1 * missed, rel=1e-2)
    assert missed == pytest.approx(8 / 1.1, rel=1e-2)


def test_objects_of_the_student_add_to_the_loss_if_the_teacher_detects_nothing():
    empty, detected = with_logits([-8.0], [-8.0]), with_logits([8.0], [-8.0])
    assert detection_response(detected, empty) == pytest.approx(8, rel=1e-2)
    assert detr(detected, empty, classes="sigmoid") == pytest.approx(4, rel=1e-2)  # one of the two queries differs


def test_boxes_are_weighted_by_the_confidence_above_the_threshold():
    student, teacher = random_outputs(0, 6), random_outputs(1, 6)
    confident = sigmoid(teacher["logits"]).max(-1)
    distances = np.abs(student["boxes"] - teacher["boxes"]).sum(-1)
    for threshold in (0.0, 0.7, 0.9):
        without_boxes = detection_response(student, teacher, box_weight=0, giou_weight=0, threshold=threshold)
        weights = confident * (confident > threshold)
        value = detection_response(student, teacher, box_weight=1, giou_weight=0, threshold=threshold)
        assert value - without_boxes == pytest.approx((weights * distances).sum() / weights.sum(), rel=1e-10)
    without_boxes = detection_response(student, teacher, box_weight=0, giou_weight=0, threshold=1.0)
    assert detection_response(student, teacher, threshold=1.0) == without_boxes


def test_background_cells_change_the_response_by_less_than_2_percent():
    """There are one object and a hundred background cells; all logits of the student have a small error."""
    teacher = {"logits": np.full((1, 101, 3), -9.0), "boxes": np.full((1, 101, 4), 0.5)}
    teacher["logits"][0, 0, 0] = 3.0
    student = {"logits": teacher["logits"] + 0.5, "boxes": teacher["boxes"]}
    object_only = (
        {name: part[:, :1] for name, part in student.items()},
        {name: part[:, :1] for name, part in teacher.items()},
    )
    assert detection_response(student, teacher) == pytest.approx(detection_response(*object_only), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "`threshold` is 1.5; a probability from 0 to 1 is needed"),
        ({"box_weight": -1}, "`box_weight` is -1; a number of at least 0 is needed"),
        ({"giou_weight": math.nan}, "`giou_weight` is nan; a number of at least 0 is needed"),
    ],
)
def test_invalid_options_of_the_response_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        detection_response(random_outputs(0, 6), random_outputs(1, 6), **options)


# ------------------------------------------------------------------------------------------------ DETR: sets of queries


def pair_losses(student, teacher, n, i, j, classes):
    """Return the divergence of the classes and the distance of the boxes of the pair (i, j) of sample n."""
    logits_s, logits_t = student["logits"][n, i], teacher["logits"][n, j]
    if classes == "softmax":
        divergence = (softmax(logits_t) * np.log(softmax(logits_t) / softmax(logits_s))).sum()
    else:
        p, q = sigmoid(logits_t), sigmoid(logits_s)
        divergence = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
    boxes = student["boxes"][n, i], teacher["boxes"][n, j]
    return divergence, 5 * np.abs(boxes[0] - boxes[1]).sum() + 2 * (1 - giou(*boxes))


def naive_confidence(logits, classes):
    return softmax(logits)[..., :-1].max(-1) if classes == "softmax" else sigmoid(logits).max(-1)


@pytest.mark.parametrize("classes", ["softmax", "sigmoid"])
@pytest.mark.parametrize("queries", [(4, 4), (5, 3), (3, 5)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_detr_is_the_minimum_over_all_permutations(classes, queries, seed):
    student, teacher = random_outputs(seed, queries[0]), random_outputs(100 + seed, queries[1])
    confident = naive_confidence(teacher["logits"], classes)
    chosen = np.argsort(-confident, -1)[:, : queries[0]]  # the most confident queries if the student has fewer
    weights = np.take_along_axis(confident, chosen, -1)
    class_weights = np.maximum(weights, 0.3)
    shares = np.stack([class_weights / class_weights.sum(), weights / weights.sum()], -1)  # classes, boxes

    def cost(n, order):
        pairs = (pair_losses(student, teacher, n, i, j, classes) for i, j in zip(order, chosen[n], strict=True))
        return sum(share @ pair for share, pair in zip(shares[n], pairs, strict=True))

    orders = list(itertools.permutations(range(queries[0]), chosen.shape[1]))
    expected = sum(min(cost(n, order) for order in orders) for n in range(2))
    value = detr(student, teacher, classes=classes, empty_weight=0.3)
    assert value == pytest.approx(expected, rel=1e-12)
    again = detr(tensors(student), tensors(teacher), classes=classes, empty_weight=0.3)
    assert float(again) == pytest.approx(value, rel=1e-12)


def test_the_order_of_queries_does_not_change_the_loss_detr():
    student, teacher = random_outputs(0, 6), random_outputs(1, 6)
    expected = detr(student, teacher)
    order = np.random.default_rng(2).permutation(6)
    moved = {name: part[:, order] for name, part in student.items()}
    assert detr(moved, teacher) == pytest.approx(expected, rel=1e-12)
    assert detr({name: part[:, order] for name, part in teacher.items()}, teacher) == pytest.approx(0, abs=1e-12)


def test_queries_of_the_student_without_a_matching_query_of_the_teacher_get_no_gradient():
    teacher, others = random_outputs(1, 3), random_outputs(2, 4)
    student = {name: np.concatenate([others[name], teacher[name]], 1) for name in teacher}
    assert detr(student, teacher) == pytest.approx(0, abs=1e-12)
    student = {name: torch.from_numpy(part.copy()).requires_grad_() for name, part in student.items()}
    detr(student, tensors(teacher)).backward()
    assert not student["logits"].grad[:, :4].any()
    assert not student["boxes"].grad[:, :4].any()


def test_queries_without_an_object_are_compared_by_their_classes_but_not_by_their_boxes():
    student, teacher = random_outputs(0, 5), random_outputs(1, 5)
    teacher["logits"][:, 2:, -1] += 30.0  # no object
    fewer = {name: part[:, :2] for name, part in teacher.items()}
    assert detr(student, teacher, empty_weight=0) == pytest.approx(detr(student, fewer, empty_weight=0), rel=1e-6)
    moved = {**teacher, "boxes": np.concatenate([teacher["boxes"][:, :2], 0.5 * teacher["boxes"][:, 2:]], 1)}
    assert detr(student, moved) == pytest.approx(detr(student, teacher), rel=1e-6)
    assert detr(student, teacher) != pytest.approx(detr(student, fewer), rel=1e-3)


@pytest.mark.parametrize("classes", ["softmax", "sigmoid"])
@pytest.mark.parametrize("queries", [(5, 3), (3, 5)], ids=str)
def test_the_gradient_of_detr_equals_finite_differences(classes, queries):
    """The matching is constant within a small step, so the loss is smooth."""
    student, teacher = tensors(random_outputs(0, queries[0])), tensors(random_outputs(1, queries[1]))

    def loss_value(logits, boxes):
        return detr({"logits": logits, "boxes": boxes}, teacher, classes=classes)

    arguments = [student[name].clone().requires_grad_() for name in ("logits", "boxes")]
    assert torch.autograd.gradcheck(loss_value, arguments, atol=1e-6)


@pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
def test_detr_with_sigmoid_classes_conforms(check):
    @functools.wraps(detr)
    def sigmoid_detr(student, teacher, **options):
        return detr(student, teacher, classes="sigmoid", **options)

    check(sigmoid_detr)


def test_matching_works_with_nan_and_infinity():
    """Pairs with a cost of NaN or infinity are matched last. The loss becomes NaN."""
    costs = np.array([[[np.nan, 1.0], [0.0, np.inf]]])
    np.testing.assert_array_equal(match_pairs(costs), [[1, 0]])
    student, teacher = random_outputs(0, 3), random_outputs(1, 3)
    student["logits"][0, 0, 0] = np.nan
    assert math.isnan(detr(student, teacher))


def test_a_student_with_fewer_queries_is_matched_to_the_most_confident():
    """`most_confident` reduces the teacher's queries before the matching. Query 0 has no object and is left out."""
    teacher = {"logits": np.array([[[0.0, 5.0], [3.0, 0.0], [2.0, 0.0]]]), "boxes": np.arange(12.0).reshape(1, 3, 4)}
    for outputs in (teacher, tensors(teacher)):
        assert [box[0] for box in most_confident(outputs, "softmax", 2)["boxes"][0].tolist()] == [4, 8]
        assert most_confident(outputs, "softmax", 5)["boxes"].shape == (1, 3, 4)


def test_the_confidence_ignores_the_class_no_object():
    logits = np.log([[0.1, 0.2, 0.7]])
    assert confidence(logits, "softmax") == pytest.approx(0.2)
    assert confidence(np.log([[1 / 9, 1 / 4, 7 / 3]]), "sigmoid") == pytest.approx(0.7)


def test_sets_of_queries_with_inconsistent_shapes_are_refused():
    student, teacher = random_outputs(0, 4), random_outputs(1, 5)
    with pytest.raises(ShapeError, match=r"\(2, 4, 4\), the teacher's \(2, 5, 3\).*numbers of queries may differ"):
        detr(student, random_outputs(1, 5, classes=3))
    with pytest.raises(ShapeError, match=r"\(2, 4, 4\), the teacher's \(1, 5, 4\)"):
        detr(student, random_outputs(1, 5, samples=1))
    with pytest.raises(ShapeError, match=r"The teacher's boxes have shape \(2, 4, 4\); \(2, 5, 4\) is needed"):
        detr(student, {**teacher, "boxes": student["boxes"]})
    with pytest.raises(UnknownNameError, match="There is no kind of classes 'logistic'"):
        detr(student, teacher, classes="logistic")
    with pytest.raises(UsageError, match="`class_weight` is -1; a number of at least 0 is needed"):
        detr(student, teacher, class_weight=-1)
    with pytest.raises(ShapeError, match='The logits have one class, which is "no object"'):
        detr(random_outputs(0, 4, classes=1), random_outputs(1, 4, classes=1))


@pytest.mark.parametrize("loss", [detr, detection_response])
def test_inputs_without_logits_and_boxes_are_refused(loss):
    outputs = random_outputs(0, 4)
    for other, message in (
        ({"logits": outputs["logits"]}, r'The teacher returns logits; a dict of "logits" and "boxes" is needed'),
        (outputs["logits"], r'The teacher returns one array; a dict of "logits" and "boxes" is needed'),
    ):
        with pytest.raises(UsageError, match=message):
            loss(outputs, other)
    for shape in ((2, 1, 4), (2, 4, 5), (2, 4, 2), (8, 4)):
        boxes = {**outputs, "boxes": np.ones(shape)}
        with pytest.raises(ShapeError, match=r"The student's boxes have shape .*; \(2, 4, 4\) is needed"):
            loss(boxes, boxes)
    with pytest.raises(ShapeError, match=r"The student's logits have shape \(8, 4\); \(N, Q, K\) is needed"):
        loss({**outputs, "logits": np.ones((8, 4))}, outputs)
