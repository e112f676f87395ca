"""Losses of how samples lie to each other: closed forms, two ways to the same number, and what each does not see."""

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

FRAMEWORKS = [lambda array: array, torch.from_numpy]
NAMES = ["numpy", "torch"]
ANY_WIDTH = ["sp", "rkd-distance", "rkd-angle", "rkd", "pkt", "cc-kernel"]
both = pytest.mark.parametrize("framework", FRAMEWORKS, ids=NAMES)

CORNER = np.array([[0.0, 0], [1, 0], [0, 1]])
"""A right angle at the first of three samples."""
LINE = np.array([[0.0], [1], [3]])


def charged(name, student, teacher, framework=FRAMEWORKS[0], **options):
    return float(LOSSES[name](framework(student), framework(teacher), **options))


# ---------------------------------------------------------------------------------------------------- closed forms


@both
def test_relational_distances_in_closed_form(framework):
    """Distances 1, 2, 3 in units of 2 against 1, √2, 1 in units of their mean; both orders, no diagonal."""
    mean = (2 + math.sqrt(2)) / 3
    apart = np.array([1 / 2 - 1 / mean, 2 / 2 - math.sqrt(2) / mean, 3 / 2 - 1 / mean])
    found = charged("rkd-distance", LINE, CORNER, framework)
    assert found == pytest.approx((apart**2 / 2).sum() * 2 / 9, rel=1e-13)


@both
def test_relational_angles_in_closed_form(framework):
    """Of a right isosceles triangle and of a line: three cosines each, in both orders, among 27.

    The legs of one angle with themselves have cosine 1 in both. Cosines 0, 1/√2, 1/√2 at the three samples against
    1, -1, 1 on the line; a difference beyond 1 is charged less a half.
    """
    tilt = 1 / math.sqrt(2)
    charges = [1 / 2, (1 + tilt) - 1 / 2, (1 - tilt) ** 2 / 2]
    assert charged("rkd-angle", LINE, CORNER, framework) == pytest.approx(2 * sum(charges) / 27, rel=1e-13)


@both
def test_similarities_in_closed_form(framework):
    """Products of orthogonal samples are the identity; of equal ones, ones: rows (1, 1) / √2 or / 2."""
    apart, same = np.eye(2), np.ones((2, 1))
    tilt = 1 / math.sqrt(2)
    rows = ((1 - tilt) ** 2 + tilt**2) * 2 / 4
    assert charged("sp", apart, same, framework) == pytest.approx(rows, rel=1e-14)
    assert charged("sp", apart, same, framework, convention="torchdistill") == pytest.approx(0.25, rel=1e-14)


@both
def test_probabilities_in_closed_form(framework):
    """Cosines 1 and 0 are (2/3, 1/3); 1 and 1 are (1/2, 1/2): Kullback-Leibler over 2 · 2 pairs."""
    student, teacher = np.eye(2), np.ones((2, 1))
    divergence = (math.log(0.5 / (2 / 3)) + math.log(0.5 / (1 / 3))) / 2
    found = charged("pkt", student, teacher, framework, eps=0.0)
    assert found == pytest.approx(2 * divergence / 4, rel=1e-13)


@both
def test_correlations_of_neighbors_in_closed_form(framework):
    """Distances (1, 2), (0, 3), (2, 0): products 6 and 0 of two neighbors."""
    student = np.array([[1.0, -2], [0, 3], [2, 0]])
    assert charged("cc", student, np.zeros((3, 2)), framework) == pytest.approx(3, rel=1e-14)
    assert charged("cc", student[[0, 2, 1]], np.zeros((3, 2)), framework) == pytest.approx((2 + 0) / 2, rel=1e-14)


@both
def test_kernels_in_closed_form(framework):
    """Cosine 0 against cosine 1 of two samples: the series is 1 against 1 + 0.8 + 0.32, times exp(-0.8)."""
    student, teacher = 3 * np.eye(2), np.ones((2, 1))
    apart = math.exp(-0.8) * 1.12
    assert charged("cc-kernel", student, teacher, framework) == pytest.approx(apart**2 / 2, rel=1e-13)
    length = charged("cc-kernel", student, teacher, framework, convention="torchdistill")
    assert length == pytest.approx(math.sqrt(2) * apart / 4, rel=1e-13)
    assert charged("cc-kernel", student, teacher, framework, kernel="bilinear") == pytest.approx(0.5, rel=1e-13)


def test_the_series_of_the_kernel_goes_to_the_gaussian():
    unit = es / np.linalg.norm(es, axis=1, keepdims=True)
    squares = ((unit[:, None] - unit[None]) ** 2).sum(-1)
    ones = np.ones((8, 1))
    wanted = ((np.exp(-0.4 * squares) - 1) ** 2).mean()
    assert charged("cc-kernel", es, ones, order=20) == pytest.approx(wanted, rel=1e-12)


@both
def test_contrast_in_a_batch_in_closed_form(framework):
    """Orthogonal pairs that agree: log(1 + exp(-1 / T)); a batch that is all one: log N."""
    found = charged("crd-batch", 2 * np.eye(2), 5 * np.eye(2), framework, temperature=0.5)
    assert found == pytest.approx(math.log1p(math.exp(-2)), rel=1e-13)
    assert charged("crd-batch", np.ones((4, 3)), np.ones((4, 3)), framework) == pytest.approx(math.log(4), rel=1e-13)


def test_contrast_in_a_batch_is_pytorchs_cross_entropy_of_the_diagonal():
    student, teacher = F.normalize(torch.from_numpy(es)), F.normalize(torch.from_numpy(et5))
    other = F.cross_entropy(student @ teacher.mT / 0.07, torch.arange(8))
    assert charged("crd-batch", es, et5) == pytest.approx(float(other), rel=1e-12)


@both
def test_contrast_with_a_memory_in_closed_form(framework):
    """Scores of 1, 1 and 3 times what noise is expected to: 1/2, and 1/2 and 1/4 that they are none."""
    logits = framework(np.log([[1.0, 1.0, 3.0]]))
    wanted = math.log(2) + math.log(2) + math.log(4)
    assert float(LOSSES["crd"](logits, logits)) == pytest.approx(2 * wanted, rel=1e-14)  # both directions
    twice = framework(np.log([[1.0, 1.0, 3.0], [1.0, 1.0, 1.0]]))
    assert float(LOSSES["crd"](twice, twice)) == pytest.approx(wanted + 3 * math.log(2), rel=1e-14)


def test_contrast_with_a_memory_draws_the_positive_up_and_negatives_down():
    logits = torch.full((3, 5), -0.2, dtype=torch.float64, requires_grad=True)
    LOSSES["crd"](logits, logits.detach()).backward()
    assert (logits.grad[:, 0] < 0).all()
    assert (logits.grad[:, 1:] > 0).all()


# ------------------------------------------------------------------------------------------------------- two ways


def naive_cosines(features):
    apart = features[None] - features[:, None]  # (j, i, D)
    length = np.linalg.norm(apart, axis=-1, keepdims=True)
    unit = np.where(length > 0, apart / np.where(length > 0, length, 1), 0)
    return unit @ unit.swapaxes(1, 2)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_angles_are_those_of_the_differences_of_all_pairs(count, width, seed):
    random = np.random.default_rng(seed)
    student, teacher = random.standard_normal((count, width)), random.standard_normal((count, width + 1))
    apart = abs(naive_cosines(student) - naive_cosines(teacher))
    wanted = np.where(apart < 1, apart**2 / 2, apart - 0.5).mean()
    assert charged("rkd-angle", student, teacher) == pytest.approx(wanted, rel=1e-8, abs=1e-11)


def test_distances_are_those_of_pytorch():
    wanted = [torch.cdist(torch.from_numpy(part), torch.from_numpy(part)) for part in (es, et)]
    first, second = (part / part[part > 0].mean() for part in wanted)
    assert charged("rkd-distance", es, et) == pytest.approx(float(F.smooth_l1_loss(first, second)), rel=1e-7)


def test_the_sum_of_both_relations_is_weighted():
    parts = charged("rkd-distance", es, et), charged("rkd-angle", es, et)
    assert charged("rkd", es, et) == pytest.approx(25 * parts[0] + 50 * parts[1], rel=1e-14)


@pytest.mark.parametrize("name", ["rkd-distance", "rkd-angle"])
def test_units_are_those_of_features_of_length_one(name):
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (es, et)]
    assert charged(name, es, et, unit=True) == pytest.approx(charged(name, *unit), rel=1e-12)


# ------------------------------------------------------------------------------------------------ what is not seen


@both
@pytest.mark.parametrize("name", ANY_WIDTH)
def test_a_rotation_of_features_is_not_seen(name, framework):
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((7, 7)))[0]
    assert charged(name, es, et @ turn, framework) == pytest.approx(charged(name, es, et, framework), rel=1e-10)
    assert charged(name, et, et @ turn, framework) == pytest.approx(0, abs=1e-12)


@both
@pytest.mark.parametrize("name", ANY_WIDTH)
def test_the_length_of_all_features_is_not_seen(name, framework):
    assert charged(name, 3 * es, et, framework) == pytest.approx(charged(name, es, et, framework), rel=1e-6)


@both
@pytest.mark.parametrize("name", ["rkd-distance", "rkd-angle", "rkd"])
def test_where_all_features_lie_is_not_seen_even_in_single_precision(name, framework):
    """An offset a thousand times the differences would leave few digits to products of samples."""
    wanted = charged(name, es, et, framework)
    assert charged(name, es + 100.0, et, framework) == pytest.approx(wanted, rel=1e-9)
    single = [part.astype(np.float32) for part in (es, et)]
    # Rounding of the offset samples themselves: 1e3 · 6e-8 on values of size 1.
    assert charged(name, single[0] + 1000, single[1], framework) == pytest.approx(wanted, rel=1e-3)


@both
@pytest.mark.parametrize("name", ANY_WIDTH)
def test_features_of_any_shape_are_one_vector_a_sample(name, framework):
    cube = et.reshape(8, 7, 1, 1)
    assert charged(name, es, cube, framework) == charged(name, es, et, framework)


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", [*ANY_WIDTH, "crd-batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_that_coincide_leave_the_gradient_finite(name, dtype):
    """A batch that holds one image twice, and one whose features are all zero."""
    features = torch.from_numpy(et5).to(dtype)
    for student in (features[[0, 0, 1, 2, 2, 2, 3, 4]], torch.zeros_like(features), torch.ones_like(features)):
        own = student.clone().requires_grad_()
        found = LOSSES[name](own, features)
        found.backward()
        assert torch.isfinite(found)
        assert torch.isfinite(own.grad).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@both
def test_samples_that_coincide_have_no_angle(framework, dtype):
    """What rounding leaves of their distance is not divided by: no cosine is beyond 1, so no charge beyond 1.5."""
    random = np.random.default_rng(0)
    whole = random.standard_normal((6, 512)).astype(dtype)[[0, 0, 1, 1, 2, 2]]
    student = whole * (1 + 2 * np.finfo(dtype).eps * random.standard_normal(whole.shape)).astype(dtype)
    teacher = np.arange(6, dtype=dtype)[:, None]
    wanted = abs(naive_cosines(whole.astype(np.float64)) - naive_cosines(teacher))
    charges = np.where(wanted < 1, wanted**2 / 2, wanted - 0.5).mean()
    assert charged("rkd-angle", student, teacher, framework) == pytest.approx(charges, rel=1e-4)


def test_a_single_sample_has_no_relations():
    for name in ("sp", "rkd", "pkt", "cc"):
        assert charged(name, es[:1], et5[:1]) == pytest.approx(0, abs=1e-15)


# --------------------------------------------------------------------------------------------------------- refusals


@both
@pytest.mark.parametrize("name", ANY_WIDTH)
def test_other_samples_are_refused(name, framework):
    with pytest.raises(
        ShapeError, match=r"student's features are of 8 samples, the teacher's of 7. They must be of the"
    ):
        charged(name, es, et[:7], framework)


@pytest.mark.parametrize("name", ["cc", "crd-batch"])
def test_embeddings_of_another_width_are_refused(name):
    with pytest.raises(ShapeError, match=r"student's features have shape \(8, 5\), the teacher's \(8, 7\)"):
        charged(name, es, et)


def test_a_temperature_below_zero_is_refused():
    with pytest.raises(UsageError, match="temperature is -1; a number above 0 is needed"):
        charged("crd-batch", es, et5, temperature=-1)


@pytest.mark.parametrize("name", ["rkd-distance", "rkd-angle"])
@pytest.mark.parametrize("unit", [False, True])
def test_samples_close_together_and_far_from_the_others_are_told_apart_in_32_bits(name, unit):
    """8 clusters of 8 samples, 600 apart for a spread of 1."""
    random = np.random.default_rng(1)
    places = np.repeat(600 * random.standard_normal((8, 64)), 8, 0)
    sides = [torch.from_numpy((scale * places + random.standard_normal((64, 64))).astype("f")) for scale in (1, 1.3)]
    found = []
    for student, teacher in (sides, [side.double() for side in sides]):
        student.requires_grad_()
        loss = LOSSES[name](student, teacher, unit=unit)
        loss.backward()
        found.append((float(loss.detach()), student.grad.double()))
    (value, slope), (wanted, slope_of) = found
    assert value == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    # A leg of 1 beside one of 600 costs three of the seven digits of a cosine.
    assert float((slope - slope_of).norm() / slope_of.norm()) < 1e-3


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("cc-kernel", {"order": -1}, "`order` is -1; a whole number of at least 1"),
        ("cc-kernel", {"order": 0}, "`order` is 0; a whole number of at least 1"),
        ("cc-kernel", {"gamma": -1}, "`gamma` is -1; a number above 0"),
        ("rkd", {"distance_weight": -1}, "`distance_weight` is -1; a number of at least 0"),
        ("rkd", {"angle_weight": -1}, "`angle_weight` is -1; a number of at least 0"),
        ("pkt", {"eps": -1}, "`eps` is -1; a number of at least 0"),
    ],
)
def test_options_of_relations_that_are_none_are_refused(name, options, sentence):
    with pytest.raises(UsageError, match=f"{sentence} is needed"):
        LOSSES[name](es, et5, **options)
