"""Losses of detectors: boxes in closed form, weights by the teacher, and matching against all permutations."""

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

from kirsch.distillation.losses.detection import (
    confidence,
    detection_features,
    detection_response,
    detr,
    giou,
    matched,
    surest,
)
from kirsch.errors import ShapeError, UnknownNameError, UsageError
from kirsch.testing import LOSS_CHECKS

FRAMEWORKS = [np.asarray, lambda values: torch.from_numpy(np.asarray(values))]
both = pytest.mark.parametrize("make", FRAMEWORKS, ids=["numpy", "torch"])


def drawn(seed, queries, samples=2, classes=4):
    """A side of a detector: scores, and boxes with an area."""
    random = np.random.default_rng(seed)
    return {
        "scores": 2 * random.standard_normal((samples, queries, classes)),
        "boxes": random.uniform(0.1, 0.6, (samples, queries, 4)),
    }


def tensors(side):
    return {name: torch.from_numpy(part) for name, part in side.items()}


def sigmoid(scores):
    return 1 / (1 + np.exp(-scores))


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


# ------------------------------------------------------------------------------------------------ boxes


@both
@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ([0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 0.4], 1),
        # Unit squares that overlap by half: 0.5 / 1.5, and the hull is the union.
        ([0.5, 0.5, 1, 1], [1.0, 0.5, 1, 1], 1 / 3),
        # Unit squares that touch at a side: nothing in common, nothing between.
        ([0.5, 0.5, 1, 1], [1.5, 0.5, 1, 1], 0),
        # One apart: the hull of 3 has 1 that is neither's.
        ([0.5, 0.5, 1, 1], [2.5, 0.5, 1, 1], -1 / 3),
        # At a corner, overlap of 1/4: union 7/4, hull 9/4.
        ([0.5, 0.5, 1, 1], [1.0, 1.0, 1, 1], 1 / 7 - 2 / 9),
        # One within the other.
        ([0.5, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.5], 1 / 4),
        # A width below 0 is none: the hull is the unit square, and so is the union.
        ([0.5, 0.5, 1, 1], [0.5, 0.5, -0.5, 0.5], 0),
        # Small or without an area, a box is still itself.
        ([0.5, 0.5, 1e-7, 1e-7], [0.5, 0.5, 1e-7, 1e-7], 1),
        ([0.5, 0.5, 0, 0.2], [0.5, 0.5, 0, 0.2], 1),
        ([0.5, 0.5, -1, -1], [0.5, 0.5, 0, 0], 1),
        # Two points: all of their hull is neither's.
        ([0.2, 0.2, 0, 0], [0.5, 0.5, 0, 0], -1),
    ],
)
def test_overlap_of_boxes_in_closed_form(make, first, second, wanted):
    for pair in ((first, second), (second, first)):
        assert float(giou(*(make(np.array(box, float)) for box in pair))) == pytest.approx(wanted, abs=1e-15)


def test_boxes_without_an_area_pull_with_finite_gradients():
    first = torch.tensor([[0.5, 0.5, 0.0, 0.2], [0.2, 0.2, 0.0, 0.0]], requires_grad=True)
    giou(first, torch.tensor([[0.5, 0.5, 0.0, 0.2], [0.5, 0.5, 0.0, 0.0]])).sum().backward()
    assert torch.isfinite(first.grad).all()


@given(st.integers(0, 10_000))
@settings(deadline=None, derandomize=True)
def test_overlap_is_bounded_and_knows_neither_place_nor_size(seed):
    first, second = np.random.default_rng(seed).uniform(0.05, 1, (2, 20, 4))
    found = giou(first, second)
    assert (found > -1).all()
    assert (found <= 1).all()
    moved = [np.concatenate([3 * box[:, :2] + 7, 3 * box[:, 2:]], 1) for box in (first, second)]
    np.testing.assert_allclose(giou(*moved), found, atol=1e-12)


# ------------------------------------------------------------------------------------------------ maps


@both
def test_maps_are_weighted_by_the_largest_score_of_a_cell(make):
    """Squared differences 4 and 9 in two cells, of which the teacher is sure by 3/4 and 1/4, the larger."""
    student, maps = make([[[[2.0, 3.0]]]]), make(np.zeros((1, 1, 1, 2)))
    scores = make(np.log([[[[3.0, 0.25]], [[0.25, 1 / 3]]]]))  # odds
    found = float(detection_features(student, {"maps": maps, "scores": scores}))
    assert found == pytest.approx(0.75 * 4 + 0.25 * 9, rel=1e-13)
    assert float(detection_features(student, maps)) == 6.5


def test_weighted_maps_pull_where_the_teacher_sees_something():
    random = np.random.default_rng(0)
    student, maps = (torch.from_numpy(side) for side in random.standard_normal((2, 2, 3, 4, 4)))
    scores = torch.from_numpy(random.standard_normal((2, 5, 4, 4))).requires_grad_()
    detection_features(student.requires_grad_(), {"maps": maps, "scores": scores}).backward()
    weights = torch.sigmoid(scores.detach()).amax(1)  # (N, H, W)
    wanted = 2 * (student.detach() - maps) * weights[:, None] / 3 / weights.sum()
    np.testing.assert_allclose(student.grad, wanted, rtol=1e-12)
    assert scores.grad is None


def test_maps_where_the_teacher_sees_nothing_at_all_are_charged_nothing():
    maps = {"maps": np.zeros((1, 2, 3, 3)), "scores": np.full((1, 4, 3, 3), -1e4)}
    assert detection_features({"maps": np.ones((1, 2, 3, 3))}, maps) == 0


def test_scores_of_other_cells_are_refused():
    maps = np.zeros((1, 2, 3, 3))
    with pytest.raises(ShapeError, match=r"scores have shape \(1, 4, 3, 2\), its maps \(1, 2, 3, 3\)\. They must be"):
        detection_features(maps, {"maps": maps, "scores": np.zeros((1, 4, 3, 2))})
    with pytest.raises(UsageError, match=r'The teacher gives scores; "maps" are needed'):
        detection_features(maps, {"scores": maps})


# ------------------------------------------------------------------------------------------------ dense heads


@both
def test_response_in_closed_form(make):
    """Cell 0: the teacher is sure by 3/4, the student by 1/2. Cell 1: both by 1/4, and boxes do not count there."""
    teacher = {
        "scores": make(np.log([[[3.0], [1 / 3]]])),
        "boxes": make([[[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.1, 0.1]]]),
    }
    student = {
        "scores": make(np.log([[[1.0], [1 / 3]]])),
        "boxes": make([[[1.0, 0.5, 1.0, 1.0], [0.1, 0.1, 0.9, 0.9]]]),
    }
    found = float(detection_response(student, teacher, box_weight=3.0, giou_weight=2.0))
    assert found == pytest.approx(0.25 * math.log(2) + 3 * 0.5 + 2 * (1 - 1 / 3), rel=1e-13)


def test_response_is_that_of_pytorch():
    """The authors' formula: cross-entropy times |p_t - p_s|, over the number of objects, and its gradient."""
    student, teacher = tensors(drawn(0, 6)), tensors(drawn(1, 6))
    student["scores"].requires_grad_()
    shares = torch.sigmoid(teacher["scores"])
    crossed = F.binary_cross_entropy_with_logits(student["scores"], shares, reduction="none")
    apart = (shares - torch.sigmoid(student["scores"])).abs()
    objects = int((shares.amax(-1) > 0.5).sum())
    assert objects > 1
    wanted = (crossed * apart).sum() / objects
    found = detection_response(student, teacher, box_weight=0, giou_weight=0)
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(value, student["scores"])[0] for value in (found, wanted)]
    torch.testing.assert_close(*slopes)


def sees(*cells):
    """A side with boxes of one place, and the scores of its cells."""
    return {"scores": np.array([cells], float), "boxes": np.full((1, len(cells), 4), 0.5)}


@both
def test_an_object_that_the_student_alone_sees_is_charged_as_one_that_it_misses(make):
    def charged(*cells):
        student, teacher = ({n: make(part) for n, part in side.items()} for side in (sees(*cells), sees(*truth)))
        return float(detection_response(student, teacher))

    truth = [8.0, -8.0], [-8.0, -8.0]
    invented, missed = charged(truth[0], [8.0, -8.0]), charged([-8.0, -8.0], truth[1])
    assert charged(*truth) == 0
    assert invented == pytest.approx(missed, rel=1e-12)
    assert invented == pytest.approx(8, rel=1e-2)


@both
def test_a_query_that_the_student_alone_takes_for_an_object_costs_a_tenth_of_one_that_it_misses(make):
    def charged(*cells):
        student, teacher = ({n: make(part) for n, part in side.items()} for side in (sees(*cells), sees(*truth)))
        return float(detr(student, teacher))

    truth = [8.0, 0.0, 0.0], [0.0, 0.0, 8.0]
    invented, missed = charged(truth[0], truth[0]), charged(truth[1], truth[1])
    assert invented == pytest.approx(0.1 * missed, rel=1e-2)
    assert missed == pytest.approx(8 / 1.1, rel=1e-2)


def test_a_teacher_that_sees_nothing_charges_what_the_student_sees():
    nothing, something = sees([-8.0], [-8.0]), sees([8.0], [-8.0])
    assert detection_response(something, nothing) == pytest.approx(8, rel=1e-2)
    assert detr(something, nothing, classes="sigmoid") == pytest.approx(4, rel=1e-2)  # one of two queries


def test_boxes_count_by_how_sure_the_teacher_is_above_the_threshold():
    student, teacher = drawn(0, 6), drawn(1, 6)
    sure = sigmoid(teacher["scores"]).max(-1)
    far = np.abs(student["boxes"] - teacher["boxes"]).sum(-1)
    for threshold in (0.0, 0.7, 0.9):
        scores_alone = detection_response(student, teacher, box_weight=0, giou_weight=0, threshold=threshold)
        weights = sure * (sure > threshold)
        found = detection_response(student, teacher, box_weight=1, giou_weight=0, threshold=threshold)
        assert found - scores_alone == pytest.approx((weights * far).sum() / weights.sum(), rel=1e-10)
    scores_alone = detection_response(student, teacher, box_weight=0, giou_weight=0, threshold=1.0)
    assert detection_response(student, teacher, threshold=1.0) == scores_alone


def test_background_hardly_moves_the_response():
    """A hundred cells of background in which the student errs by a little beside one object."""
    teacher = {"scores": np.full((1, 101, 3), -9.0), "boxes": np.full((1, 101, 4), 0.5)}
    teacher["scores"][0, 0, 0] = 3.0
    student = {"scores": teacher["scores"] + 0.5, "boxes": teacher["boxes"]}
    alone = {name: part[:, :1] for name, part in student.items()}, {name: part[:, :1] for name, part in teacher.items()}
    assert detection_response(student, teacher) == pytest.approx(detection_response(*alone), rel=0.02)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threshold": 1.5}, "The threshold of objects is 1.5; a probability from 0 to 1 is needed"),
        ({"box_weight": -1}, "`box_weight` is -1; a number of at least 0 is needed"),
        ({"giou_weight": math.nan}, "`giou_weight` is nan; a number of at least 0 is needed"),
    ],
)
def test_options_of_the_response_that_are_none_are_refused(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        detection_response(drawn(0, 6), drawn(1, 6), **options)


# ------------------------------------------------------------------------------------------------ sets


def charge_of(student, teacher, n, i, j, classes):
    """What classes and boxes of the pair (i, j) of sample n cost, spelt out."""
    near, far = student["scores"][n, i], teacher["scores"][n, j]
    if classes == "softmax":
        apart = (softmax(far) * np.log(softmax(far) / softmax(near))).sum()
    else:
        p, q = sigmoid(far), sigmoid(near)
        apart = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
    boxes = student["boxes"][n, i], teacher["boxes"][n, j]
    return apart, 5 * np.abs(boxes[0] - boxes[1]).sum() + 2 * (1 - giou(*boxes))


def sureness(scores, classes):
    return softmax(scores)[..., :-1].max(-1) if classes == "softmax" else sigmoid(scores).max(-1)


@pytest.mark.parametrize("classes", ["softmax", "sigmoid"])
@pytest.mark.parametrize("queries", [(4, 4), (5, 3), (3, 5)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_matched_sets_are_charged_the_least_over_all_permutations(classes, queries, seed):
    student, teacher = drawn(seed, queries[0]), drawn(100 + seed, queries[1])
    sure = sureness(teacher["scores"], classes)
    chosen = np.argsort(-sure, -1)[:, : queries[0]]  # of which the teacher is surest, if the student has fewer
    weights = np.take_along_axis(sure, chosen, -1)
    told = np.maximum(weights, 0.3)
    shares = np.stack([told / told.sum(), weights / weights.sum()], -1)  # of classes and of boxes

    def cost(n, order):
        pairs = (charge_of(student, teacher, n, i, j, classes) for i, j in zip(order, chosen[n], strict=True))
        return sum(share @ pair for share, pair in zip(shares[n], pairs, strict=True))

    orders = list(itertools.permutations(range(queries[0]), chosen.shape[1]))
    charged = sum(min(cost(n, order) for order in orders) for n in range(2))
    found = detr(student, teacher, classes=classes, empty_weight=0.3)
    assert found == pytest.approx(charged, rel=1e-12)
    again = detr(tensors(student), tensors(teacher), classes=classes, empty_weight=0.3)
    assert float(again) == pytest.approx(found, rel=1e-12)


def test_the_order_of_queries_does_not_matter():
    student, teacher = drawn(0, 6), drawn(1, 6)
    wanted = detr(student, teacher)
    order = np.random.default_rng(2).permutation(6)
    moved = {name: part[:, order] for name, part in student.items()}
    assert detr(moved, teacher) == pytest.approx(wanted, rel=1e-12)
    assert detr({name: part[:, order] for name, part in teacher.items()}, teacher) == pytest.approx(0, abs=1e-12)


def test_further_queries_of_the_student_learn_from_labels_alone():
    teacher, others = drawn(1, 3), drawn(2, 4)
    more = {name: np.concatenate([others[name], teacher[name]], 1) for name in teacher}
    assert detr(more, teacher) == pytest.approx(0, abs=1e-12)
    student = {name: torch.from_numpy(part.copy()).requires_grad_() for name, part in more.items()}
    detr(student, tensors(teacher)).backward()
    assert not student["scores"].grad[:, :4].any()
    assert not student["boxes"].grad[:, :4].any()


def test_queries_that_the_teacher_takes_for_nothing_count_for_their_classes_alone():
    student, teacher = drawn(0, 5), drawn(1, 5)
    teacher["scores"][:, 2:, -1] += 30.0  # no object
    fewer = {name: part[:, :2] for name, part in teacher.items()}
    assert detr(student, teacher, empty_weight=0) == pytest.approx(detr(student, fewer, empty_weight=0), rel=1e-6)
    moved = {**teacher, "boxes": np.concatenate([teacher["boxes"][:, :2], 0.5 * teacher["boxes"][:, 2:]], 1)}
    assert detr(student, moved) == pytest.approx(detr(student, teacher), rel=1e-6)
    assert detr(student, teacher) != pytest.approx(detr(student, fewer), rel=1e-3)


@pytest.mark.parametrize("classes", ["softmax", "sigmoid"])
@pytest.mark.parametrize("queries", [(5, 3), (3, 5)], ids=str)
def test_the_gradient_of_unequal_sets_is_that_of_finite_differences(classes, queries):
    """The matching is constant within a small step, so that the loss is smooth there."""
    student, teacher = tensors(drawn(0, queries[0])), tensors(drawn(1, queries[1]))

    def charged(scores, boxes):
        return detr({"scores": scores, "boxes": boxes}, teacher, classes=classes)

    sides = [student[name].clone().requires_grad_() for name in ("scores", "boxes")]
    assert torch.autograd.gradcheck(charged, sides, atol=1e-6)


@pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
def test_sets_of_coins_conform(check):
    @functools.wraps(detr)
    def coins(student, teacher, **options):
        return detr(student, teacher, classes="sigmoid", **options)

    check(coins)


def test_the_matching_survives_numbers_that_are_none():
    """What is not finite is matched last; the loss itself then says that numbers went wrong."""
    costs = np.array([[[np.nan, 1.0], [0.0, np.inf]]])
    samples, rows, columns = matched(costs)
    assert sorted(zip(samples, rows, columns, strict=True)) == [(0, 0, 1), (0, 1, 0)]
    student, teacher = drawn(0, 3), drawn(1, 3)
    student["scores"][0, 0, 0] = np.nan
    assert math.isnan(detr(student, teacher))


def test_a_student_with_fewer_queries_is_matched_to_the_surest():
    """The least sum would take the query that is no object, which costs least."""
    teacher = {"scores": np.array([[[0.0, 5.0], [3.0, 0.0], [2.0, 0.0]]]), "boxes": np.arange(12.0).reshape(1, 3, 4)}
    for side in (teacher, tensors(teacher)):
        assert [box[0] for box in surest(side, "softmax", 2)["boxes"][0].tolist()] == [4, 8]
        assert surest(side, "softmax", 5)["boxes"].shape == (1, 3, 4)


def test_no_object_is_no_confidence():
    scores = np.log([[0.1, 0.2, 0.7]])
    assert confidence(scores, "softmax") == pytest.approx(0.2)
    assert confidence(np.log([[1 / 9, 1 / 4, 7 / 3]]), "sigmoid") == pytest.approx(0.7)


def test_sets_that_do_not_fit_are_refused():
    student, teacher = drawn(0, 4), drawn(1, 5)
    with pytest.raises(ShapeError, match=r"\(2, 4, 4\), the teacher's \(2, 5, 3\).*numbers of queries may differ"):
        detr(student, drawn(1, 5, classes=3))
    with pytest.raises(ShapeError, match=r"\(2, 4, 4\), the teacher's \(1, 5, 4\)"):
        detr(student, drawn(1, 5, samples=1))
    with pytest.raises(ShapeError, match=r"The teacher's boxes have shape \(2, 4, 4\); \(2, 5, 4\) is needed"):
        detr(student, {**teacher, "boxes": student["boxes"]})
    with pytest.raises(UnknownNameError, match="There is no kind of classes 'logistic'"):
        detr(student, teacher, classes="logistic")
    with pytest.raises(UsageError, match="`class_weight` is -1; a number of at least 0 is needed"):
        detr(student, teacher, class_weight=-1)
    with pytest.raises(ShapeError, match='The scores are of one class, which is "no object"'):
        detr(drawn(0, 4, classes=1), drawn(1, 4, classes=1))


@pytest.mark.parametrize("loss", [detr, detection_response])
def test_sides_that_are_no_sets_are_refused(loss):
    side = drawn(0, 4)
    for other, sentence in (
        ({"scores": side["scores"]}, r'The teacher gives scores; a dict of "scores" and "boxes" is needed'),
        (side["scores"], r'The teacher gives one array; a dict of "scores" and "boxes" is needed'),
    ):
        with pytest.raises(UsageError, match=sentence):
            loss(side, other)
    for shape in ((2, 1, 4), (2, 4, 5), (2, 4, 2), (8, 4)):
        boxes = {**side, "boxes": np.ones(shape)}
        with pytest.raises(ShapeError, match=r"The student's boxes have shape .*; \(2, 4, 4\) is needed"):
            loss(boxes, boxes)
    with pytest.raises(ShapeError, match=r"The student's scores have shape \(8, 4\); \(N, Q, K\) is needed"):
        loss({**side, "scores": np.ones((8, 4))}, side)
