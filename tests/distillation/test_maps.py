"""Losses of maps and stages: closed forms, two ways to the same number, and what each does not see."""

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
from kirsch.distillation.arrays import each
from kirsch.distillation.losses import LOSSES
from kirsch.distillation.losses.maps import STANDARD_MARGIN, margins
from kirsch.distillation.losses.stages import _right_vectors
from kirsch.errors import ShapeError, UsageError
from kirsch.testing import LOSS_CHECKS

FRAMEWORKS = [lambda array: array, torch.from_numpy]
NAMES = ["numpy", "torch"]
both = pytest.mark.parametrize("framework", FRAMEWORKS, ids=NAMES)


def charged(name, student, teacher, framework=FRAMEWORKS[0], **options):
    return float(LOSSES[name](each(framework, student), each(framework, teacher), **options))


def maps(*rows):
    """One sample with one row of places a channel: shape (1, C, 1, W)."""
    return np.array(rows, dtype=np.float64)[None, :, None]


# ---------------------------------------------------------------------------------------------------- closed forms


@both
def test_attention_in_closed_form(framework):
    """Active at the first place, and at both alike: (1, 0) against (1, 1) / √2, at a distance of √(2 - √2)."""
    student, teacher = maps([2, 0], [1, 0]), maps([1, -1])
    assert charged("at", student, teacher, framework) == pytest.approx((2 - math.sqrt(2)) / 2, rel=1e-14)
    paper = charged("at", student, teacher, framework, convention="paper")
    assert paper == pytest.approx(math.sqrt(2 - math.sqrt(2)), rel=1e-14)


@both
def test_neuron_selectivity_in_closed_form(framework):
    """Orthogonal channels: the kernel is 1 of each with itself and 0 across, so that the discrepancy is 2."""
    assert charged("nst", maps([3, 0]), maps([0, 5]), framework) == pytest.approx(2, rel=1e-14)
    # Means over channels: 1/2 of the teacher's two with each other, 1 of the student's, 2 · 1/2 across.
    assert charged("nst", maps([3, 0]), maps([0, 5], [1, 0]), framework) == pytest.approx(0.5, rel=1e-14)


@both
def test_activation_boundaries_in_closed_form(framework):
    """Teacher (+, +, -, -), student (2, 0.5, 0, -3), margin 1: misses by 0, 0.5, 1, 0."""
    student, teacher = maps([2, 0.5, 0, -3]), maps([0.1, 3, -0.1, -4])
    found = charged("ab", student, teacher, framework, convention="torchdistill")
    assert found == pytest.approx(1.25, rel=1e-14)
    assert charged("ab", student, teacher, framework, margin=0.5, convention="torchdistill") == pytest.approx(0.25)


@both
def test_overhaul_in_closed_form(framework):
    """Margin -1. Teacher 2: any student pays; -0.5: one above pays; -3: one above the margin pays, up to it."""
    teacher = maps([2, 2, -0.5, -0.5, -3, -3])
    student = maps([0, 3, -2, 1, -2, 1])
    assert charged("ofd", student, teacher, framework, margin=-1.0) == pytest.approx(4 + 1 + 0 + 2.25 + 0 + 4)


@both
def test_channel_wise_in_closed_form(framework):
    """Teacher even over two places, student (1/4, 3/4) at temperature 2: log(4/3) / 2 times 4."""
    student, teacher = maps([0, 2 * math.log(3)], [5, 5]), maps([7, 7], [1, 1])
    found = charged("cwd", student, teacher, framework, temperature=2.0)
    assert found == pytest.approx(4 * math.log(4 / 3) / 2 / 2, rel=1e-13)  # the second channel agrees
    assert charged("cwd-pixels", student, teacher, framework, temperature=2.0) == pytest.approx(found, rel=1e-15)


@both
def test_factors_in_closed_form(framework):
    """(3, 4) / 5 against (1, 0): |−0.4| and 0.8; squared activity gives (9, 16) / √337."""
    student, teacher = maps([3, 4]), maps([2, 0])
    assert charged("ft", student, teacher, framework, convention="paper") == pytest.approx(0.6, rel=1e-14)
    length = math.sqrt(337)
    assert charged("ft", student, teacher, framework) == pytest.approx((1 - 9 / length + 16 / length) / 2, rel=1e-14)


@both
def test_hierarchical_context_in_closed_form(framework):
    """A checkerboard of ±1 averages to nothing at half the size: 1 of 1 + 1/2 + 1/4; a constant stays."""
    board = (-1.0) ** np.add.outer(np.arange(4), np.arange(4))[None, None]
    zero = np.zeros_like(board)
    assert charged("hcl", board, zero, framework) == pytest.approx(1 / 1.75, rel=1e-14)
    assert charged("hcl", zero + 3, zero, framework) == pytest.approx(9, rel=1e-14)


@both
def test_pearson_is_one_minus_the_correlation_of_each_channel(framework):
    found = charged("pkd", fs, ft4, framework, eps=0.0)
    rows = [part.swapaxes(0, 1).reshape(4, -1) for part in (fs, ft4)]
    correlation = [np.corrcoef(own, its)[0, 1] for own, its in zip(*rows, strict=True)]
    places = rows[0].shape[1]  # a standard deviation with n - 1 makes a mean square of (n - 1) / n
    assert found == pytest.approx((1 - np.mean(correlation)) * (places - 1) / places, rel=1e-12)


@both
def test_a_distance_of_lengths_of_one_is_two_minus_two_cosines(framework):
    cosine = [own.ravel() @ its.ravel() / np.linalg.norm(own) / np.linalg.norm(its) for own, its in zip(fs, ft4)]  # noqa: B905
    assert charged("l2-normalized", fs, ft4, framework) == pytest.approx(2 - 2 * np.mean(cosine), rel=1e-13)


@both
def test_a_flow_is_the_mean_product_of_channels(framework):
    """(1, 2) · (3, 4) / 2 = 5.5 against (1, 1) · (1, 1) / 2 = 1; of three stages both pairs count."""
    first, second, ones = maps([1, 2]), maps([3, 4]), maps([1, 1])
    assert charged("fsp", [first, second], [ones, ones], framework) == pytest.approx(4.5**2, rel=1e-14)
    pairs = charged("fsp", [first, second, ones], [ones, ones, ones], framework)
    assert pairs == pytest.approx(4.5**2 + 2.5**2, rel=1e-14)  # (3, 4) · (1, 1) / 2 = 3.5


@both
def test_a_flow_between_sizes_takes_means_or_maxima_of_the_larger(framework):
    """(1, 5, 2, 4) in two halves: means (3, 3), maxima (5, 4), with (1, 2)."""
    low, high, zero = maps([1, 5, 2, 4]), maps([1, 2]), maps([0, 0])
    assert charged("fsp", [low, high], [zero, zero], framework) == pytest.approx(4.5**2, rel=1e-14)
    peaks = charged("fsp", [low, high], [zero, zero], framework, convention="torchdistill")
    assert peaks == pytest.approx(6.5, rel=1e-14)


@both
def test_maxima_lie_where_pytorch_pools_them(framework):
    odd = g1[:, :, :, :5]
    low, high = (torch.from_numpy(part) for part in (odd, g2))
    products = (F.adaptive_max_pool2d(low, (3, 3)).flatten(2) @ high.flatten(2).mT / 9).numpy()
    zero = [np.zeros_like(odd), np.zeros_like(g2)]
    found = charged("fsp", [odd, g2], zero, framework, convention="torchdistill")
    assert found == pytest.approx(np.linalg.norm(products, axis=1).sum() / 8, rel=1e-13)


@both
def test_variational_in_closed_form(framework):
    """Variance softplus(scale) + eps of 1 and e: (2² / 1 + 0) / 2 and (2² / e + 1) / 2."""
    scale = np.log(np.expm1(np.array([1.0, math.e]) - 1e-5))
    teacher = np.zeros((3, 2, 2, 2))
    found = charged("vid", {"mean": teacher + 2, "scale": scale}, teacher, framework)
    assert found == pytest.approx((2 + 2 / math.e + 0.5) / 2, rel=1e-12)
    plain = charged("vid", teacher + 2, teacher, framework)
    assert plain == pytest.approx((4 / 5 + math.log(5)) / 2, rel=1e-12)


# ------------------------------------------------------------------------------------------------------- two ways


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_neuron_selectivity_is_that_of_all_channels_at_all_places(wide, other, side, seed):
    """Whichever products are computed, of channels or of places, the sum over all pairs of channels is the same."""
    random = np.random.default_rng(seed)
    student, teacher = (random.standard_normal((2, channels, side, side)) for channels in (wide, other))
    first, second = (part.reshape(*part.shape[:2], -1) for part in (student, teacher))
    first, second = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (first, second))

    def kernel(left, right):
        return ((left[:, :, None] * right[:, None]).sum(-1) ** 2).mean()

    wanted = kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)
    assert charged("nst", student, teacher) == pytest.approx(wanted, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (3, 3), (1, 1)])
def test_hierarchical_context_is_that_of_pytorchs_pooling(size):
    student, teacher = (torch.from_numpy(part[:, :, : size[0], : size[1]].copy()) for part in (fs, ft4))
    found = LOSSES["hcl"](student, teacher)
    height = student.shape[2]
    total, weights = F.mse_loss(student, teacher), 1.0
    for level, side in enumerate([side for side in (4, 2, 1) if side < height], 1):
        pools = [F.adaptive_avg_pool2d(part, (side, side)) for part in (student, teacher)]
        total, weights = total + F.mse_loss(*pools) / 2**level, weights + 1 / 2**level
    assert float(found) == pytest.approx(float(total / weights), rel=1e-12)


@given(st.floats(-6, 6), st.floats(0.05, 5))
@settings(deadline=None, derandomize=True, max_examples=80)
def test_margins_are_the_means_of_what_is_negative(mean, std):
    """Against numerical integration, over as far as the density is not nothing, scaled by its height there."""
    top = min(mean, 0.0)
    height = norm.logpdf(top, mean, std)

    def density(x):
        return math.exp(norm.logpdf(x, mean, std) - height)

    low = top - 12 * std
    share = integrate.quad(density, low, 0, epsabs=0, epsrel=1e-11, points=[max(low, top - std)])[0]
    moment = integrate.quad(lambda x: x * density(x), low, 0, epsabs=0, epsrel=1e-11, points=[max(low, top - std)])[0]
    assert margins([mean], [std])[0] == pytest.approx(moment / share, rel=1e-7, abs=1e-9)


def test_margins_of_a_standard_normal_channel_are_the_default():
    assert margins([0.0], [1.0])[0] == pytest.approx(STANDARD_MARGIN, rel=1e-14)
    assert margins([0.0], [-2.0])[0] == pytest.approx(2 * STANDARD_MARGIN, rel=1e-14)  # a scale may be negative


def test_margins_stay_finite_where_nothing_varies_or_nothing_is_negative():
    found = margins([-2.0, 2.0, 0.0, 50.0, -50.0], [0.0, 0.0, 0.0, 1.0, 1.0])
    assert found[:3].tolist() == [-2, 0, 0]
    assert found[3] == pytest.approx(-1 / 50, rel=1e-3)  # far in the tail it is -std² / mean
    assert found[4] == pytest.approx(-50, rel=1e-14)


def test_margins_go_into_the_loss_as_they_are():
    own = margins(np.array([0.0, 0.5, -0.5, 1.0]), np.ones(4))
    found = [charged("ofd", fs, ft4, framework, margin=own) for framework in FRAMEWORKS]
    by_hand = np.mean([charged("ofd", fs[:, [c]], ft4[:, [c]], margin=float(own[c])) for c in range(4)]) * 4
    assert found == pytest.approx([by_hand] * 2, rel=1e-12)


# ------------------------------------------------------------------------------------------------ what is not seen


@both
def test_the_order_of_channels_is_no_matter_to_attention_and_selectivity(framework):
    moved = fs[:, [2, 0, 3, 1]]
    for name in ("at", "nst"):
        assert charged(name, moved, ft, framework) == pytest.approx(charged(name, fs, ft, framework), rel=1e-12)
        assert charged(name, moved, fs, framework) == pytest.approx(0, abs=1e-14)


@both
@pytest.mark.parametrize("name", ["at", "nst"])
def test_a_larger_map_is_averaged_whoever_has_it(name, framework):
    small = F.adaptive_avg_pool2d(torch.from_numpy(fs), (3, 3)).numpy()
    assert charged(name, fs, ft3, framework) == pytest.approx(charged(name, small, ft3, framework), rel=1e-12)
    assert charged(name, ft3, fs, framework) == pytest.approx(charged(name, ft3, small, framework), rel=1e-12)


@both
def test_singular_vectors_see_no_sign_of_a_decomposition(framework, monkeypatch):
    """What the linear algebra of another machine may turn round changes nothing by default."""
    xp = {"numpy": np, "torch": torch}[NAMES[FRAMEWORKS.index(framework)]]
    values = [charged("kd-svd", [a1, a2], [b1, b2], framework, convention=c) for c in ("signed", "repdistiller")]
    own = xp.linalg.svd
    turns = iter(np.random.default_rng(0).choice([-1.0, 1.0], (200, 4)))

    def turned(matrix, full_matrices):
        u, s, v = own(matrix, full_matrices=full_matrices)
        return u, s, v * framework(next(turns)[None, :, None].copy())

    monkeypatch.setattr(xp.linalg, "svd", turned)
    found = [charged("kd-svd", [a1, a2], [b1, b2], framework, convention=c) for c in ("signed", "repdistiller")]
    assert found[0] == pytest.approx(values[0], rel=1e-12)
    assert found[1] != pytest.approx(values[1], rel=1e-3)  # the reference's value is that of a machine


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5)], ids=["tall", "wide"])
def test_the_gradient_of_singular_vectors_is_that_of_pytorch(shape):
    """Of |v · c|², which has no sign, for the two largest of three vectors; also where the matrix has more columns."""
    random = np.random.default_rng(0)
    matrix = torch.from_numpy(random.standard_normal(shape)).requires_grad_()
    target = torch.from_numpy(random.standard_normal(shape[2]))
    (own,) = torch.autograd.grad(((_right_vectors(matrix, 2)[1] @ target) ** 2).sum(), matrix)
    rows = torch.linalg.svd(matrix, full_matrices=False)[2][:, :2]
    (other,) = torch.autograd.grad(((rows @ target) ** 2).sum(), matrix)
    np.testing.assert_allclose(own, other, rtol=1e-9, atol=1e-11)


def test_equal_singular_values_leave_the_gradient_finite():
    """A map of orthogonal channels of one length: PyTorch's own gradient is not finite there."""
    even = torch.eye(4, dtype=torch.float64).reshape(1, 4, 2, 2)
    student = [even.clone().requires_grad_(), torch.from_numpy(a1[:1, :, :2, :2].copy()).requires_grad_()]
    teacher = [torch.from_numpy(part[:1, :, :2, :2].copy()) for part in (b1, b2)]
    LOSSES["kd-svd"](student, teacher).backward()
    assert all(torch.isfinite(part.grad).all() for part in student)
    rows = torch.linalg.svd(student[0].flatten(2).mT, full_matrices=False)[2]
    (own,) = torch.autograd.grad((rows[:, 0] @ torch.arange(4.0, dtype=torch.float64)).sum(), student[0])
    assert not torch.isfinite(own).all()


@pytest.mark.parametrize("name", ["at", "nst", "ft", "pkd", "l2-normalized"])
def test_maps_of_zero_leave_the_gradient_finite(name):
    """Lengths and deviations of dead maps are 0, and the root of 0 has no slope."""
    for options in ({}, {"convention": "paper"}) if name in ("at", "ft") else ({},):
        student = torch.zeros(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
        found = LOSSES[name](student, torch.from_numpy(ft4[:2]), **options)
        found.backward()
        assert torch.isfinite(found)
        assert torch.isfinite(student.grad).all()


def test_a_student_that_equals_its_teacher_has_no_slope_where_the_paper_takes_a_root():
    student = torch.from_numpy(fs.copy()).requires_grad_()
    LOSSES["at"](student, torch.from_numpy(fs), convention="paper").backward()
    assert student.grad.abs().max() == 0


# ---------------------------------------------------------------------------------------------------- variational


def with_scale(student, teacher):
    """VID, whose scales are made of the student's values."""
    return LOSSES["vid"]({"mean": student, "scale": student[0, :, 0, 0]}, teacher)


with_scale.takes = "maps"
with_scale.least_at_teacher = False  # where it lies depends on the scales

EXCEPT = {
    "check_order_of_samples_does_not_matter",
    "check_parts_of_a_batch_add_up_to_it",
    "check_unequal_shapes_are_refused",
}
"""The scales above are those of the first sample; and a cut teacher is refused by the test below."""


@pytest.mark.parametrize("check", [c for c in LOSS_CHECKS if c.__name__ not in EXCEPT], ids=lambda c: c.__name__)
def test_variational_conforms_with_learned_scales(check):
    check(with_scale)


def test_the_teacher_of_variational_takes_no_gradient_though_the_loss_is_learned():
    mean, scale, teacher = (torch.ones(s, requires_grad=True) for s in ((2, 3, 2, 2), (3,), (2, 3, 2, 2)))
    LOSSES["vid"]({"mean": mean, "scale": scale}, teacher).backward()
    assert teacher.grad is None
    assert scale.grad is not None


# --------------------------------------------------------------------------------------------------------- refusals


def test_scales_that_are_not_one_a_channel_are_refused():
    with pytest.raises(ShapeError, match="3 numbers for 'scale'; 1 or one for each of 4 channels"):
        LOSSES["vid"]({"mean": fs, "scale": np.zeros(3)}, ft4)
    with pytest.raises(ShapeError, match="3 numbers for 'margin'"):
        LOSSES["ofd"](fs, ft4, margin=[-1, -1, -1])


@pytest.mark.parametrize("name", ["at", "nst", "cwd", "hcl", "pkd", "ofd", "ab", "ft", "mgd", "vid"])
def test_what_is_no_map_is_refused(name):
    with pytest.raises(ShapeError, match=r"student's maps have shape \(8, 4, 36\); \(N, C, H, W\) is needed"):
        LOSSES[name](fs.reshape(8, 4, 36), ft4)


@pytest.mark.parametrize("name", ["fitnet", "cwd", "hcl", "pkd", "ofd", "ab", "mgd", "vid"])
def test_maps_of_another_size_are_refused_where_places_are_compared(name):
    with pytest.raises(ShapeError, match=r"student's maps have shape \(8, 4, 6, 6\), the teacher's \(8, 4, 3, 3\)"):
        LOSSES[name](fs, ft4[:, :, :3, :3])


@pytest.mark.parametrize("name", ["fsp", "kd-svd"])
def test_stages_that_do_not_pair_are_refused(name):
    with pytest.raises(ShapeError, match=r"student gives 1 stages, the teacher 1.*needs two or more"):
        LOSSES[name]([g1], [h1])
    with pytest.raises(ShapeError, match="student gives 2 stages, the teacher 3"):
        LOSSES[name]([g1, g2], [h1, h2, h2])
    with pytest.raises(ShapeError, match="Stage 1 has 5 channels in the student, 4 in the teacher"):
        LOSSES[name]([g1, g2], [h1, h2[:, :4]])


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(UsageError, match="temperature is 0; a number above 0 is needed"):
        LOSSES["cwd"](fs, ft4, temperature=0)


def test_the_reading_of_mdistiller_needs_one_width():
    with pytest.raises(ShapeError, match="rows of maps have shape"):
        LOSSES["kd-svd"]([a1, a2], [b1[..., :5], b2[..., :5]], convention="mdistiller")


MAPS = np.random.default_rng(0).standard_normal((2, 2, 3, 4, 4))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("at", {"power": 0}, "`power` is 0; a number above 0"),
        ("at", {"power": math.nan}, "`power` is nan; a number above 0"),
        ("ft", {"power": 0}, "`power` is 0; a number above 0"),
        ("ft", {"activity_power": -1}, "`activity_power` is -1; a number above 0"),
        ("ab", {"margin": -1}, "`margin` is -1; a number above 0"),
        ("ofd", {"margin": 2}, "`margin` is 2; numbers of at most 0"),
        ("ofd", {"margin": [-1.0, 0.5, 0.0]}, r"`margin` is \[-1.0, 0.5, 0.0\]; numbers of at most 0"),
        ("hcl", {"sizes": (0,)}, "`size` is 0; a whole number of at least 1"),
        ("pkd", {"eps": -1}, "`eps` is -1; a number of at least 0"),
        ("vid", {"variance": 1e-5}, "`variance` is 1e-05; a number above 1e-05"),
        ("vid", {"variance": -1}, "`variance` is -1; a number above 1e-05"),
        ("vid", {"eps": 0}, "`eps` is 0; a number above 0"),
    ],
)
def test_options_of_maps_that_are_none_are_refused(name, options, sentence):
    with pytest.raises(UsageError, match=f"{sentence}.* needed"):
        LOSSES[name](*MAPS, **options)


@pytest.mark.parametrize("variance", [2e-5, 5.0, 800.0, 1e6])
def test_any_variance_above_the_smallest_is_that_of_the_density(variance):
    wanted = 0.5 * ((MAPS[0] - MAPS[1]) ** 2 / variance + math.log(variance)).mean()
    assert float(LOSSES["vid"](*MAPS, variance=variance)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (0, "`count` is 0; a whole number of at least 1 is needed"),
        (1.5, "`count` is 1.5; a whole number of at least 1 is needed"),
        (4, "`count` is 4; the smallest map has 3 directions. Choose at most 3"),
    ],
)
def test_numbers_of_directions_that_are_none_are_refused(count, sentence):
    with pytest.raises(UsageError, match=sentence):
        LOSSES["kd-svd"](list(MAPS), list(MAPS), count=count)


def test_reviewed_stages_are_added_up_and_none_are_refused():
    student, teacher = MAPS[:, :1], MAPS[:, 1:]
    wanted = sum(float(LOSSES["hcl"](*pair)) for pair in zip(student, teacher, strict=True))
    assert float(LOSSES["reviewkd"](list(student), list(teacher))) == pytest.approx(wanted, rel=1e-14)
    with pytest.raises(ShapeError, match=r"A side gives no arrays\. Give at least one: stages are compared"):
        LOSSES["reviewkd"]([], [])
