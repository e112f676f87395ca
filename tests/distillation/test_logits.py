"""Losses on scores: closed forms, the same number two ways, and what holds for all of them."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from distillation.golden import y, z_s, z_t
from kirsch.distillation.arrays import log_softmax
from kirsch.distillation.losses import LOSSES, hard_label, soft_target
from kirsch.distillation.losses.logits import CONVENTIONS, standardized
from kirsch.distillation.losses.loss import given_to, options_of
from kirsch.distillation.losses.top_k import stored_top_k
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.testing import LOSS_CHECKS

N, K = z_s.shape
FRAMEWORKS = [lambda array: array, torch.from_numpy]
NAMES = ["numpy", "torch"]
both = pytest.mark.parametrize("framework", FRAMEWORKS, ids=NAMES)

OURS = ("kd", "hard", "logit-l2", "reverse-kl", "jsd", "dkd", "ofa", "wsld", "dist", "batch-correlation")
OURS += ("class-correlation", "mlkd", "top-k", "binary-kd")
"""Losses on scores, of which each sample may be a position of a sequence."""

RANDOM = np.random.default_rng(0)
LONG_S, LONG_T = 2 * RANDOM.standard_normal((3, 4, 5)), 3 * RANDOM.standard_normal((3, 4, 5))
LONG_Y = RANDOM.integers(0, 5, (3, 4))
LONG_MASK = RANDOM.random((3, 4)) < 0.6


def options_for(name, labels):
    return {"labels": labels} if "labels" in given_to(LOSSES[name]) else {}


# ------------------------------------------------------------------------------------------------ all of them


@both
@pytest.mark.parametrize("name", OURS)
def test_positions_of_sequences_are_charged_like_samples(name, framework):
    """The positions that count, as rows of one batch, give the same number."""
    rows = LOSSES[name](LONG_S[LONG_MASK], LONG_T[LONG_MASK], **options_for(name, LONG_Y[LONG_MASK]))
    given_ = {**options_for(name, framework(LONG_Y)), "mask": framework(LONG_MASK)}
    assert float(LOSSES[name](framework(LONG_S), framework(LONG_T), **given_)) == pytest.approx(float(rows), rel=1e-13)


@both
@pytest.mark.parametrize("name", [name for name in OURS if "labels" in given_to(LOSSES[name])])
def test_labels_that_do_not_count_are_masked(name, framework):
    labels = np.where(LONG_MASK, LONG_Y, -100)
    masked = LOSSES[name](LONG_S, LONG_T, labels=LONG_Y, mask=LONG_MASK)
    found = LOSSES[name](framework(LONG_S), framework(LONG_T), labels=framework(labels))
    assert float(found) == pytest.approx(float(masked), rel=1e-14)


@both
@pytest.mark.parametrize("name", OURS)
def test_masks_of_other_samples_or_of_none_are_refused(name, framework):
    sides = framework(z_s), framework(z_t)
    with pytest.raises(ShapeError, match=r"The mask has shape \(7,\); \(8,\) is needed"):
        LOSSES[name](*sides, **options_for(name, framework(y)), mask=framework(np.ones(7, bool)))
    with pytest.raises(DataError, match="All targets are masked"):
        LOSSES[name](*sides, **options_for(name, framework(y)), mask=framework(np.zeros(N, bool)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in (*OURS, "pixel-kd") if "temperature" in options_of(LOSSES[name])])
def test_a_temperature_that_is_none_is_refused(name, temperature):
    sides = (z_s.reshape(2, 10, 2, 2), z_t.reshape(2, 10, 2, 2)) if name == "pixel-kd" else (z_s, z_t)
    with pytest.raises(UsageError, match=rf"The temperature is {temperature}; a number above 0 is needed"):
        LOSSES[name](*sides, **options_for(name, y), temperature=temperature)


SCORES = tuple(name for name in LOSSES if LOSSES[name].takes in ("scores", "pixels"))
ONE_CLASS = ("binary-kd", "logit-l2", "cwd-pixels")
"""Losses that have something to say of one class."""


def called(name, framework, shape, label_shape=None):
    sides = (framework(side) for side in np.random.default_rng(0).standard_normal((2, *shape)))
    labels = framework(np.zeros(shape[:-1] if label_shape is None else label_shape, int))
    return LOSSES[name](*sides, **options_for(name, labels))


@both
@pytest.mark.parametrize("name", [name for name in SCORES if name not in ONE_CLASS])
def test_scores_of_one_class_teach_a_softmax_nothing_and_are_refused(name, framework):
    pixels = LOSSES[name].takes == "pixels"
    shape, fix = ((4, 1, 3, 3), r'Term\("fitnet", student="logits"\)') if pixels else ((4, 3, 1), '"binary-kd"')
    with pytest.raises(ShapeError, match=rf"are of one class\. Its softmax is 1 .* Use {fix} for a yes or no"):
        called(name, framework, shape)


@both
@pytest.mark.parametrize("name", [name for name in SCORES if name not in ONE_CLASS and "pixel" not in name])
def test_scores_without_an_axis_of_classes_are_refused(name, framework):
    with pytest.raises(ShapeError, match=r'scores have shape \(4,\); \(N, K\) .* taken for classes.*"binary-kd"'):
        called(name, framework, (4,), (4,))


@both
@pytest.mark.parametrize("name", ["binary-kd", "logit-l2", "bounded-regression"])
def test_one_number_a_sample_needs_no_axis(name, framework):
    sides = np.array([3.0, 0, 0, 0]), np.array([0.0, 2, 2, 2])

    def charged(*axes):
        values = [framework(side[(..., *axes)]) for side in sides]
        given_ = {"labels": framework(np.zeros(4)[(..., *axes)])} if name == "bounded-regression" else {}
        return float(LOSSES[name](*values, **given_))

    assert charged() == charged(None)
    if name == "bounded-regression":
        assert charged() == 9 / 4  # the first alone is further off than the teacher


@both
@pytest.mark.parametrize("name", SCORES)
def test_a_batch_without_samples_is_refused(name, framework):
    with pytest.raises(DataError, match=r"The batch has no samples\. Leave it out"):
        called(name, framework, (0, 3, 2, 2) if LOSSES[name].takes == "pixels" else (0, 3, 3))


SUPPRESSED = {
    "kd": {},
    "kd textbrewer": {"convention": "textbrewer"},
    "reverse-kl": {},
    "jsd": {},
    "jsd 0": {"beta": 0.0},
    "jsd 1": {"beta": 1.0},
    "dkd": {"labels": np.zeros(3, int)},
    "wsld": {"labels": np.zeros(3, int)},
    "ofa": {"labels": np.zeros(3, int)},
    "hard": {},
    "mlkd": {},
    "top-k": {"k": 3},
    "top-k bucket": {"k": 4, "tail": "bucket"},
    "top-k zero": {"k": 2, "tail": "zero"},
    "top-k renormalized": {"k": 2, "tail": "renormalized"},
}


@both
@pytest.mark.parametrize("case", SUPPRESSED)
def test_a_class_that_both_suppress_is_none(case, framework):
    """A score of minus infinity, as for tokens that a vocabulary must not have: the others are charged as if alone."""
    name, options = case.split()[0], {n: framework(v) if n == "labels" else v for n, v in SUPPRESSED[case].items()}
    rest = [side[:3, :5] for side in (z_s, z_t)]
    sides = [framework(np.insert(side, 2, -np.inf, axis=1)) for side in rest]
    fewer = float(LOSSES[name](*(framework(side) for side in rest), **options))
    if name == "mlkd":  # a mean over classes
        fewer = float(LOSSES[name](*(framework(side) for side in rest), **options, classes=5 / 6))
    assert float(LOSSES[name](*sides, **options)) == pytest.approx(fewer, rel=1e-12)
    if framework is torch.from_numpy:
        sides[0].requires_grad_()
        LOSSES[name](*sides, **options).backward()
        assert torch.isfinite(sides[0].grad).all()
        assert not sides[0].grad[:, 2].any()


@both
@pytest.mark.parametrize("case", ["kd", "jsd", "top-k", "dkd", "ofa", "wsld", "hard"])
def test_a_class_that_the_teacher_alone_suppresses_has_the_limit(case, framework):
    options = {n: framework(v) if n == "labels" else v for n, v in SUPPRESSED[case].items()}
    teacher = z_t[:3, :5].copy()
    found = []
    for score in (-1e3, -np.inf):
        teacher[:, 2] = score
        found.append(float(LOSSES[case](framework(z_s[:3, :5].copy()), framework(teacher.copy()), **options)))
    assert found[1] == pytest.approx(found[0], rel=1e-12)
    if framework is torch.from_numpy:
        student = torch.from_numpy(z_s[:3, :5].copy()).requires_grad_()
        LOSSES[case](student, torch.from_numpy(teacher), **options).backward()
        assert torch.isfinite(student.grad).all()


@both
def test_a_record_whose_log_probabilities_overflowed_to_minus_infinity_has_the_limit(framework):
    student, indices = framework(z_s[:2, :4].copy()), framework(np.array([[0, 2, 3], [0, 1, 2]]))
    found = []
    for least in (-1e3, -np.inf):
        record = np.log([[0.7, 0.3, 1.0], [0.5, 0.5, 1.0]])
        record[:, 2] = least
        found.append(float(stored_top_k(student, indices, framework(record), framework(np.full(2, least)))))
    assert found[1] == pytest.approx(found[0], rel=1e-12)
    assert float(stored_top_k(student, indices, framework(record), framework(np.full(2, -np.inf)), temperature=2.0)) > 0


@both
def test_an_answer_of_which_both_are_certain_costs_nothing(framework):
    """Scores of minus and plus infinity are a no and a yes without doubt."""
    sides = [framework(np.array([[-np.inf, np.inf, score]])) for score in (0.0, math.log(3))]
    assert float(LOSSES["binary-kd"](*sides)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12)
    if framework is torch.from_numpy:
        sides[0].requires_grad_()
        LOSSES["binary-kd"](*sides).backward()
        assert torch.isfinite(sides[0].grad).all()


def with_options(name, **options):
    """A loss with other defaults, that says of itself what the loss says."""
    return functools.update_wrapper(functools.partial(LOSSES[name], **options), LOSSES[name])


VARIANTS = {
    "kd standardized": with_options("kd", standardize=True),
    "kd keras": with_options("kd", convention="keras"),
    "kd textbrewer": with_options("kd", convention="textbrewer"),
    "kd modelopt": with_options("kd", convention="modelopt"),
    "dkd standardized": with_options("dkd", standardize=True),
    "logit-l2 textbrewer": with_options("logit-l2", convention="textbrewer"),
    "dist torchdistill": with_options("dist", convention="torchdistill"),
    "dist mmrazor": with_options("dist", convention="mmrazor"),
    "jsd 0": with_options("jsd", beta=0.0),
    "jsd 0.01": with_options("jsd", beta=0.01),
    "jsd 1": with_options("jsd", beta=1.0),
    "jsd trl": with_options("jsd", convention="trl", beta=0.9),
    "mlkd standardized": with_options("mlkd", standardize=True, temperatures=(2.0, 5.0)),
    "top-k bucket": with_options("top-k", k=3),
    "top-k zero": with_options("top-k", k=3, tail="zero"),
    "top-k renormalized": with_options("top-k", k=3, tail="renormalized"),
    "top-k uniform": with_options("top-k", k=3, tail="uniform"),
    "bounded-regression margin": with_options("bounded-regression", margin=1.0),
}
LEAST_ELSEWHERE = {
    "dist mmrazor",  # what is added to lengths charges a class of tiny probabilities less if these grow
    "kd keras",  # a probability of less than 1e-7 takes no gradient
    "top-k zero",  # least where the student has nothing beyond the k likeliest
    "top-k uniform",  # least where the student's tail is even
    "bounded-regression margin",  # least where the student is better than the teacher
}


@pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_options_conform_as_the_defaults_do(variant, check):
    if variant in LEAST_ELSEWHERE and check.__name__.endswith("when_the_student_equals_the_teacher"):
        pytest.skip("its least value lies elsewhere")
    check(VARIANTS[variant])


# ------------------------------------------------------------------------------------------------ soft targets


@both
def test_soft_targets_in_closed_form(framework):
    """p = (1/2, 1/2) of the teacher, (1/4, 3/4) of the student: KL = log(4/3) / 2."""
    student, teacher = framework(np.array([[0.0, 2 * math.log(3)]])), framework(np.zeros((1, 2)))
    found = float(soft_target(student, teacher, temperature=2.0))
    assert found == pytest.approx(4 * math.log(4 / 3) / 2, rel=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_targets_are_those_of_pytorch(temperature):
    student, teacher = torch.from_numpy(z_s), torch.from_numpy(z_t)
    log_s, log_t = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    other = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2
    assert float(soft_target(student, teacher, temperature=temperature)) == pytest.approx(float(other), rel=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_is_temperature_times_the_difference_of_the_softened_outputs(temperature):
    student, teacher = (torch.from_numpy(scores.copy()).requires_grad_() for scores in (z_s, z_t))
    soft_target(student, teacher, temperature=temperature).backward()
    assert teacher.grad is None
    p_s, p_t = (F.softmax(torch.from_numpy(scores) / temperature, -1) for scores in (z_s, z_t))
    np.testing.assert_allclose(student.grad, temperature * (p_s - p_t) / N, rtol=1e-12, atol=1e-16)


def test_the_gradient_of_hot_soft_targets_is_that_of_squared_scores():
    """Hinton et al. 2015, section 2.1: for T → ∞ the gradient is (z_s - z_t) / (N K), of scores with a mean of zero."""
    centered = [scores - scores.mean(-1, keepdims=True) for scores in (z_s, z_t)]
    student = torch.from_numpy(centered[0]).requires_grad_()
    soft_target(student, torch.from_numpy(centered[1]), temperature=1e5).backward()
    # The next term is smaller by a factor of scores / T, here 1e-4.
    np.testing.assert_allclose(student.grad, (centered[0] - centered[1]) / (N * K), rtol=0, atol=1e-5)


@both
def test_a_student_that_equals_its_teacher_is_charged_exactly_nothing(framework):
    assert float(soft_target(framework(z_t), framework(z_t.copy()), temperature=4.0)) == 0.0


@given(
    arrays(np.float64, (3, 4), elements=st.floats(-1e4, 1e4)),
    arrays(np.float64, (3, 4), elements=st.floats(-1e4, 1e4)),
    st.floats(0.1, 100),
)
@settings(deadline=None, derandomize=True)
def test_soft_targets_are_never_below_zero_and_know_no_shift(student, teacher, temperature):
    found = float(soft_target(student, teacher, temperature=temperature))
    # Each of 4 terms p (log p - log q) is rounded at the size of the softened scores, and T² comes on top.
    rounding = 1e-15 * 4 * max(np.abs(student).max(), np.abs(teacher).max(), 1.0) * temperature * max(1, temperature)
    assert found >= -rounding
    shifted = float(soft_target(student + 1.0, teacher - 2.0, temperature=temperature))
    assert shifted == pytest.approx(found, rel=1e-9, abs=100 * rounding)


@both
def test_scores_that_numpy_would_broadcast_are_refused(framework):
    with pytest.raises(ShapeError, match=r"shape \(8, 10\), the teacher's \(1, 10\)"):
        soft_target(framework(z_s), framework(z_t[:1]), temperature=1.0)


# What the documentation of the conventions says: times T², mean over classes, with the entropy of the targets.
STATED = {
    **dict.fromkeys(
        ("kirsch", "repdistiller", "mdistiller", "mmrazor", "distillkit", "huggingface", "distill-whisper"),
        (True, False, False),
    ),
    **dict.fromkeys(("modelopt", "deit", "neural-compressor"), (True, True, False)),
    **dict.fromkeys(("torchdistill", "trl", "modelopt-megatron"), (False, False, False)),
    **dict.fromkeys(("textbrewer", "paddleslim"), (False, False, True)),
    "keras": (True, False, False),  # probabilities here are all above its floor of 1e-7
}


@pytest.mark.filterwarnings("ignore:reduction.*mean.*divides")
@both
@pytest.mark.parametrize("temperature", [2.0, 4.0])
@pytest.mark.parametrize("convention", STATED)
def test_conventions_are_what_other_code_bases_compute(convention, temperature, framework):
    """Made of PyTorch's own functions."""
    squared, over_classes, with_entropy = STATED[convention]
    log_s, log_t = (F.log_softmax(torch.from_numpy(scores) / temperature, -1) for scores in (z_s, z_t))
    assert float(torch.minimum(log_s, log_t).min()) > math.log(1e-7)
    wanted = F.kl_div(log_s, log_t, reduction="mean" if over_classes else "batchmean", log_target=True)
    if with_entropy:
        wanted = F.cross_entropy(torch.from_numpy(z_s) / temperature, log_t.exp())
    found = soft_target(framework(z_s), framework(z_t), temperature=temperature, convention=convention)
    assert float(found) == pytest.approx(float(wanted) * (temperature**2 if squared else 1), rel=1e-13)


def test_each_convention_is_stated():
    assert set(STATED) == set(CONVENTIONS)


@both
def test_keras_raises_tiny_probabilities(framework):
    """The student gives the first class e^-40: charged is log 1e-7 for it. log(1/2) - log(1e-7), halved, and so on."""
    student, teacher = framework(np.array([[-40.0, 0.0]])), framework(np.zeros((1, 2)))
    found = float(soft_target(student, teacher, convention="keras"))
    assert found == pytest.approx((math.log(0.5) - math.log(1e-7)) / 2 + math.log(0.5) / 2, rel=1e-14)


@both
def test_keras_raises_tiny_probabilities_of_the_teacher_too(framework):
    """The teacher gives the first class e^-40, and the student a half: 1e-7 (log 1e-7 - log(1/2)) + log 2."""
    student, teacher = framework(np.zeros((1, 2))), framework(np.array([[-40.0, 0.0]]))
    found = float(soft_target(student, teacher, convention="keras"))
    assert found == pytest.approx(1e-7 * (math.log(1e-7) - math.log(0.5)) + math.log(2), rel=1e-14)


def test_an_unknown_convention_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"no convention 'mdistil'\. Known: deit, .* mean 'mdistiller'"):
        soft_target(z_s, z_t, convention="mdistil")
    for name in ("jsd", "dist"):
        with pytest.raises(UnknownNameError, match="There is no convention 'keras'"):
            LOSSES[name](z_s, z_t, convention="keras")


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_standardized_scores_know_neither_size_nor_shift(name):
    def charge(student):
        return float(LOSSES[name](student, z_t, **options_for(name, y), temperature=2.0, standardize=True))

    # 1e-7 is added to a deviation of about 3.
    assert charge(100 * z_s - 5) == pytest.approx(charge(z_s), rel=1e-5)
    assert charge(3 * z_t + 1) == pytest.approx(0, abs=1e-12)
    assert charge(-z_t) > 0.1


@both
def test_standardized_scores_have_unit_deviation_of_a_sample(framework):
    """(0, 2): mean 1, deviation √2 since it is divided by K - 1; equal scores stay finite."""
    found = standardized(framework(np.array([[0.0, 2.0], [3.0, 3.0]])))
    np.testing.assert_allclose(found, [[-(2**-0.5), 2**-0.5], [0, 0]], rtol=1e-6)


@both
def test_the_hard_teacher_is_the_label_that_it_would_give(framework):
    found = LOSSES["hard"](framework(z_s), framework(z_t))
    assert float(found) == pytest.approx(float(hard_label(z_s, z_t.argmax(-1))), rel=1e-15)


@both
def test_squared_logits_in_closed_form(framework):
    """(1 + 4) and (0 + 9), averaged over two samples."""
    student = np.array([[1.0, 2.0], [0.0, 3.0]])
    assert float(LOSSES["logit-l2"](framework(student), framework(np.zeros((2, 2))))) == 7.0


@both
def test_pixels_are_charged_like_samples(framework):
    maps_s, maps_t = (scores.reshape(2, 2, 2, 10).transpose(0, 3, 1, 2) for scores in (z_s, z_t))
    mask = np.arange(8).reshape(2, 2, 2) % 3 != 0
    wanted = soft_target(z_s[mask.reshape(-1)], z_t[mask.reshape(-1)], temperature=3.0)
    found = LOSSES["pixel-kd"](framework(maps_s), framework(maps_t), temperature=3.0, mask=framework(mask))
    assert float(found) == pytest.approx(float(wanted), rel=1e-14)


# ------------------------------------------------------------------------------------------------ divergences


def test_the_reverse_divergence_is_that_of_exchanged_sides():
    found = LOSSES["reverse-kl"](z_s, z_t, temperature=2.0)
    assert float(found) == pytest.approx(float(soft_target(z_t, z_s, temperature=2.0)), rel=1e-14)


@both
def test_the_mixed_divergence_in_closed_form(framework):
    """p_s = (1/4, 3/4), p_t = (3/4, 1/4), β = 1/2: M is even, each KL is 3/4 log 3 - log 2, and 1 / (β (1 - β)) = 4."""
    student, teacher = np.array([[0.0, math.log(3)]]), np.array([[math.log(3), 0.0]])
    found = float(LOSSES["jsd"](framework(student), framework(teacher)))
    assert found == pytest.approx(4 * (0.75 * math.log(3) - math.log(2)), rel=1e-14)


@both
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_ends_of_the_mixed_divergence_are_both_ways_of_the_divergence(temperature, framework):
    sides = framework(z_s), framework(z_t)
    for beta, end in ((0.0, "kd"), (1.0, "reverse-kl")):
        wanted = float(LOSSES[end](*sides, temperature=temperature))
        found = float(LOSSES["jsd"](*sides, beta=beta, temperature=temperature))
        assert found == pytest.approx(wanted, rel=1e-13)
        for step in (1e-300, 1e-15, 1e-9):  # the slope at the ends, a few dozens here, is what is left
            near = float(LOSSES["jsd"](*sides, beta=abs(beta - step), temperature=temperature))
            assert near == pytest.approx(wanted, rel=1e-12 + 1e3 * step)


def test_the_mixed_divergence_moves_smoothly_where_that_of_trl_jumps():
    betas = np.array([0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6, 1.0])
    smooth, trl = (
        np.array([float(LOSSES["jsd"](z_s, z_t, beta=beta, convention=convention)) for beta in betas])
        for convention in ("kirsch", "trl")
    )
    assert smooth.min() > 1
    assert smooth[1] == pytest.approx(smooth[0], rel=1e-4)
    assert trl[0] > 2
    assert trl[1] < 1e-5
    np.testing.assert_allclose(trl[1:-1], smooth[1:-1] * betas[1:-1] * (1 - betas[1:-1]), rtol=1e-12)


@given(
    arrays(np.float64, (2, 4), elements=st.floats(-1e3, 1e3)),
    arrays(np.float64, (2, 4), elements=st.floats(-1e3, 1e3)),
    st.floats(0, 1),
)
@settings(deadline=None, derandomize=True)
def test_the_mixed_divergence_is_never_below_zero_and_turns_round_with_its_share(student, teacher, beta):
    found = float(LOSSES["jsd"](student, teacher, beta=beta))
    assert found >= -1e-12
    assert float(LOSSES["jsd"](teacher, student, beta=1 - beta)) == pytest.approx(found, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("beta", [0.0, 1e-40, 1e-20, 1e-7, 0.5, 1.0])
def test_the_mixed_divergence_of_32_bits_is_that_of_64(beta):
    sides = [torch.from_numpy(scores) for scores in (z_s, z_t)]
    wide = float(LOSSES["jsd"](*sides, beta=beta))
    assert float(LOSSES["jsd"](*(side.float() for side in sides), beta=beta)) == pytest.approx(wide, rel=1e-5)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_a_share_of_the_mixture_that_is_none_is_refused(beta):
    with pytest.raises(UsageError, match=rf"beta is {beta}; a share from 0 to 1 is needed"):
        LOSSES["jsd"](z_s, z_t, beta=beta)


# ------------------------------------------------------------------------------------------ the class of the label


@both
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_parts_weighted_with_what_the_teacher_leaves_are_soft_targets(temperature, framework):
    """Zhao et al. 2022, equation 5: KD = TCKD + (1 - p_label of the teacher) NCKD, of each sample."""
    p_t = np.exp(log_softmax(z_t / temperature))
    for i in range(N):
        student, teacher, label = (framework(part[i : i + 1]) for part in (z_s, z_t, y))
        found = LOSSES["dkd"](student, teacher, labels=label, beta=1 - p_t[i, y[i]], temperature=temperature)
        wanted = soft_target(student, teacher, temperature=temperature)
        assert float(found) == pytest.approx(float(wanted), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoupled_parts_of_large_scores_leave_the_label_out_in_low_precision(dtype):
    """Scores of thousands, which to subtract 1000 from the label's would not hide; whole numbers are exact here."""
    student, teacher = (torch.from_numpy(np.round(scores) * 512) for scores in (z_s, z_t))
    labels = teacher.argmax(-1)
    wanted = float(LOSSES["dkd"](student, teacher, labels=labels))
    found = float(LOSSES["dkd"](student.to(dtype), teacher.to(dtype), labels=labels))
    assert found == pytest.approx(wanted, rel=1e-5)
    others = torch.ones(N, K, dtype=torch.bool).scatter(1, labels[:, None], value=False)
    rest = [scores[others].reshape(N, K - 1) for scores in (student, teacher)]
    assert float(LOSSES["dkd"](student, teacher, labels=labels, alpha=0.0, beta=1.0)) == pytest.approx(
        float(soft_target(*rest, temperature=4.0)), rel=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1, 6, 10, 100])
def test_correlations_of_a_student_that_equals_its_teacher_cost_nothing_of_many_classes(scale, dtype):
    """Most of a thousand classes are of tiny probabilities in every sample, and some of none."""
    teacher = scale * torch.from_numpy(np.random.default_rng(0).standard_normal((64, 1000))).to(dtype)
    student = teacher.clone().requires_grad_()
    found = LOSSES["dist"](student, teacher)
    found.backward()
    assert float(found.detach()) == pytest.approx(0, abs=1e-6 if dtype == torch.float32 else 1e-12)
    assert float(student.grad.abs().max()) < 1e-6


@both
def test_correlations_with_what_is_constant_are_none(framework):
    """Both samples are alike in the teacher, so no class tells them apart there; in the student both classes do."""
    student, teacher = framework(np.array([[0.0, 1.0], [0.0, 2.0]])), framework(np.array([[0.3, 1.1], [0.3, 1.1]]))
    assert float(LOSSES["dist"](student, teacher, inter=0.0)) == pytest.approx(1, rel=1e-14)
    assert float(LOSSES["dist"](teacher, teacher, inter=0.0)) == 0


@pytest.mark.parametrize(
    ("name", "option"),
    [("dist", "inter"), ("dist", "intra"), ("mlkd", "instance"), ("mlkd", "batch"), ("mlkd", "classes")],
)
def test_weights_of_correlations_that_are_below_zero_are_refused(name, option):
    with pytest.raises(UsageError, match=rf"`{option}` is -1; a number of at least 0 is needed"):
        LOSSES[name](z_s, z_t, **{option: -1})


def test_decoupled_parts_need_two_classes_and_weights():
    with pytest.raises(ShapeError, match="they are of one class"):
        LOSSES["dkd"](z_s[:, :1], z_t[:, :1], labels=0 * y)
    for name in ("alpha", "beta"):
        with pytest.raises(UsageError, match=rf"{name} is -1\.0; a number of at least 0"):
            LOSSES["dkd"](z_s, z_t, labels=y, **{name: -1.0})


@both
def test_one_for_all_in_closed_form(framework):
    """p_t = (1/4, 3/4), label 1, power 2: targets 1/16 and (7/4)² - 1 = 33/16; an even student pays log 2 for each."""
    student, teacher = np.zeros((1, 2)), np.array([[0.0, math.log(3)]])
    found = LOSSES["ofa"](framework(student), framework(teacher), labels=framework(np.array([1])), power=2.0)
    assert float(found) == pytest.approx(34 / 16 * math.log(2), rel=1e-14)


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_a_power_that_is_none_is_refused(power):
    with pytest.raises(UsageError, match=rf"The power is {power}; a number above 0 is needed"):
        LOSSES["ofa"](z_s, z_t, labels=y, power=power)


@both
def test_weighted_soft_labels_in_closed_form(framework):
    """An even student, p_t = (1/4, 3/4), label 1: CE log 2 and log 4/3, and log 2 for the soft labels."""
    student, teacher = np.zeros((1, 2)), np.array([[0.0, math.log(3)]])
    weight = 1 - math.exp(-math.log(2) / (math.log(4 / 3) + 1e-7))
    found = LOSSES["wsld"](framework(student), framework(teacher), labels=framework(np.array([1])))
    assert float(found) == pytest.approx(weight * math.log(2), rel=1e-14)


def test_the_weight_of_soft_labels_is_constant_so_that_the_gradient_is_that_of_weighted_soft_targets():
    student, targets = torch.from_numpy(z_s.copy()).requires_grad_(), torch.from_numpy(y)
    LOSSES["wsld"](student, torch.from_numpy(z_t), labels=targets, temperature=2.0).backward()
    mine, theirs = (F.cross_entropy(torch.from_numpy(z), targets, reduction="none") for z in (z_s, z_t))
    weight = 1 - torch.exp(-mine / (theirs + 1e-7))
    p_s, p_t = (F.softmax(torch.from_numpy(scores) / 2, -1) for scores in (z_s, z_t))
    np.testing.assert_allclose(student.grad, weight[:, None] * 2 * (p_s - p_t) / N, rtol=1e-9, atol=1e-15)


# ------------------------------------------------------------------------------------------------ correlations


@both
@pytest.mark.parametrize("convention", ["kirsch", "torchdistill"])
def test_opposite_outputs_are_charged_two_for_samples_and_two_for_classes(convention, framework):
    """Rows (1/4, 3/4) and (3/4, 1/4) against the same exchanged: every correlation is -1."""
    teacher = np.array([[0.0, math.log(3)], [math.log(3), 0.0]])
    sides = framework(teacher[::-1].copy()), framework(teacher)
    # 1e-8 is added to products of lengths of 1/8.
    for options, wanted in (({}, 4.0), ({"inter": 0.0}, 2.0), ({"intra": 0.5}, 3.0)):
        assert float(LOSSES["dist"](*sides, convention=convention, **options)) == pytest.approx(wanted, rel=1e-7)


@both
def test_correlations_of_the_batch_and_of_classes_in_closed_form(framework):
    """P_s = (1/2, 1/2), P_t = (1/4, 3/4), once: 1/2 against 5/8, and products 1/4 against 1/16, 3/16, 9/16."""
    student, teacher = framework(np.zeros((1, 2))), framework(np.array([[0.0, math.log(3)]]))
    batch = float(LOSSES["batch-correlation"](student, teacher, temperature=1.0))
    classes = float(LOSSES["class-correlation"](student, teacher, temperature=1.0))
    assert batch == pytest.approx((1 / 8) ** 2, rel=1e-13)
    assert classes == pytest.approx((9 + 2 + 25) / 256 / 2, rel=1e-13)


def test_several_levels_are_the_sum_of_their_parts_at_each_temperature():
    found = LOSSES["mlkd"](z_s, z_t, temperatures=(2.0, 5.0), instance=1.0, batch=10.0, classes=100.0)
    wanted = sum(
        weight * float(LOSSES[name](z_s, z_t, temperature=temperature))
        for temperature in (2.0, 5.0)
        for name, weight in (("kd", 1.0), ("batch-correlation", 10.0), ("class-correlation", 100.0))
    )
    assert float(found) == pytest.approx(wanted, rel=1e-14)


def test_several_levels_need_a_temperature():
    with pytest.raises(UsageError, match=r"There are no temperatures, .* Give at least one"):
        LOSSES["mlkd"](z_s, z_t, temperatures=())
    with pytest.raises(UsageError, match=r"The temperature is 0\.0"):
        LOSSES["mlkd"](z_s, z_t, temperatures=(2.0, 0.0))


# ------------------------------------------------------------------------------------------------ without a softmax


@both
def test_a_single_question_is_two_classes_of_which_one_has_score_zero(framework):
    first, second = (scores[:, :1] for scores in (z_s, z_t))
    wanted = soft_target(*(np.concatenate([0 * part, part], -1) for part in (first, second)), temperature=3.0)
    for sides in ((first, second), (first[:, 0], second[:, 0])):
        found = LOSSES["binary-kd"](*(framework(side.copy()) for side in sides), temperature=3.0)
        assert float(found) == pytest.approx(float(wanted), rel=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_of_yes_or_no_is_temperature_times_the_difference(temperature):
    """Also at a score of exactly 0, where a head starts that is set to zero."""
    student = torch.zeros(N, K, dtype=torch.float64, requires_grad=True)
    LOSSES["binary-kd"](student, torch.from_numpy(z_t), temperature=temperature).backward()
    wanted = temperature * (0.5 - torch.sigmoid(torch.from_numpy(z_t) / temperature)) / N
    np.testing.assert_allclose(student.grad, wanted, rtol=1e-12, atol=1e-16)


@both
def test_a_bounded_student_is_charged_where_it_is_not_better_than_the_teacher(framework):
    """Squared errors of the student 4, 1 and 1, of the teacher 1, 4 and 1.5."""
    student, teacher = np.array([[2.0], [1.0], [1.0]]), np.array([[1.0], [2.0], [1.5**0.5]])
    charge = functools.partial(
        LOSSES["bounded-regression"], framework(student), framework(teacher), labels=framework(np.zeros((3, 1)))
    )
    assert float(charge()) == pytest.approx(4 / 3)
    assert float(charge(margin=1.0)) == pytest.approx((4 + 1) / 3)  # 1 + 1 is above 1.5, not above 4


def test_a_bound_needs_true_numbers_and_a_margin():
    with pytest.raises(UsageError, match=r"The margin is -1; a number of at least 0"):
        LOSSES["bounded-regression"](z_s, z_t, labels=z_s, margin=-1)
    with pytest.raises(ShapeError, match=r"The labels have shape \(8,\); the values have shape \(8, 10\)"):
        LOSSES["bounded-regression"](z_s, z_t, labels=y)


@pytest.mark.parametrize("k", [0, 2.5])
def test_a_number_of_classes_that_is_none_is_refused(k):
    with pytest.raises(UsageError, match=rf"`k` is {k}; a whole number of at least 1 is needed"):
        LOSSES["top-k"](z_s, z_t, k=k)


@both
def test_a_record_that_names_a_class_twice_is_refused_where_it_counts(framework):
    indices, log_p = framework(np.array([[1, 2], [3, 3]])), framework(np.log([[0.5, 0.3], [0.4, 0.4]]))
    record = indices, log_p, framework(np.log([0.2, 0.2]))
    with pytest.raises(DataError, match="The store names class 3 twice for one sample"):
        stored_top_k(framework(z_s[:2]), *record)
    assert float(stored_top_k(framework(z_s[:2]), *record, mask=framework(np.array([True, False])))) > 0
