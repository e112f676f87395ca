"""Losses on relations between samples: closed forms, independent implementations, and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from distillation.golden import es, et, et5
from kirsch.distillation.losses import LOSSES
from kirsch.errors import ShapeError, UsageError

ANY_WIDTH = ["sp", "rkd-distance", "rkd-angle", "rkd", "pkt", "cc-kernel"]

CORNER = np.array([[0.0, 0], [1, 0], [0, 1]])
"""Three samples with a right angle at the first."""
LINE = np.array([[0.0], [1], [3]])


def loss_value(name, student, teacher, framework=np.asarray, **options):
    return float(LOSSES[name](framework(student), framework(teacher), **options))


# ---------------------------------------------------------------------------------------------------- closed forms


def test_relational_distances_equal_their_closed_form(framework):
    """Distances 1, 2, 3 are divided by their mean 2, and 1, √2, 1 by theirs. Each pair counts in both orders."""
    mean = (2 + math.sqrt(2)) / 3
    difference = np.array([1 / 2 - 1 / mean, 2 / 2 - math.sqrt(2) / mean, 3 / 2 - 1 / mean])
    value = loss_value("rkd-distance", LINE, CORNER, framework)
    assert value == pytest.approx((difference**2 / 2).sum() * 2 / 9, rel=1e-13)


def test_relational_angles_equal_their_closed_form(framework):
    """The angles are those of a right isosceles triangle and of three samples on a line.

    The triangle has the cosines 0, 1/√2, 1/√2 at its samples, the line 1, -1, 1. Each counts twice, for both orders of
    the two sides; the mean is over all 3³ triples of samples. The cosine of a side with itself is 1 in both. The Huber
    loss of a difference above 1 is the difference minus one half.
    """
    tilt = 1 / math.sqrt(2)
    losses = [1 / 2, (1 + tilt) - 1 / 2, (1 - tilt) ** 2 / 2]
    assert loss_value("rkd-angle", LINE, CORNER, framework) == pytest.approx(2 * sum(losses) / 27, rel=1e-13)


def test_sp_equals_its_closed_form(framework):
    """The products of orthogonal samples form the identity matrix. Those of equal samples form rows (1, 1) / √2.

    With the convention of torchdistill, the rows of equal samples are (1, 1) / 2.
    """
    difference, same = np.eye(2), np.ones((2, 1))
    tilt = 1 / math.sqrt(2)
    rows = ((1 - tilt) ** 2 + tilt**2) * 2 / 4
    assert loss_value("sp", difference, same, framework) == pytest.approx(rows, rel=1e-14)
    assert loss_value("sp", difference, same, framework, convention="torchdistill") == pytest.approx(0.25, rel=1e-14)


def test_pkt_equals_its_closed_form(framework):
    """Similarities are (1 + cosine) / 2. The cosines 1 and 0 give the probabilities 2/3 and 1/3, 1 and 1 give 1/2 each.

    The KL divergence of both samples is divided by the number of pairs, 2 · 2.
    """
    student, teacher = np.eye(2), np.ones((2, 1))
    divergence = (math.log(0.5 / (2 / 3)) + math.log(0.5 / (1 / 3))) / 2
    value = loss_value("pkt", student, teacher, framework, eps=0.0)
    assert value == pytest.approx(2 * divergence / 4, rel=1e-13)


def test_correlations_of_successive_samples_equal_their_closed_form(framework):
    """Differences (1, 2), (0, 3), (2, 0): inner products 6 and 0 of successive samples."""
    student = np.array([[1.0, -2], [0, 3], [2, 0]])
    assert loss_value("cc", student, np.zeros((3, 2)), framework) == pytest.approx(3, rel=1e-14)
    assert loss_value("cc", student[[0, 2, 1]], np.zeros((3, 2)), framework) == pytest.approx((2 + 0) / 2, rel=1e-14)


def test_cc_kernel_equals_its_closed_form(framework):
    """Cosines 0 and 1: the series is 1 and 1 + 0.8 + 0.32, times exp(-0.8)."""
    student, teacher = 3 * np.eye(2), np.ones((2, 1))
    difference = math.exp(-0.8) * 1.12
    assert loss_value("cc-kernel", student, teacher, framework) == pytest.approx(difference**2 / 2, rel=1e-13)
    norm = loss_value("cc-kernel", student, teacher, framework, convention="torchdistill")
    assert norm == pytest.approx(math.sqrt(2) * difference / 4, rel=1e-13)
    assert loss_value("cc-kernel", student, teacher, framework, kernel="bilinear") == pytest.approx(0.5, rel=1e-13)


def test_the_series_of_the_kernel_converges_to_the_gaussian():
    unit = es / np.linalg.norm(es, axis=1, keepdims=True)
    squares = ((unit[:, None] - unit[None]) ** 2).sum(-1)
    ones = np.ones((8, 1))
    expected = ((np.exp(-0.4 * squares) - 1) ** 2).mean()
    assert loss_value("cc-kernel", es, ones, order=20) == pytest.approx(expected, rel=1e-12)


def test_crd_batch_equals_its_closed_form(framework):
    """Two orthogonal samples, equal in both models, give log(1 + exp(-1 / T)). N equal samples give log N."""
    value = loss_value("crd-batch", 2 * np.eye(2), 5 * np.eye(2), framework, temperature=0.5)
    assert value == pytest.approx(math.log1p(math.exp(-2)), rel=1e-13)
    assert loss_value("crd-batch", np.ones((4, 3)), np.ones((4, 3)), framework) == pytest.approx(math.log(4), rel=1e-13)


def test_crd_batch_equals_the_cross_entropy_of_pytorch():
    student, teacher = F.normalize(torch.from_numpy(es)), F.normalize(torch.from_numpy(et5))
    expected = F.cross_entropy(student @ teacher.mT / 0.07, torch.arange(8))
    assert loss_value("crd-batch", es, et5) == pytest.approx(float(expected), rel=1e-12)


def test_crd_equals_its_closed_form(framework):
    """The scores are 1, 1 and 3 times the expected score of noise.

    The loss is -log(1/2) for the positive, and -log(1/2) and -log(1/4) for the two negatives.
    """
    logits = framework(np.log([[1.0, 1.0, 3.0]]))
    expected = math.log(2) + math.log(2) + math.log(4)
    assert float(LOSSES["crd"](logits, logits)) == pytest.approx(2 * expected, rel=1e-14)  # both directions
    two_samples = framework(np.log([[1.0, 1.0, 3.0], [1.0, 1.0, 1.0]]))
    assert float(LOSSES["crd"](two_samples, two_samples)) == pytest.approx(expected + 3 * math.log(2), rel=1e-14)


def test_the_gradient_of_crd_raises_the_positive_and_lowers_the_negative_scores():
    logits = torch.full((3, 5), -0.2, dtype=torch.float64, requires_grad=True)
    LOSSES["crd"](logits, logits.detach()).backward()
    assert (logits.grad[:, 0] < 0).all()
    assert (logits.grad[:, 1:] > 0).all()


# ------------------------------------------------------------------------------------------------------- two ways


def naive_cosines(features):
    difference = features[None] - features[:, None]  # (j, i, D)
    length = np.linalg.norm(difference, axis=-1, keepdims=True)
    unit = np.where(length > 0, difference / np.where(length > 0, length, 1), 0)
    return unit @ unit.swapaxes(1, 2)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_angles_equal_those_computed_from_differences(count, width, seed):
    random = np.random.default_rng(seed)
    student, teacher = random.standard_normal((count, width)), random.standard_normal((count, width + 1))
    difference = abs(naive_cosines(student) - naive_cosines(teacher))
    expected = np.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
    assert loss_value("rkd-angle", student, teacher) == pytest.approx(expected, rel=1e-8, abs=1e-11)


def test_distances_equal_those_of_pytorch():
    distances = [torch.cdist(torch.from_numpy(part), torch.from_numpy(part)) for part in (es, et)]
    first, second = (part / part[part > 0].mean() for part in distances)
    assert loss_value("rkd-distance", es, et) == pytest.approx(float(F.smooth_l1_loss(first, second)), rel=1e-7)


def test_rkd_is_the_weighted_sum_of_distances_and_angles():
    distance, angle = loss_value("rkd-distance", es, et), loss_value("rkd-angle", es, et)
    assert loss_value("rkd", es, et) == pytest.approx(25 * distance + 50 * angle, rel=1e-14)


@pytest.mark.parametrize("name", ["rkd-distance", "rkd-angle"])
def test_the_option_unit_equals_features_of_norm_1(name):
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (es, et)]
    assert loss_value(name, es, et, unit=True) == pytest.approx(loss_value(name, *unit), rel=1e-12)


# ------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("name", ANY_WIDTH)
def test_losses_are_invariant_to_rotations(name, framework):
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((7, 7)))[0]
    assert loss_value(name, es, et @ rotation, framework) == pytest.approx(
        loss_value(name, es, et, framework), rel=1e-10
    )
    assert loss_value(name, et, et @ rotation, framework) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ANY_WIDTH)
def test_losses_are_invariant_to_the_scale_of_all_features(name, framework):
    assert loss_value(name, 3 * es, et, framework) == pytest.approx(loss_value(name, es, et, framework), rel=1e-6)


@pytest.mark.parametrize("name", ["rkd-distance", "rkd-angle", "rkd"])
def test_rkd_is_invariant_to_an_offset_even_in_single_precision(name, framework):
    """Without centering, an offset of 1000 times the differences leaves few digits of the inner products."""
    expected = loss_value(name, es, et, framework)
    assert loss_value(name, es + 100.0, et, framework) == pytest.approx(expected, rel=1e-9)
    single = [part.astype(np.float32) for part in (es, et)]
    # The offset samples themselves are rounded: 1e3 · 6e-8 for values of size 1.
    assert loss_value(name, single[0] + 1000, single[1], framework) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ANY_WIDTH)
def test_features_are_flattened_to_one_vector_per_sample(name, framework):
    cube = et.reshape(8, 7, 1, 1)
    assert loss_value(name, es, cube, framework) == loss_value(name, es, et, framework)


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", [*ANY_WIDTH, "crd-batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_samples_leave_the_gradient_finite(name, dtype):
    """A batch with repeated samples, and batches with equal features."""
    features = torch.from_numpy(et5).to(dtype)
    for values in (features[[0, 0, 1, 2, 2, 2, 3, 4]], torch.zeros_like(features), torch.ones_like(features)):
        student = values.clone().requires_grad_()
        loss = LOSSES[name](student, features)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_angles_between_almost_equal_samples_count_as_0(framework, dtype):
    """Dividing by the rounding error of a distance of 0 would give arbitrary cosines."""
    random = np.random.default_rng(0)
    exact = random.standard_normal((6, 512)).astype(dtype)[[0, 0, 1, 1, 2, 2]]
    student = exact * (1 + 2 * np.finfo(dtype).eps * random.standard_normal(exact.shape)).astype(dtype)
    teacher = np.arange(6, dtype=dtype)[:, None]
    difference = abs(naive_cosines(exact.astype(np.float64)) - naive_cosines(teacher))
    expected = np.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
    assert loss_value("rkd-angle", student, teacher, framework) == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_a_single_sample_is_0():
    for name in ("sp", "rkd", "pkt", "cc"):
        assert loss_value(name, es[:1], et5[:1]) == pytest.approx(0, abs=1e-15)


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ANY_WIDTH)
def test_unequal_numbers_of_samples_are_refused(name, framework):
    with pytest.raises(ShapeError, match=r"student's features have 8 samples, the teacher's 7\. They must be of the"):
        loss_value(name, es, et[:7], framework)


@pytest.mark.parametrize("name", ["cc", "crd-batch"])
def test_embeddings_of_another_width_are_refused(name):
    with pytest.raises(ShapeError, match=r"student's features have shape \(8, 5\), the teacher's \(8, 7\)"):
        loss_value(name, es, et)


def test_a_negative_temperature_is_refused():
    with pytest.raises(UsageError, match="temperature is -1; a number above 0 is needed"):
        loss_value("crd-batch", es, et5, temperature=-1)


@pytest.mark.parametrize("name", ["rkd-distance", "rkd-angle"])
@pytest.mark.parametrize("unit", [False, True])
def test_small_distances_within_distant_clusters_are_accurate_in_32_bits(name, unit):
    """Distances between the 8 clusters of 8 samples are about 500 times the distances within a cluster."""
    random = np.random.default_rng(1)
    centers = np.repeat(600 * random.standard_normal((8, 64)), 8, 0)
    sides = [torch.from_numpy((scale * centers + random.standard_normal((64, 64))).astype("f")) for scale in (1, 1.3)]
    results = []
    for student, teacher in (sides, [side.double() for side in sides]):
        student.requires_grad_()
        loss = LOSSES[name](student, teacher, unit=unit)
        loss.backward()
        results.append((float(loss.detach()), student.grad.double()))
    (value, gradient), (exact_value, exact_gradient) = results
    assert value == pytest.approx(exact_value, rel=1e-4, abs=1e-9)
    # The difference of two features in a cluster is hundreds of times smaller than the features themselves, so that
    # four of the seven digits of float32 remain.
    assert float((gradient - exact_gradient).norm() / exact_gradient.norm()) < 1e-3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cc-kernel", {"order": -1}, "`order` is -1; an integer of at least 1"),
        ("cc-kernel", {"order": 0}, "`order` is 0; an integer of at least 1"),
        ("cc-kernel", {"gamma": -1}, "`gamma` is -1; a number above 0"),
        ("rkd", {"distance_weight": -1}, "`distance_weight` is -1; a number of at least 0"),
        ("rkd", {"angle_weight": -1}, "`angle_weight` is -1; a number of at least 0"),
        ("pkt", {"eps": -1}, "`eps` is -1; a number of at least 0"),
    ],
)
def test_invalid_options_of_relations_are_refused(name, options, message):
    with pytest.raises(UsageError, match=f"{message} is needed"):
        LOSSES[name](es, et5, **options)
