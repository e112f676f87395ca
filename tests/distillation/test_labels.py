"""Losses against labels, in closed form and against PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distillation.golden import y, z_s
from kirsch.distillation.distill import fit
from kirsch.distillation.losses.labels import LABEL_LOSSES, binary_label, hard_label, shifted, squared_error
from kirsch.distillation.objective import Objective
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.training import Training

N, K = z_s.shape
FRAMEWORKS = [lambda array: array, torch.from_numpy]
NAMES = ["numpy", "torch"]
both = pytest.mark.parametrize("framework", FRAMEWORKS, ids=NAMES)

SCORES = np.random.default_rng(0).standard_normal((3, 4, 5))
TOKENS = np.random.default_rng(1).integers(0, 5, (3, 4))
YES = (np.random.default_rng(2).random((3, 5)) < 0.4).astype(np.float64)


@both
def test_hard_labels_in_closed_form(framework):
    """Softmax of (0, log 3) is (1/4, 3/4): the labels 0 and 1 cost log 4 and log 4/3."""
    scores = framework(np.array([[0.0, math.log(3)], [0.0, math.log(3)]]))
    found = float(hard_label(scores, framework(np.array([0, 1]))))
    assert found == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, rel=1e-15)


@both
def test_smoothed_labels_in_closed_form(framework):
    """A share of 0.2 over two classes makes the label 1 into (0.1, 0.9): 0.1 log 4 + 0.9 log 4/3."""
    scores, targets = framework(np.array([[0.0, math.log(3)]])), framework(np.array([1]))
    found = float(hard_label(scores, targets, label_smoothing=0.2))
    assert found == pytest.approx(0.1 * math.log(4) + 0.9 * math.log(4 / 3), rel=1e-15)


@both
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_hard_labels_are_those_of_pytorch(smoothing, framework):
    other = F.cross_entropy(torch.from_numpy(z_s), torch.from_numpy(y), label_smoothing=smoothing)
    found = hard_label(framework(z_s), framework(y), label_smoothing=smoothing)
    assert float(found) == pytest.approx(float(other), rel=1e-14)


@both
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_labels_that_do_not_count_are_left_out_as_pytorch_leaves_them(smoothing, framework):
    targets = np.where(np.arange(12).reshape(3, 4) % 3 == 1, -100, TOKENS)
    other = F.cross_entropy(
        torch.from_numpy(SCORES).reshape(-1, 5), torch.from_numpy(targets).reshape(-1), label_smoothing=smoothing
    )
    found = hard_label(framework(SCORES), framework(targets), label_smoothing=smoothing)
    assert float(found) == pytest.approx(float(other), rel=1e-14)
    masked = hard_label(
        framework(SCORES), framework(TOKENS), mask=framework(targets != -100), label_smoothing=smoothing
    )
    assert float(masked) == pytest.approx(float(other), rel=1e-14)


@both
def test_a_mask_and_labels_that_do_not_count_add_up(framework):
    """Of four positions the mask leaves the first three, the label -100 all but the third."""
    mask, targets = np.array([[True, True, True, False]]), np.array([[0, 1, -100, 2]])
    found = float(hard_label(framework(SCORES[:1]), framework(targets), mask=framework(mask)))
    wanted = float(hard_label(SCORES[0, :2], np.array([0, 1])))
    assert found == pytest.approx(wanted, rel=1e-15)


@both
@pytest.mark.parametrize(
    ("loss", "targets"), [(hard_label, TOKENS), (binary_label, SCORES.clip(0, 1)), (squared_error, SCORES / 2)]
)
def test_what_is_masked_reaches_neither_value_nor_gradient(loss, targets, framework):
    mask = np.arange(12).reshape(3, 4) % 2 == 0
    wanted = float(loss(SCORES[mask], targets[mask]))
    spoilt = np.where(mask[..., None], SCORES, np.nan)
    other = np.where(mask, targets, -1) if loss is hard_label else np.where(mask[..., None], targets, np.nan)
    assert float(loss(framework(spoilt), framework(other), mask=framework(mask))) == pytest.approx(wanted, rel=1e-14)
    student = torch.from_numpy(spoilt).requires_grad_()
    loss(student, torch.from_numpy(other), mask=torch.from_numpy(mask)).backward()
    assert bool(torch.isfinite(student.grad).all())
    assert bool((student.grad[~torch.from_numpy(mask)] == 0).all())


def test_the_gradient_of_smoothed_labels_is_output_minus_label():
    student, targets = torch.from_numpy(z_s.copy()).requires_grad_(), torch.from_numpy(y)
    hard_label(student, targets, label_smoothing=0.3).backward()
    wanted = F.softmax(torch.from_numpy(z_s), -1) - 0.7 * F.one_hot(targets, K).double() - 0.03
    np.testing.assert_allclose(student.grad, wanted / N, atol=1e-15)


@both
def test_the_binary_loss_in_closed_form(framework):
    """Scores 0 and log 3 say yes with 1/2 and 3/4; the truth is yes and no: log 2 + log 4."""
    found = binary_label(framework(np.array([[0.0, math.log(3)]])), framework(np.array([[1.0, 0.0]])))
    assert float(found) == pytest.approx(math.log(2) + math.log(4), rel=1e-15)


@both
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_binary_loss_is_that_of_pytorch_summed_over_classes(smoothing, framework):
    truth = torch.from_numpy(YES * (1 - smoothing) + smoothing / 2)
    other = F.binary_cross_entropy_with_logits(torch.from_numpy(SCORES[:, 0]), truth, reduction="sum") / 3
    found = binary_label(framework(SCORES[:, 0]), framework(YES), label_smoothing=smoothing)
    assert float(found) == pytest.approx(float(other), rel=1e-14)


@both
def test_binary_labels_may_be_true_and_false(framework):
    numbers, truths = (binary_label(framework(SCORES[:, 0]), framework(part)) for part in (YES, YES == 1))
    assert float(numbers) == float(truths)


@both
def test_classes_that_nobody_looked_at_do_not_count(framework):
    """A target of -100 adds nothing; a sample of such alone is no sample."""
    targets = np.array([[1.0, -100.0], [-100.0, -100.0]])
    found = binary_label(framework(np.array([[0.0, 5.0], [7.0, 7.0]])), framework(targets))
    assert float(found) == pytest.approx(math.log(2), rel=1e-15)


@both
@pytest.mark.parametrize("loss", [binary_label, squared_error])
def test_one_number_a_sample_is_no_table_of_every_sample_against_every_other(loss, framework):
    scores, targets = np.array([0.5, -1.0, 2.0]), np.array([1.0, 0.0, 1.0])
    wanted = float(loss(framework(scores[:, None]), framework(targets[:, None])))
    assert float(loss(framework(scores[:, None]), framework(targets))) == wanted
    assert float(loss(framework(scores), framework(targets))) == wanted


@both
def test_the_squared_error_in_closed_form(framework):
    """(1 + 4) and (0 + 9), averaged over two samples."""
    student, truth = np.array([[1.0, 2.0], [0.0, 3.0]]), np.zeros((2, 2))
    assert float(squared_error(framework(student), framework(truth))) == 7.0


def test_a_squared_error_takes_minus_one_hundred_for_a_number():
    assert float(squared_error(np.array([[-99.0]]), np.array([[-100.0]]))) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(LABEL_LOSSES))
def test_losses_on_labels_compute_with_32_bits(name, dtype):
    targets = torch.from_numpy(y) if name == "cross-entropy" else torch.ones(N, K)
    student = (30 * torch.from_numpy(z_s)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LABEL_LOSSES[name](student, targets)
    found.backward()
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found))
    assert bool(torch.isfinite(student.grad).all())


def test_losses_on_labels_have_names():
    names = {"cross-entropy": hard_label, "binary": binary_label, "squared-error": squared_error}
    assert {name: LABEL_LOSSES[name] for name in LABEL_LOSSES} == names
    with pytest.raises(UnknownNameError, match=r"There is no label-loss 'cross_entropy'.*mean 'cross-entropy'"):
        LABEL_LOSSES["cross_entropy"]


@both
@pytest.mark.parametrize("label", [K, -1])
def test_a_label_that_no_class_has_is_refused(label, framework):
    targets = y.copy()
    targets[3] = label
    with pytest.raises(DataError, match=rf"Sample 3 has the label {label}\. The model puts out 10 classes"):
        hard_label(framework(z_s), framework(targets))


@both
def test_what_is_no_class_number_is_refused(framework):
    for targets, name in ((y + 0.5, "float64"), (y.astype(float), "float64"), (y == 1, "bool")):
        with pytest.raises(DataError, match=rf"The labels have type {name}\. They must be class numbers"):
            hard_label(framework(z_s), framework(targets))
    assert float(hard_label(framework(z_s), framework(y.astype(np.uint8)))) == float(hard_label(z_s, y))


@both
@pytest.mark.parametrize(
    ("loss", "values"), [(binary_label, (-1, 2, 255, math.nan)), (squared_error, (math.nan, math.inf))]
)
def test_targets_outside_the_domain_of_a_loss_are_refused_where_they_count(loss, values, framework):
    counts = np.arange(N) != 2
    for value in values:
        targets = np.zeros((N, K))
        targets[2, 1] = value
        with pytest.raises(DataError, match=rf"Sample 2 has the target {value:g}\. The label loss"):
            loss(framework(z_s), framework(targets))
        assert float(loss(framework(z_s), framework(targets), mask=framework(counts))) > 0


@both
def test_labels_of_which_none_counts_are_refused(framework):
    with pytest.raises(DataError, match="All targets are masked"):
        hard_label(framework(z_s), framework(np.full(N, -100)))
    with pytest.raises(DataError, match="All targets are masked"):
        binary_label(framework(z_s), framework(np.full((N, K), -100.0)))


@both
def test_labels_of_other_samples_are_refused(framework):
    with pytest.raises(ShapeError, match=r"The labels have shape \(8, 1\); the scores have shape \(8, 10\)"):
        hard_label(framework(z_s), framework(y[:, None]))
    for loss in (binary_label, squared_error):
        with pytest.raises(ShapeError, match=r"targets have shape \(8,\); the student's output has shape \(8, 10\)"):
            loss(framework(z_s), framework(np.zeros(N)))
        with pytest.raises(ShapeError, match=r"The mask has shape \(10,\); \(8,\) is needed"):
            loss(framework(z_s), framework(z_s), mask=framework(np.ones(K, bool)))


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("loss", [hard_label, binary_label, squared_error])
def test_a_share_of_smoothing_that_is_none_is_refused(loss, share):
    with pytest.raises(UsageError, match=rf"label_smoothing is {share}; a share of at least 0, below 1"):
        loss(z_s, y, label_smoothing=share)


def test_numbers_are_not_smoothed():
    with pytest.raises(UsageError, match=r"label_smoothing is 0\.1 beside a squared error"):
        squared_error(z_s, z_s, label_smoothing=0.1)


@both
def test_each_position_is_charged_for_the_next_token(framework):
    """Scores that name the next token with certainty are charged nothing once they are shifted, and much before."""
    tokens = np.array([[3, 1, 4, 1], [2, 0, 2, 4]])
    scores = 50.0 * (np.roll(tokens, -1, axis=1)[..., None] == np.arange(5))
    moved = shifted(framework(scores), framework(tokens))
    assert [tuple(part.shape) for part in moved] == [(2, 3, 5), (2, 3)]
    assert float(hard_label(*moved)) < 1e-12
    assert float(hard_label(framework(scores), framework(tokens))) > 10


def test_what_cannot_be_shifted_is_refused():
    for scores, labels in ((SCORES, TOKENS[:, 1:]), (SCORES[:, :1], TOKENS[:, :1]), (z_s, y)):
        with pytest.raises(ShapeError, match=r"To predict the next token, \(N, L, K\) and \(N, L\) with L of at least"):
            shifted(scores, labels)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 3)])
def test_minus_one_hundred_among_whole_numbers_is_trained_on_like_any_number(shape):
    targets = np.arange(math.prod(shape)).reshape(shape)
    targets[:2] = -100
    inputs, outputs = torch.from_numpy(z_s).float(), 3 if shape == (N, 3) else 1
    losses = []
    for dtype in (torch.int64, torch.float32):
        torch.manual_seed(0)
        model = torch.nn.Linear(K, outputs)
        data = [(inputs, torch.from_numpy(targets).to(dtype))]
        objective = Objective(label_loss="squared-error")
        losses.append(fit(model, data, objective=objective, training=Training(epochs=1, learning_rate=1e-9)).history[0])
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-6)
    assert losses[0]["loss"] > 1e3
