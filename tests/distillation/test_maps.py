"""Losses on feature maps and stages: closed forms, independent implementations, and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from scipy.stats import norm
from torch.nn import functional as F

from distillation.golden import a1, a2, b1, b2, fs, ft, ft3, ft4, g1, g2, h1, h2
from kirsch import ops
from kirsch.distillation.losses import LOSSES
from kirsch.distillation.losses.maps import STANDARD_MARGIN, margins
from kirsch.distillation.losses.stages import _right_vectors
from kirsch.errors import ShapeError, UsageError
from kirsch.testing import LOSS_CHECKS


def loss_value(name, student, teacher, framework=np.asarray, **options):
    return float(LOSSES[name](ops.map_arrays(framework, student), ops.map_arrays(framework, teacher), **options))


def maps(*rows):
    """Return maps of one sample with one row of positions per channel: shape (1, C, 1, W)."""
    return np.array(rows, dtype=np.float64)[None, :, None]


# ---------------------------------------------------------------------------------------------------- closed forms


def test_attention_transfer_equals_its_closed_form(framework):
    """Attention maps (1, 0) and (1, 1) / √2 have the distance √(2 - √2)."""
    student, teacher = maps([2, 0], [1, 0]), maps([1, -1])
    assert loss_value("at", student, teacher, framework) == pytest.approx((2 - math.sqrt(2)) / 2, rel=1e-14)
    paper = loss_value("at", student, teacher, framework, convention="paper")
    assert paper == pytest.approx(math.sqrt(2 - math.sqrt(2)), rel=1e-14)


def test_neuron_selectivity_equals_its_closed_form(framework):
    """The channels are orthogonal: the kernel is 1 within each model, 0 between them. The discrepancy is 1 + 1 - 0."""
    assert loss_value("nst", maps([3, 0]), maps([0, 5]), framework) == pytest.approx(2, rel=1e-14)
    # Means of the kernel over pairs of channels: 1/2 within the teacher, 1 within the student, 1/2 between (twice).
    assert loss_value("nst", maps([3, 0]), maps([0, 5], [1, 0]), framework) == pytest.approx(0.5, rel=1e-14)


def test_activation_boundaries_equal_their_closed_form(framework):
    """Signs of the teacher (+, +, -, -), student (2, 0.5, 0, -3), margin 1: hinges 0, 0.5, 1, 0."""
    student, teacher = maps([2, 0.5, 0, -3]), maps([0.1, 3, -0.1, -4])
    value = loss_value("ab", student, teacher, framework, convention="torchdistill")
    assert value == pytest.approx(1.25, rel=1e-14)
    assert loss_value("ab", student, teacher, framework, margin=0.5, convention="torchdistill") == pytest.approx(0.25)


def test_ofd_equals_its_closed_form(framework):
    """Where the teacher is above 0, every difference counts.

    Where the teacher is at most 0, the target is the larger of its value and the margin -1, and only a student above
    the target adds to the loss.
    """
    teacher = maps([2, 2, -0.5, -0.5, -3, -3])
    student = maps([0, 3, -2, 1, -2, 1])
    assert loss_value("ofd", student, teacher, framework, margin=-1.0) == pytest.approx(4 + 1 + 0 + 2.25 + 0 + 4)


def test_cwd_equals_its_closed_form(framework):
    """Teacher (1/2, 1/2), student (1/4, 3/4) at temperature 2: log(4/3) / 2 times 4."""
    student, teacher = maps([0, 2 * math.log(3)], [5, 5]), maps([7, 7], [1, 1])
    value = loss_value("cwd", student, teacher, framework, temperature=2.0)
    assert value == pytest.approx(4 * math.log(4 / 3) / 2 / 2, rel=1e-13)  # the second channel agrees
    assert loss_value("cwd-pixels", student, teacher, framework, temperature=2.0) == pytest.approx(value, rel=1e-15)


def test_factor_transfer_equals_its_closed_form(framework):
    """(3, 4) / 5 and (1, 0) differ by 0.4 and 0.8; squared activations give (9, 16) / √337."""
    student, teacher = maps([3, 4]), maps([2, 0])
    assert loss_value("ft", student, teacher, framework, convention="paper") == pytest.approx(0.6, rel=1e-14)
    length = math.sqrt(337)
    assert loss_value("ft", student, teacher, framework) == pytest.approx((1 - 9 / length + 16 / length) / 2, rel=1e-14)


def test_hierarchical_context_equals_its_closed_form(framework):
    """A checkerboard of ±1 is 0 after pooling, so only the full size counts, with the weight 1 / (1 + 1/2 + 1/4).

    Pooling does not change a constant map.
    """
    board = (-1.0) ** np.add.outer(np.arange(4), np.arange(4))[None, None]
    zero = np.zeros_like(board)
    assert loss_value("hcl", board, zero, framework) == pytest.approx(1 / 1.75, rel=1e-14)
    assert loss_value("hcl", zero + 3, zero, framework) == pytest.approx(9, rel=1e-14)


def test_pearson_is_one_minus_the_correlation_of_each_channel(framework):
    value = loss_value("pkd", fs, ft4, framework, eps=0.0)
    rows = [part.swapaxes(0, 1).reshape(4, -1) for part in (fs, ft4)]
    correlation = [np.corrcoef(row_s, row_t)[0, 1] for row_s, row_t in zip(*rows, strict=True)]
    count = rows[0].shape[1]  # the standard deviation divides by n - 1, so the mean square is (n - 1) / n
    assert value == pytest.approx((1 - np.mean(correlation)) * (count - 1) / count, rel=1e-12)


def test_the_normalized_distance_is_2_minus_2_cosines(framework):
    pairs = [(s.ravel(), t.ravel()) for s, t in zip(fs, ft4, strict=True)]
    cosine = [s @ t / np.linalg.norm(s) / np.linalg.norm(t) for s, t in pairs]
    assert loss_value("l2-normalized", fs, ft4, framework) == pytest.approx(2 - 2 * np.mean(cosine), rel=1e-13)


def test_an_fsp_matrix_is_the_mean_product_of_channels(framework):
    """(1, 2) · (3, 4) / 2 = 5.5 and (1, 1) · (1, 1) / 2 = 1; with three stages both pairs count."""
    first, second, ones = maps([1, 2]), maps([3, 4]), maps([1, 1])
    assert loss_value("fsp", [first, second], [ones, ones], framework) == pytest.approx(4.5**2, rel=1e-14)
    pairs = loss_value("fsp", [first, second, ones], [ones, ones, ones], framework)
    assert pairs == pytest.approx(4.5**2 + 2.5**2, rel=1e-14)  # (3, 4) · (1, 1) / 2 = 3.5


def test_the_larger_map_of_an_fsp_matrix_is_pooled_by_mean_or_maximum(framework):
    """(1, 5, 2, 4) in two halves: means (3, 3), maxima (5, 4); products with (1, 2)."""
    low, high, zero = maps([1, 5, 2, 4]), maps([1, 2]), maps([0, 0])
    assert loss_value("fsp", [low, high], [zero, zero], framework) == pytest.approx(4.5**2, rel=1e-14)
    peaks = loss_value("fsp", [low, high], [zero, zero], framework, convention="torchdistill")
    assert peaks == pytest.approx(6.5, rel=1e-14)


def test_maximum_pooling_equals_that_of_pytorch(framework):
    odd = g1[:, :, :, :5]
    low, high = (torch.from_numpy(part) for part in (odd, g2))
    products = (F.adaptive_max_pool2d(low, (3, 3)).flatten(2) @ high.flatten(2).mT / 9).numpy()
    zero = [np.zeros_like(odd), np.zeros_like(g2)]
    value = loss_value("fsp", [odd, g2], zero, framework, convention="torchdistill")
    assert value == pytest.approx(np.linalg.norm(products, axis=1).sum() / 8, rel=1e-13)


def test_vid_equals_its_closed_form(framework):
    """Variances 1 and e: (2² / 1 + 0) / 2 and (2² / e + 1) / 2."""
    scale = np.log(np.expm1(np.array([1.0, math.e]) - 1e-5))
    teacher = np.zeros((3, 2, 2, 2))
    value = loss_value("vid", {"mean": teacher + 2, "scale": scale}, teacher, framework)
    assert value == pytest.approx((2 + 2 / math.e + 0.5) / 2, rel=1e-12)
    plain = loss_value("vid", teacher + 2, teacher, framework)
    assert plain == pytest.approx((4 / 5 + math.log(5)) / 2, rel=1e-12)


# ------------------------------------------------------------------------------------------------------- two ways


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_neuron_selectivity_equals_the_sum_over_all_pairs_of_channels(channels_s, channels_t, side, seed):
    """The result does not depend on whether products of channels or of positions are computed."""
    random = np.random.default_rng(seed)
    student, teacher = (random.standard_normal((2, channels, side, side)) for channels in (channels_s, channels_t))
    first, second = (part.reshape(*part.shape[:2], -1) for part in (student, teacher))
    first, second = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (first, second))

    def kernel(left, right):
        return ((left[:, :, None] * right[:, None]).sum(-1) ** 2).mean()

    expected = kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)
    assert loss_value("nst", student, teacher) == pytest.approx(expected, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (3, 3), (1, 1)])
def test_hierarchical_context_equals_that_with_pytorch_pooling(size):
    student, teacher = (torch.from_numpy(part[:, :, : size[0], : size[1]].copy()) for part in (fs, ft4))
    value = LOSSES["hcl"](student, teacher)
    height = student.shape[2]
    total, weights = F.mse_loss(student, teacher), 1.0
    for level, side in enumerate([side for side in (4, 2, 1) if side < height], 1):
        pools = [F.adaptive_avg_pool2d(part, (side, side)) for part in (student, teacher)]
        total, weights = total + F.mse_loss(*pools) / 2**level, weights + 1 / 2**level
    assert float(value) == pytest.approx(float(total / weights), rel=1e-12)


@given(st.floats(-6, 6), st.floats(0.05, 5))
@settings(deadline=None, derandomize=True, max_examples=80)
def test_margins_equal_the_mean_of_negative_values_by_integration(mean, std):
    """The density is divided by its largest value below 0, so that it does not underflow."""
    top = min(mean, 0.0)
    height = norm.logpdf(top, mean, std)

    def density(x):
        return math.exp(norm.logpdf(x, mean, std) - height)

    low = top - 12 * std
    mass = integrate.quad(density, low, 0, epsabs=0, epsrel=1e-11, points=[max(low, top - std)])[0]
    moment = integrate.quad(lambda x: x * density(x), low, 0, epsabs=0, epsrel=1e-11, points=[max(low, top - std)])[0]
    assert margins([mean], [std])[0] == pytest.approx(moment / mass, rel=1e-7, abs=1e-9)


def test_margins_of_a_standard_normal_channel_are_the_default():
    assert margins([0.0], [1.0])[0] == pytest.approx(STANDARD_MARGIN, rel=1e-14)
    assert margins([0.0], [-2.0])[0] == pytest.approx(
        2 * STANDARD_MARGIN, rel=1e-14
    )  # the weight of a batch norm may be negative


def test_margins_are_finite_for_constant_channels_and_for_rare_negative_values():
    value = margins([-2.0, 2.0, 0.0, 50.0, -50.0], [0.0, 0.0, 0.0, 1.0, 1.0])
    assert value[:3].tolist() == [-2, 0, 0]
    assert value[3] == pytest.approx(-1 / 50, rel=1e-3)  # asymptotically -std² / mean
    assert value[4] == pytest.approx(-50, rel=1e-14)


def test_ofd_accepts_one_margin_per_channel():
    by_channel = margins(np.array([0.0, 0.5, -0.5, 1.0]), np.ones(4))
    value = [loss_value("ofd", fs, ft4, framework, margin=by_channel) for framework in (np.asarray, torch.from_numpy)]
    by_hand = np.mean([loss_value("ofd", fs[:, [c]], ft4[:, [c]], margin=float(by_channel[c])) for c in range(4)]) * 4
    assert value == pytest.approx([by_hand] * 2, rel=1e-12)


# ------------------------------------------------------------------------------------------------ invariances


def test_at_and_nst_are_invariant_to_the_order_of_channels(framework):
    moved = fs[:, [2, 0, 3, 1]]
    for name in ("at", "nst"):
        assert loss_value(name, moved, ft, framework) == pytest.approx(loss_value(name, fs, ft, framework), rel=1e-12)
        assert loss_value(name, moved, fs, framework) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("name", ["at", "nst"])
def test_the_larger_of_two_maps_is_averaged_to_the_size_of_the_smaller(name, framework):
    small = F.adaptive_avg_pool2d(torch.from_numpy(fs), (3, 3)).numpy()
    assert loss_value(name, fs, ft3, framework) == pytest.approx(loss_value(name, small, ft3, framework), rel=1e-12)
    assert loss_value(name, ft3, fs, framework) == pytest.approx(loss_value(name, ft3, small, framework), rel=1e-12)


def test_kd_svd_is_invariant_to_the_signs_of_singular_vectors(framework, monkeypatch):
    """The signs depend on the linear algebra library of the machine."""
    values = [loss_value("kd-svd", [a1, a2], [b1, b2], framework, convention=c) for c in ("signed", "repdistiller")]
    original_svd = ops.svd
    signs = iter(np.random.default_rng(0).choice([-1.0, 1.0], (200, 4)))

    def svd_with_other_signs(matrix):
        u, s, v = original_svd(matrix)
        return u, s, v * framework(next(signs)[None, :, None].copy())

    monkeypatch.setattr(ops, "svd", svd_with_other_signs)
    value = [loss_value("kd-svd", [a1, a2], [b1, b2], framework, convention=c) for c in ("signed", "repdistiller")]
    assert value[0] == pytest.approx(values[0], rel=1e-12)
    assert value[1] != pytest.approx(values[1], rel=1e-3)  # the value of the reference depends on the machine


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5)], ids=["tall", "wide"])
def test_the_gradient_of_singular_vectors_equals_that_of_pytorch(shape):
    """The function is |v · c|² for the two largest singular values: the signs of the vectors do not matter."""
    random = np.random.default_rng(0)
    matrix = torch.from_numpy(random.standard_normal(shape)).requires_grad_()
    target = torch.from_numpy(random.standard_normal(shape[2]))
    (gradient,) = torch.autograd.grad(((_right_vectors(matrix, 2)[1] @ target) ** 2).sum(), matrix)
    rows = torch.linalg.svd(matrix, full_matrices=False)[2][:, :2]
    (expected,) = torch.autograd.grad(((rows @ target) ** 2).sum(), matrix)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-11)


def test_equal_singular_values_leave_the_gradient_finite():
    """The channels are orthogonal with equal norms. In this case the gradient of torch.linalg.svd is not finite."""
    identity = torch.eye(4, dtype=torch.float64).reshape(1, 4, 2, 2)
    student = [identity.clone().requires_grad_(), torch.from_numpy(a1[:1, :, :2, :2].copy()).requires_grad_()]
    teacher = [torch.from_numpy(part[:1, :, :2, :2].copy()) for part in (b1, b2)]
    LOSSES["kd-svd"](student, teacher).backward()
    assert all(torch.isfinite(part.grad).all() for part in student)
    rows = torch.linalg.svd(student[0].flatten(2).mT, full_matrices=False)[2]
    (gradient,) = torch.autograd.grad((rows[:, 0] @ torch.arange(4.0, dtype=torch.float64)).sum(), student[0])
    assert not torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["at", "nst", "ft", "pkd", "l2-normalized"])
def test_maps_of_zero_leave_the_gradient_finite(name):
    """Norms and standard deviations of zeros are 0, where the square root has no gradient."""
    for options in ({}, {"convention": "paper"}) if name in ("at", "ft") else ({},):
        student = torch.zeros(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
        value = LOSSES[name](student, torch.from_numpy(ft4[:2]), **options)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(student.grad).all()


def test_the_gradient_of_at_is_0_if_the_student_equals_its_teacher():
    student = torch.from_numpy(fs.copy()).requires_grad_()
    LOSSES["at"](student, torch.from_numpy(fs), convention="paper").backward()
    assert student.grad.abs().max() == 0


# ---------------------------------------------------------------------------------------------------- variational


def with_scale(student, teacher):
    """Return "vid" with scales taken from the student's values."""
    return LOSSES["vid"]({"mean": student, "scale": student[0, :, 0, 0]}, teacher)


with_scale.takes = "maps"
with_scale.least_at_teacher = False  # the minimum depends on the scales

NOT_APPLICABLE = {
    "check_order_of_samples_does_not_matter",
    "check_parts_of_a_batch_add_up_to_it",
    "check_unequal_shapes_are_refused",
}
"""Checks that `with_scale` cannot pass: its scales are those of the first sample. Wrong shapes are tested below."""


@pytest.mark.parametrize(
    "check", [c for c in LOSS_CHECKS if c.__name__ not in NOT_APPLICABLE], ids=lambda c: c.__name__
)
def test_vid_conforms_with_learned_scales(check):
    check(with_scale)


def test_no_gradient_reaches_the_teacher_of_vid():
    mean, scale, teacher = (torch.ones(s, requires_grad=True) for s in ((2, 3, 2, 2), (3,), (2, 3, 2, 2)))
    LOSSES["vid"]({"mean": mean, "scale": scale}, teacher).backward()
    assert teacher.grad is None
    assert scale.grad is not None


# --------------------------------------------------------------------------------------------------------- errors


def test_numbers_of_scales_or_margins_that_differ_from_the_number_of_channels_are_refused():
    with pytest.raises(ShapeError, match="`scale` has 3 values; 1 or 4, one per channel, are needed"):
        LOSSES["vid"]({"mean": fs, "scale": np.zeros(3)}, ft4)
    with pytest.raises(ShapeError, match="`margin` has 3 values"):
        LOSSES["ofd"](fs, ft4, margin=[-1, -1, -1])


@pytest.mark.parametrize("name", ["at", "nst", "cwd", "hcl", "pkd", "ofd", "ab", "ft", "mgd", "vid"])
def test_arrays_that_are_not_maps_are_refused(name):
    with pytest.raises(ShapeError, match=r"student's maps have shape \(8, 4, 36\); \(N, C, H, W\) is needed"):
        LOSSES[name](fs.reshape(8, 4, 36), ft4)


@pytest.mark.parametrize("name", ["fitnet", "cwd", "hcl", "pkd", "ofd", "ab", "mgd", "vid"])
def test_maps_of_another_size_are_refused_by_losses_that_compare_positions(name):
    with pytest.raises(ShapeError, match=r"student's maps have shape \(8, 4, 6, 6\), the teacher's \(8, 4, 3, 3\)"):
        LOSSES[name](fs, ft4[:, :, :3, :3])


@pytest.mark.parametrize("name", ["fsp", "kd-svd"])
def test_unequal_stages_are_refused(name):
    with pytest.raises(ShapeError, match=r"student has 1 stage, the teacher 1.*at least two"):
        LOSSES[name]([g1], [h1])
    with pytest.raises(ShapeError, match="student has 2 stages, the teacher 3"):
        LOSSES[name]([g1, g2], [h1, h2, h2])
    with pytest.raises(ShapeError, match="Stage 1 has 5 channels in the student, 4 in the teacher"):
        LOSSES[name]([g1, g2], [h1, h2[:, :4]])


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(UsageError, match="temperature is 0; a number above 0 is needed"):
        LOSSES["cwd"](fs, ft4, temperature=0)


def test_the_convention_mdistiller_refuses_unequal_widths():
    with pytest.raises(ShapeError, match="rows of maps have shape"):
        LOSSES["kd-svd"]([a1, a2], [b1[..., :5], b2[..., :5]], convention="mdistiller")


MAPS = np.random.default_rng(0).standard_normal((2, 2, 3, 4, 4))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("at", {"power": 0}, "`power` is 0; a number above 0"),
        ("at", {"power": math.nan}, "`power` is nan; a number above 0"),
        ("ft", {"power": 0}, "`power` is 0; a number above 0"),
        ("ft", {"activity_power": -1}, "`activity_power` is -1; a number above 0"),
        ("ab", {"margin": -1}, "`margin` is -1; a number above 0"),
        ("ofd", {"margin": 2}, "`margin` is 2; numbers of at most 0"),
        ("ofd", {"margin": [-1.0, 0.5, 0.0]}, r"`margin` is \[-1.0, 0.5, 0.0\]; numbers of at most 0"),
        ("hcl", {"sizes": (0,)}, "`size` is 0; an integer of at least 1"),
        ("pkd", {"eps": -1}, "`eps` is -1; a number of at least 0"),
        ("vid", {"variance": 1e-5}, "`variance` is 1e-05; a number above 1e-05"),
        ("vid", {"variance": -1}, "`variance` is -1; a number above 1e-05"),
        ("vid", {"eps": 0}, "`eps` is 0; a number above 0"),
    ],
)
def test_invalid_options_of_maps_are_refused(name, options, message):
    with pytest.raises(UsageError, match=f"{message}.* needed"):
        LOSSES[name](*MAPS, **options)


@pytest.mark.parametrize("variance", [2e-5, 5.0, 800.0, 1e6])
def test_vid_equals_the_gaussian_negative_log_likelihood_for_any_variance(variance):
    expected = 0.5 * ((MAPS[0] - MAPS[1]) ** 2 / variance + math.log(variance)).mean()
    assert float(LOSSES["vid"](*MAPS, variance=variance)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "`count` is 0; an integer of at least 1 is needed"),
        (1.5, "`count` is 1.5; an integer of at least 1 is needed"),
        (4, "`count` is 4; the smallest map has 3 singular vectors. Use at most 3"),
    ],
)
def test_an_invalid_number_of_singular_vectors_is_refused(count, message):
    with pytest.raises(UsageError, match=message):
        LOSSES["kd-svd"](list(MAPS), list(MAPS), count=count)


def test_reviewkd_is_the_sum_over_stages_and_refuses_empty_lists():
    student, teacher = MAPS[:, :1], MAPS[:, 1:]
    expected = sum(float(LOSSES["hcl"](*pair)) for pair in zip(student, teacher, strict=True))
    assert float(LOSSES["reviewkd"](list(student), list(teacher))) == pytest.approx(expected, rel=1e-14)
    with pytest.raises(
        ShapeError, match=r"The student or the teacher has no arrays\. Pass at least one: the loss compares stages"
    ):
        LOSSES["reviewkd"]([], [])
