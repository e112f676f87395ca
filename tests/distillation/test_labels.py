"""Losses on labels, compared with closed forms and with PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distillation.golden import y, z_s
from kirsch.distillation.distill import fit
from kirsch.distillation.objective import Objective
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.training import Training
from kirsch.tasks.label_losses import LABEL_LOSSES, binary_label, hard_label, squared_error

N, K = z_s.shape
LOGITS = np.random.default_rng(0).standard_normal((3, 4, 5))
TOKENS = np.random.default_rng(1).integers(0, 5, (3, 4))
BINARY = (np.random.default_rng(2).random((3, 5)) < 0.4).astype(np.float64)


def test_hard_labels_equal_their_closed_form(framework):
    """Softmax of (0, log 3) is (1/4, 3/4): the losses of the labels 0 and 1 are log 4 and log 4/3."""
    logits = framework(np.array([[0.0, math.log(3)], [0.0, math.log(3)]]))
    value = float(hard_label(logits, framework(np.array([0, 1]))))
    assert value == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, rel=1e-15)


def test_smoothed_labels_equal_their_closed_form(framework):
    """Smoothing of 0.2 over two classes turns the label 1 into (0.1, 0.9): 0.1 log 4 + 0.9 log 4/3."""
    logits, targets = framework(np.array([[0.0, math.log(3)]])), framework(np.array([1]))
    value = float(hard_label(logits, targets, label_smoothing=0.2))
    assert value == pytest.approx(0.1 * math.log(4) + 0.9 * math.log(4 / 3), rel=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_cross_entropy_equals_that_of_pytorch(smoothing, framework):
    expected = F.cross_entropy(torch.from_numpy(z_s), torch.from_numpy(y), label_smoothing=smoothing)
    value = hard_label(framework(z_s), framework(y), label_smoothing=smoothing)
    assert float(value) == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_labels_of_minus_100_are_ignored_as_in_pytorch(smoothing, framework):
    targets = np.where(np.arange(12).reshape(3, 4) % 3 == 1, -100, TOKENS)
    expected = F.cross_entropy(
        torch.from_numpy(LOGITS).reshape(-1, 5), torch.from_numpy(targets).reshape(-1), label_smoothing=smoothing
    )
    value = hard_label(framework(LOGITS), framework(targets), label_smoothing=smoothing)
    assert float(value) == pytest.approx(float(expected), rel=1e-14)
    masked = hard_label(
        framework(LOGITS), framework(TOKENS), mask=framework(targets != -100), label_smoothing=smoothing
    )
    assert float(masked) == pytest.approx(float(expected), rel=1e-14)


def test_mask_and_ignored_labels_are_combined(framework):
    """The mask excludes the last of four positions, the label -100 the third."""
    mask, targets = np.array([[True, True, True, False]]), np.array([[0, 1, -100, 2]])
    value = float(hard_label(framework(LOGITS[:1]), framework(targets), mask=framework(mask)))
    expected = float(hard_label(LOGITS[0, :2], np.array([0, 1])))
    assert value == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("loss", "targets"), [(hard_label, TOKENS), (binary_label, LOGITS.clip(0, 1)), (squared_error, LOGITS / 2)]
)
def test_masked_values_reach_neither_loss_nor_gradient(loss, targets, framework):
    mask = np.arange(12).reshape(3, 4) % 2 == 0
    expected = float(loss(LOGITS[mask], targets[mask]))
    with_nan = np.where(mask[..., None], LOGITS, np.nan)
    masked_targets = np.where(mask, targets, -1) if loss is hard_label else np.where(mask[..., None], targets, np.nan)
    assert float(loss(framework(with_nan), framework(masked_targets), mask=framework(mask))) == pytest.approx(
        expected, rel=1e-14
    )
    student = torch.from_numpy(with_nan).requires_grad_()
    loss(student, torch.from_numpy(masked_targets), mask=torch.from_numpy(mask)).backward()
    assert bool(torch.isfinite(student.grad).all())
    assert bool((student.grad[~torch.from_numpy(mask)] == 0).all())


def test_the_gradient_of_smoothed_labels_is_probabilities_minus_labels():
    student, targets = torch.from_numpy(z_s.copy()).requires_grad_(), torch.from_numpy(y)
    hard_label(student, targets, label_smoothing=0.3).backward()
    expected = F.softmax(torch.from_numpy(z_s), -1) - 0.7 * F.one_hot(targets, K).double() - 0.03
    np.testing.assert_allclose(student.grad, expected / N, atol=1e-15)


def test_the_binary_loss_equals_its_closed_form(framework):
    """Logits 0 and log 3 have probabilities 1/2 and 3/4; the targets are 1 and 0: log 2 + log 4."""
    value = binary_label(framework(np.array([[0.0, math.log(3)]])), framework(np.array([[1.0, 0.0]])))
    assert float(value) == pytest.approx(math.log(2) + math.log(4), rel=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_binary_loss_equals_that_of_pytorch_summed_over_classes(smoothing, framework):
    truth = torch.from_numpy(BINARY * (1 - smoothing) + smoothing / 2)
    expected = F.binary_cross_entropy_with_logits(torch.from_numpy(LOGITS[:, 0]), truth, reduction="sum") / 3
    value = binary_label(framework(LOGITS[:, 0]), framework(BINARY), label_smoothing=smoothing)
    assert float(value) == pytest.approx(float(expected), rel=1e-14)


def test_binary_labels_may_be_booleans(framework):
    from_numbers, from_booleans = (
        binary_label(framework(LOGITS[:, 0]), framework(targets)) for targets in (BINARY, BINARY == 1)
    )
    assert float(from_numbers) == float(from_booleans)


def test_targets_of_minus_100_do_not_count_in_the_binary_loss(framework):
    """A target of -100 adds nothing, and a sample with only such targets does not count."""
    targets = np.array([[1.0, -100.0], [-100.0, -100.0]])
    value = binary_label(framework(np.array([[0.0, 5.0], [7.0, 7.0]])), framework(targets))
    assert float(value) == pytest.approx(math.log(2), rel=1e-15)


@pytest.mark.parametrize("loss", [binary_label, squared_error])
def test_one_output_per_sample_is_not_broadcast_over_the_batch(loss, framework):
    logits, targets = np.array([0.5, -1.0, 2.0]), np.array([1.0, 0.0, 1.0])
    expected = float(loss(framework(logits[:, None]), framework(targets[:, None])))
    assert float(loss(framework(logits[:, None]), framework(targets))) == expected
    assert float(loss(framework(logits), framework(targets))) == expected


def test_the_squared_error_equals_its_closed_form(framework):
    """The squared errors 1 + 4 and 0 + 9 of two samples have the mean 7."""
    student, truth = np.array([[1.0, 2.0], [0.0, 3.0]]), np.zeros((2, 2))
    assert float(squared_error(framework(student), framework(truth))) == 7.0


def test_minus_100_is_a_valid_target_of_the_squared_error():
    assert float(squared_error(np.array([[-99.0]]), np.array([[-100.0]]))) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(LABEL_LOSSES))
def test_losses_on_labels_compute_with_32_bits(name, dtype):
    targets = torch.from_numpy(y) if name == "cross-entropy" else torch.ones(N, K)
    student = (30 * torch.from_numpy(z_s)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = LABEL_LOSSES[name](student, targets)
    value.backward()
    assert value.dtype == torch.float32
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(student.grad).all())


def test_label_losses_are_registered_by_name():
    names = {"cross-entropy": hard_label, "binary": binary_label, "squared-error": squared_error}
    assert {name: LABEL_LOSSES[name] for name in LABEL_LOSSES} == names
    with pytest.raises(UnknownNameError, match=r"There is no label loss 'cross_entropy'.*mean 'cross-entropy'"):
        LABEL_LOSSES["cross_entropy"]


@pytest.mark.parametrize("label", [K, -1])
def test_a_label_out_of_range_is_refused(label, framework):
    targets = y.copy()
    targets[3] = label
    with pytest.raises(DataError, match=rf"Sample 3 has the label {label}\. The model has 10 classes"):
        hard_label(framework(z_s), framework(targets))


def test_labels_that_are_not_integers_are_refused(framework):
    for targets, name in ((y + 0.5, "float64"), (y.astype(float), "float64"), (y == 1, "bool")):
        with pytest.raises(DataError, match=rf"The labels have type {name}\. Class numbers must be integers"):
            hard_label(framework(z_s), framework(targets))
    assert float(hard_label(framework(z_s), framework(y.astype(np.uint8)))) == float(hard_label(z_s, y))


@pytest.mark.parametrize(("dtype", "error"), [(np.int64, ShapeError), (np.float32, DataError)])
def test_the_error_for_one_hot_labels_says_how_to_convert_them(dtype, error, framework):
    with pytest.raises(error, match=r"If they are one-hot, give labels\.argmax\(-1\)"):
        hard_label(framework(z_s), framework(np.eye(K, dtype=dtype)[y]))


@pytest.mark.parametrize(
    ("loss", "values"), [(binary_label, (-1, 2, 255, math.nan)), (squared_error, (math.nan, math.inf))]
)
def test_unmasked_targets_outside_the_domain_of_a_loss_are_refused(loss, values, framework):
    mask = np.arange(N) != 2
    for value in values:
        targets = np.zeros((N, K))
        targets[2, 1] = value
        with pytest.raises(DataError, match=rf"Sample 2 has the target {value:g}\. The label loss"):
            loss(framework(z_s), framework(targets))
        assert float(loss(framework(z_s), framework(targets), mask=framework(mask))) > 0


def test_labels_that_are_all_ignored_are_refused(framework):
    with pytest.raises(DataError, match="All targets are masked"):
        hard_label(framework(z_s), framework(np.full(N, -100)))
    with pytest.raises(DataError, match="All targets are masked"):
        binary_label(framework(z_s), framework(np.full((N, K), -100.0)))


def test_labels_of_another_shape_are_refused(framework):
    with pytest.raises(ShapeError, match=r"The labels have shape \(8, 1\); the logits have shape \(8, 10\)"):
        hard_label(framework(z_s), framework(y[:, None]))
    for loss in (binary_label, squared_error):
        with pytest.raises(ShapeError, match=r"targets have shape \(8,\); the student's output has shape \(8, 10\)"):
            loss(framework(z_s), framework(np.zeros(N)))
        with pytest.raises(ShapeError, match=r"The mask has shape \(10,\); \(8,\) is needed"):
            loss(framework(z_s), framework(z_s), mask=framework(np.ones(K, bool)))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("loss", [hard_label, binary_label, squared_error])
def test_label_smoothing_out_of_range_is_refused(loss, fraction):
    with pytest.raises(UsageError, match=rf"`label_smoothing` is {fraction}; a number of at least 0 and below 1"):
        loss(z_s, y, label_smoothing=fraction)


def test_label_smoothing_of_a_squared_error_is_refused():
    with pytest.raises(UsageError, match=r"`label_smoothing` is 0\.1 with the label loss"):
        squared_error(z_s, z_s, label_smoothing=0.1)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 3)])
def test_fit_uses_integer_regression_targets_of_minus_100(shape):
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
