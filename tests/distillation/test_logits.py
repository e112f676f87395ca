"""Losses on logits: properties of all of them, and soft targets compared with closed forms and other code bases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from distillation.examples import with_options
from distillation.golden import y, z_s, z_t
from kirsch.distillation.losses import LOSSES, hard_label, soft_target
from kirsch.distillation.losses.logits import CONVENTIONS, standardized
from kirsch.distillation.losses.loss import loss_options, step_arguments
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.testing import LOSS_CHECKS

N, K = z_s.shape
SEQUENCE_LOSSES = ("kd", "hard", "logit-l2", "reverse-kl", "jsd", "dkd", "ofa", "wsld", "dist", "batch-correlation")
SEQUENCE_LOSSES += ("class-correlation", "mlkd", "top-k", "binary-kd")
"""Losses on logits that also accept positions of sequences as samples."""

RANDOM = np.random.default_rng(0)
SEQ_S, SEQ_T = 2 * RANDOM.standard_normal((3, 4, 5)), 3 * RANDOM.standard_normal((3, 4, 5))
SEQ_Y = RANDOM.integers(0, 5, (3, 4))
SEQ_MASK = RANDOM.random((3, 4)) < 0.6


def options_for(name, labels):
    return {"labels": labels} if "labels" in step_arguments(LOSSES[name]) else {}


# ------------------------------------------------------------------------------------------------ all losses


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_unmasked_positions_of_sequences_count_like_samples(name, framework):
    """The unmasked positions, as samples of one batch, give the same loss."""
    rows = LOSSES[name](SEQ_S[SEQ_MASK], SEQ_T[SEQ_MASK], **options_for(name, SEQ_Y[SEQ_MASK]))
    arguments = {**options_for(name, framework(SEQ_Y)), "mask": framework(SEQ_MASK)}
    assert float(LOSSES[name](framework(SEQ_S), framework(SEQ_T), **arguments)) == pytest.approx(float(rows), rel=1e-13)


@pytest.mark.parametrize("name", [name for name in SEQUENCE_LOSSES if "labels" in step_arguments(LOSSES[name])])
def test_labels_of_minus_100_are_masked(name, framework):
    labels = np.where(SEQ_MASK, SEQ_Y, -100)
    masked = LOSSES[name](SEQ_S, SEQ_T, labels=SEQ_Y, mask=SEQ_MASK)
    value = LOSSES[name](framework(SEQ_S), framework(SEQ_T), labels=framework(labels))
    assert float(value) == pytest.approx(float(masked), rel=1e-14)


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_masks_of_another_shape_or_without_samples_are_refused(name, framework):
    sides = framework(z_s), framework(z_t)
    with pytest.raises(ShapeError, match=r"The mask has shape \(7,\); \(8,\) is needed"):
        LOSSES[name](*sides, **options_for(name, framework(y)), mask=framework(np.ones(7, bool)))
    with pytest.raises(DataError, match="All targets are masked"):
        LOSSES[name](*sides, **options_for(name, framework(y)), mask=framework(np.zeros(N, bool)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "name", [name for name in (*SEQUENCE_LOSSES, "pixel-kd") if "temperature" in loss_options(LOSSES[name])]
)
def test_an_invalid_temperature_is_refused(name, temperature):
    sides = (z_s.reshape(2, 10, 2, 2), z_t.reshape(2, 10, 2, 2)) if name == "pixel-kd" else (z_s, z_t)
    with pytest.raises(UsageError, match=rf"The temperature is {temperature}; a number above 0 is needed"):
        LOSSES[name](*sides, **options_for(name, y), temperature=temperature)


LOGIT_LOSSES = tuple(name for name in LOSSES if LOSSES[name].takes in ("logits", "pixels"))
ONE_CLASS = ("binary-kd", "logit-l2", "cwd-pixels")
"""Losses that accept a single class."""


def call_loss(name, framework, shape, label_shape=None):
    sides = (framework(side) for side in np.random.default_rng(0).standard_normal((2, *shape)))
    labels = framework(np.zeros(shape[:-1] if label_shape is None else label_shape, int))
    return LOSSES[name](*sides, **options_for(name, labels))


@pytest.mark.parametrize("name", [name for name in LOGIT_LOSSES if name not in ONE_CLASS])
def test_a_single_class_is_refused_by_losses_with_a_softmax(name, framework):
    pixels = LOSSES[name].takes == "pixels"
    shape, fix = ((4, 1, 3, 3), r'Term\("fitnet", student_layer="logits"\)') if pixels else ((4, 3, 1), '"binary-kd"')
    with pytest.raises(
        ShapeError, match=rf"only one class\. The softmax of one class .* Use {fix} for a binary output"
    ):
        call_loss(name, framework, shape)


@pytest.mark.parametrize("name", [name for name in LOGIT_LOSSES if name not in ONE_CLASS and "pixel" not in name])
def test_logits_without_a_class_axis_are_refused(name, framework):
    with pytest.raises(ShapeError, match=r'logits have shape \(4,\); \(N, K\) .* count as classes.*"binary-kd"'):
        call_loss(name, framework, (4,), (4,))


@pytest.mark.parametrize("name", ["binary-kd", "logit-l2", "bounded-regression"])
def test_one_output_per_sample_needs_no_class_axis(name, framework):
    sides = np.array([3.0, 0, 0, 0]), np.array([0.0, 2, 2, 2])

    def loss_value(*axes):
        values = [framework(side[(..., *axes)]) for side in sides]
        arguments = {"labels": framework(np.zeros(4)[(..., *axes)])} if name == "bounded-regression" else {}
        return float(LOSSES[name](*values, **arguments))

    assert loss_value() == loss_value(None)
    if name == "bounded-regression":
        assert loss_value() == 9 / 4  # only the first sample is worse than the teacher


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_a_batch_without_samples_is_refused(name, framework):
    with pytest.raises(DataError, match=r"The batch has no samples\. Skip empty batches"):
        call_loss(name, framework, (0, 3, 2, 2) if LOSSES[name].takes == "pixels" else (0, 3, 3))


MASKED_CLASS_CASES = {
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


@pytest.mark.parametrize("case", MASKED_CLASS_CASES)
def test_a_class_masked_in_both_models_has_no_effect(case, framework):
    """A logit of minus infinity, as for forbidden tokens, gives the loss and gradient of the other classes alone."""
    name, options = (
        case.split()[0],
        {n: framework(v) if n == "labels" else v for n, v in MASKED_CLASS_CASES[case].items()},
    )
    rest = [side[:3, :5] for side in (z_s, z_t)]
    sides = [framework(np.insert(side, 2, -np.inf, axis=1)) for side in rest]
    fewer = float(LOSSES[name](*(framework(side) for side in rest), **options))
    if name == "mlkd":  # the term on classes is a mean over 6 instead of 5 classes
        fewer = float(LOSSES[name](*(framework(side) for side in rest), **options, classes=5 / 6))
    assert float(LOSSES[name](*sides, **options)) == pytest.approx(fewer, rel=1e-12)
    if isinstance(sides[0], torch.Tensor):
        sides[0].requires_grad_()
        LOSSES[name](*sides, **options).backward()
        assert torch.isfinite(sides[0].grad).all()
        assert not sides[0].grad[:, 2].any()


@pytest.mark.parametrize("case", ["kd", "jsd", "top-k", "dkd", "ofa", "wsld", "hard"])
def test_the_loss_of_a_class_masked_in_the_teacher_alone_is_the_limit_of_low_logits(case, framework):
    options = {n: framework(v) if n == "labels" else v for n, v in MASKED_CLASS_CASES[case].items()}
    teacher = z_t[:3, :5].copy()
    values = []
    for logit in (-1e3, -np.inf):
        teacher[:, 2] = logit
        values.append(float(LOSSES[case](framework(z_s[:3, :5].copy()), framework(teacher.copy()), **options)))
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    if isinstance(framework(teacher), torch.Tensor):
        student = torch.from_numpy(z_s[:3, :5].copy()).requires_grad_()
        LOSSES[case](student, torch.from_numpy(teacher), **options).backward()
        assert torch.isfinite(student.grad).all()


def test_certain_binary_outputs_add_nothing(framework):
    """Logits of minus and plus infinity are probabilities of 0 and 1."""
    sides = [framework(np.array([[-np.inf, np.inf, logit]])) for logit in (0.0, math.log(3))]
    assert float(LOSSES["binary-kd"](*sides)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12)
    if isinstance(sides[0], torch.Tensor):
        sides[0].requires_grad_()
        LOSSES["binary-kd"](*sides).backward()
        assert torch.isfinite(sides[0].grad).all()


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
MINIMUM_ELSEWHERE = {
    "dist mmrazor",  # norms have an added constant: the loss falls if tiny probabilities of the student grow
    "kd keras",  # clipped probabilities get no gradient
    "top-k zero",  # minimum at a student without tail probability
    "top-k uniform",  # minimum at a student with a uniform tail
    "bounded-regression margin",  # minimum at a student that is better than the teacher
}


@pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_conform_with_other_options(variant, check):
    if variant in MINIMUM_ELSEWHERE and check.__name__.endswith("when_the_student_equals_the_teacher"):
        pytest.skip("the loss with this option is not smallest where student and teacher are equal")
    check(VARIANTS[variant])


# ------------------------------------------------------------------------------------------------ soft targets


def test_soft_targets_equal_their_closed_form(framework):
    """Teacher (1/2, 1/2), student (1/4, 3/4): KL = log(4/3) / 2."""
    student, teacher = framework(np.array([[0.0, 2 * math.log(3)]])), framework(np.zeros((1, 2)))
    value = float(soft_target(student, teacher, temperature=2.0))
    assert value == pytest.approx(4 * math.log(4 / 3) / 2, rel=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_targets_equal_those_of_pytorch(temperature):
    student, teacher = torch.from_numpy(z_s), torch.from_numpy(z_t)
    log_s, log_t = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    expected = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2
    assert float(soft_target(student, teacher, temperature=temperature)) == pytest.approx(float(expected), rel=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_of_soft_targets_is_temperature_times_the_difference_of_outputs(temperature):
    student, teacher = (torch.from_numpy(logits.copy()).requires_grad_() for logits in (z_s, z_t))
    soft_target(student, teacher, temperature=temperature).backward()
    assert teacher.grad is None
    p_s, p_t = (F.softmax(torch.from_numpy(logits) / temperature, -1) for logits in (z_s, z_t))
    np.testing.assert_allclose(student.grad, temperature * (p_s - p_t) / N, rtol=1e-12, atol=1e-16)


def test_the_gradient_at_high_temperature_is_that_of_squared_logits():
    """Hinton et al. 2015, section 2.1: for T → ∞ the gradient is (z_s - z_t) / (N K), for logits with mean 0."""
    centered = [logits - logits.mean(-1, keepdims=True) for logits in (z_s, z_t)]
    student = torch.from_numpy(centered[0]).requires_grad_()
    soft_target(student, torch.from_numpy(centered[1]), temperature=1e5).backward()
    # The next term of the expansion in 1 / T is smaller by a factor of logits / T, here 1e-4.
    np.testing.assert_allclose(student.grad, (centered[0] - centered[1]) / (N * K), rtol=0, atol=1e-5)


def test_the_loss_of_a_student_that_equals_its_teacher_is_exactly_0(framework):
    assert float(soft_target(framework(z_t), framework(z_t.copy()), temperature=4.0)) == 0.0


@given(
    arrays(np.float64, (3, 4), elements=st.floats(-1e4, 1e4)),
    arrays(np.float64, (3, 4), elements=st.floats(-1e4, 1e4)),
    st.floats(0.1, 100),
)
@settings(deadline=None, derandomize=True)
def test_soft_targets_are_nonnegative_and_invariant_to_shifts(student, teacher, temperature):
    value = float(soft_target(student, teacher, temperature=temperature))
    # Each of 4 terms p (log p - log q) has the rounding error of the softened logits, multiplied by T².
    rounding = 1e-15 * 4 * max(np.abs(student).max(), np.abs(teacher).max(), 1.0) * temperature * max(1, temperature)
    assert value >= -rounding
    shifted = float(soft_target(student + 1.0, teacher - 2.0, temperature=temperature))
    assert shifted == pytest.approx(value, rel=1e-9, abs=100 * rounding)


def test_logits_of_different_numbers_of_samples_are_not_broadcast(framework):
    with pytest.raises(ShapeError, match=r"shape \(8, 10\), the teacher's \(1, 10\)"):
        soft_target(framework(z_s), framework(z_t[:1]), temperature=1.0)


# Convention → (factor T², mean over classes, entropy of the targets included), as the code bases document them.
CONVENTION_SCALES = {
    **dict.fromkeys(
        ("kirsch", "repdistiller", "mdistiller", "mmrazor", "distillkit", "huggingface", "distill-whisper"),
        (True, False, False),
    ),
    **dict.fromkeys(("modelopt", "deit", "neural-compressor"), (True, True, False)),
    **dict.fromkeys(("torchdistill", "trl", "modelopt-megatron"), (False, False, False)),
    **dict.fromkeys(("textbrewer", "paddleslim"), (False, False, True)),
    "keras": (True, False, False),  # all probabilities here are above the floor of 1e-7
}


@pytest.mark.filterwarnings("ignore:reduction.*mean.*divides")
@pytest.mark.parametrize("temperature", [2.0, 4.0])
@pytest.mark.parametrize("convention", CONVENTION_SCALES)
def test_conventions_equal_the_formulas_of_other_code_bases(convention, temperature, framework):
    squared, over_classes, with_entropy = CONVENTION_SCALES[convention]
    log_s, log_t = (F.log_softmax(torch.from_numpy(logits) / temperature, -1) for logits in (z_s, z_t))
    assert float(torch.minimum(log_s, log_t).min()) > math.log(1e-7)
    expected = F.kl_div(log_s, log_t, reduction="mean" if over_classes else "batchmean", log_target=True)
    if with_entropy:
        expected = F.cross_entropy(torch.from_numpy(z_s) / temperature, log_t.exp())
    value = soft_target(framework(z_s), framework(z_t), temperature=temperature, convention=convention)
    assert float(value) == pytest.approx(float(expected) * (temperature**2 if squared else 1), rel=1e-13)


@pytest.mark.parametrize("convention", [name for name, scale in CONVENTION_SCALES.items() if scale[1]])
def test_conventions_with_a_mean_over_classes_divide_by_the_number_of_classes_in_sequences(convention, framework):
    sides = [framework(logits.reshape(2, 4, 10)) for logits in (z_s, z_t)]
    assert float(soft_target(*sides, convention=convention)) == pytest.approx(float(soft_target(*sides)) / 10)


def test_every_convention_is_tested():
    assert set(CONVENTION_SCALES) == set(CONVENTIONS)


def test_the_keras_convention_clips_tiny_probabilities_of_the_student(framework):
    """The student's probability e^-40 of the first class counts as 1e-7: (log(1/2) - log(1e-7)) / 2 + log(1/2) / 2."""
    student, teacher = framework(np.array([[-40.0, 0.0]])), framework(np.zeros((1, 2)))
    value = float(soft_target(student, teacher, convention="keras"))
    assert value == pytest.approx((math.log(0.5) - math.log(1e-7)) / 2 + math.log(0.5) / 2, rel=1e-14)


def test_the_keras_convention_clips_tiny_probabilities_of_the_teacher(framework):
    """Teacher e^-40, student 1/2 for the first class: 1e-7 (log 1e-7 - log(1/2)) + log 2."""
    student, teacher = framework(np.zeros((1, 2))), framework(np.array([[-40.0, 0.0]]))
    value = float(soft_target(student, teacher, convention="keras"))
    assert value == pytest.approx(1e-7 * (math.log(1e-7) - math.log(0.5)) + math.log(2), rel=1e-14)


def test_an_unknown_convention_suggests_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"no convention 'mdistil'\. Known: deit, .* mean 'mdistiller'"):
        soft_target(z_s, z_t, convention="mdistil")
    for name in ("jsd", "dist"):
        with pytest.raises(UnknownNameError, match="There is no convention 'keras'"):
            LOSSES[name](z_s, z_t, convention="keras")


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_standardized_losses_are_invariant_to_scale_and_shift(name):
    def loss_value(student):
        return float(LOSSES[name](student, z_t, **options_for(name, y), temperature=2.0, standardize=True))

    # 1e-7 is added to the standard deviation, which is about 3.
    assert loss_value(100 * z_s - 5) == pytest.approx(loss_value(z_s), rel=1e-5)
    assert loss_value(3 * z_t + 1) == pytest.approx(0, abs=1e-12)
    assert loss_value(-z_t) > 0.1


def test_standardized_logits_have_the_sample_standard_deviation_1(framework):
    """(0, 2) has mean 1 and, with the divisor K - 1, standard deviation √2. Equal logits stay finite."""
    value = standardized(framework(np.array([[0.0, 2.0], [3.0, 3.0]])))
    np.testing.assert_allclose(value, [[-(2**-0.5), 2**-0.5], [0, 0]], rtol=1e-6)


def test_the_loss_hard_is_the_cross_entropy_with_the_predictions_of_the_teacher(framework):
    value = LOSSES["hard"](framework(z_s), framework(z_t))
    assert float(value) == pytest.approx(float(hard_label(z_s, z_t.argmax(-1))), rel=1e-15)


def test_squared_logits_equal_their_closed_form(framework):
    """The squared differences 1 + 4 and 0 + 9 of two samples have the mean 7."""
    student = np.array([[1.0, 2.0], [0.0, 3.0]])
    assert float(LOSSES["logit-l2"](framework(student), framework(np.zeros((2, 2))))) == 7.0


def test_the_loss_pixel_kd_treats_pixels_as_samples(framework):
    maps_s, maps_t = (logits.reshape(2, 2, 2, 10).transpose(0, 3, 1, 2) for logits in (z_s, z_t))
    mask = np.arange(8).reshape(2, 2, 2) % 3 != 0
    expected = soft_target(z_s[mask.reshape(-1)], z_t[mask.reshape(-1)], temperature=3.0)
    value = LOSSES["pixel-kd"](framework(maps_s), framework(maps_t), temperature=3.0, mask=framework(mask))
    assert float(value) == pytest.approx(float(expected), rel=1e-14)
