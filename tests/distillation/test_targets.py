"""Targets that a label loss does not take are refused, with a fix that follows from their values and shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.losses import hard_label
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import DataError, KirschError, ShapeError
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.tasks.label_losses import binary_label, squared_error

N, D, K = 40, 4, 3
ONCE = Training(epochs=1, learning_rate=0.05, schedule="constant")
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((N, D))
CLASSES = np.arange(N) % K
MULTI_LABEL = (RANDOM.random((N, K)) < 0.4).astype(np.float64)
BINARY, REGRESSION = Objective(label_loss="binary"), Objective(label_loss="squared-error")


def net(outputs=K, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, outputs)).double()


def flattened(seed=0):
    return nn.Sequential(net(1, seed), nn.Flatten(0))


def pixels(classes=K, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, classes, 1)).double()


def in_memory_and_batches(inputs, targets):
    """Return the samples as `ArrayData`, and as batches of which only the last has invalid targets."""
    last = slice(N // 2, None)
    valid = CLASSES if targets.ndim == 1 and targets.dtype.kind != "f" else np.clip(np.nan_to_num(targets), 0, 1)
    return [
        ArrayData(inputs, targets, batch_size=8),
        [(inputs[: N // 2], valid[: N // 2]), (inputs[last], targets[last])],
    ]


# ------------------------------------------------------------------------------------------------ binary


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda y: 2 * y - 1,
            r"has the target -1; .* values -1 to 1\. .* The targets are -1 and 1: give \(targets \+ 1\) / 2",
        ),
        (lambda y: y + 1, r"has the target 2; .* The targets are 1 and 2: give targets - 1"),
        (lambda y: 255 * y, r"has the target 255; .* The targets are 0 and 255: give targets / 255"),
        (lambda y: np.where(y > 0, np.nan, y), r"has the target nan; .* Give -100 where a label is missing"),
        (lambda y: 100 * y, r"has the target 100; .* from 0 \(no\) to 1 \(yes\)"),
        (lambda y: (2 * y - 1).astype(np.int8), r"has the target -1; the targets are int8"),
    ],
    ids=["-1 and 1", "1 and 2", "0 and 255", "nan", "percent", "int8"],
)
def test_binary_targets_that_are_not_from_0_to_1_are_refused(change, sentence):
    for data in in_memory_and_batches(X, change(MULTI_LABEL)):
        with pytest.raises(DataError, match=sentence):
            fit(net(), data, objective=BINARY, training=ONCE)
    with pytest.raises(DataError, match=sentence):
        Distiller(net(), None, BINARY, (X, change(MULTI_LABEL)))
    objective = Objective((Term("binary-kd", 1.0),), label_loss="binary")
    with pytest.raises(DataError, match=sentence):
        distill(
            net(),
            net(seed=1),
            ArrayData(X, change(MULTI_LABEL)),
            objective=objective,
            training=ONCE,
            check_teacher=False,
        )


def test_binary_targets_can_be_fractions_booleans_integers_and_missing():
    for targets in (
        0.9 * MULTI_LABEL + 0.05,
        MULTI_LABEL > 0,
        MULTI_LABEL.astype(np.uint8),
        np.where(CLASSES[:, None] == 0, -100, MULTI_LABEL),
    ):
        assert len(fit(net(), ArrayData(X, targets), objective=BINARY, training=ONCE).history) == 1
    for targets in (MULTI_LABEL[:, 0], MULTI_LABEL[:, :1], MULTI_LABEL[:, 0].astype(np.int64)):
        assert len(fit(net(1), ArrayData(X, targets), objective=BINARY, training=ONCE).history) == 1
        assert len(fit(flattened(), ArrayData(X, targets.reshape(-1)), objective=BINARY, training=ONCE).history) == 1


def test_class_numbers_are_refused_by_the_binary_loss():
    with pytest.raises(DataError, match=r'For class numbers take label_loss="cross-entropy"'):
        fit(net(), ArrayData(X, CLASSES), objective=BINARY, training=ONCE)


def test_a_distiller_refuses_a_later_batch_with_invalid_targets():
    distiller = Distiller(net(), None, BINARY, (X, MULTI_LABEL))
    distiller((X, MULTI_LABEL))
    with pytest.raises(DataError, match="has the target -1"):
        distiller((X, 2 * MULTI_LABEL - 1))


# ------------------------------------------------------------------------------------------------ regression


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_regression_targets_that_are_not_finite_are_refused(value):
    targets = RANDOM.standard_normal((N, 2))
    targets[35, 1] = value
    later = [(X[:20], targets[:20]), (X[20:], targets[20:])]
    for data, sample in ((ArrayData(X, targets), 35), (later, 15)):
        with pytest.raises(DataError, match=rf"The target of sample {sample} is NaN or infinity"):
            fit(net(2), data, objective=REGRESSION, training=ONCE)


def test_regression_targets_of_another_shape_are_refused():
    with pytest.raises(DataError, match=r"one number for each output, here of shape \(3,\) per sample"):
        fit(net(), ArrayData(X, X[:, :2]), objective=REGRESSION, training=ONCE)
    with pytest.raises(DataError, match=r'For class numbers take label_loss="cross-entropy"'):
        fit(net(), ArrayData(X, CLASSES), objective=REGRESSION, training=ONCE)


# ------------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.uint64])
def test_class_numbers_of_any_integer_type_give_the_same_weights(kind):
    expected = fit(net(), ArrayData(X, CLASSES, batch_size=8), training=ONCE).model[0].weight
    batches = [(X[i : i + 8], CLASSES[i : i + 8]) for i in range(0, N, 8)]
    narrow = fit(net(), ArrayData(X, CLASSES.astype(kind), batch_size=8), training=ONCE).model[0].weight
    assert torch.equal(narrow, expected)
    narrow_batches = [(x, y.astype(kind)) for x, y in batches]
    first, second = (fit(net(), data, training=ONCE).model[0].weight for data in (narrow_batches, batches))
    assert torch.equal(first, second)


def test_class_156_in_8_bits_is_not_the_ignored_label():
    """156 as uint8 has the same bits as -100, the ignored label, as int8."""
    labels = np.full(N, 156, np.uint8)
    model = net(200)
    found = fit(model, ArrayData(X, labels, batch_size=N), training=Training(epochs=1, learning_rate=1e-9)).history[0][
        "loss"
    ]
    with torch.no_grad():
        expected = hard_label(model(torch.from_numpy(X)), torch.from_numpy(labels.astype(np.int64)))
    assert found == pytest.approx(float(expected))


def test_a_type_that_cannot_hold_all_classes_is_refused():
    with pytest.raises(
        DataError, match=r"The targets have the type int8, which holds numbers up to 127; the model returns 200 classes"
    ):
        fit(net(200), ArrayData(X, np.full(N, 3, np.int8)), training=ONCE)


MASKS, IMAGES = RANDOM.integers(0, K, (N, 4, 5)), RANDOM.standard_normal((N, 1, 4, 5))


@pytest.mark.parametrize(
    ("targets", "classes", "sentence"),
    [
        (np.where(MASKS == 2, 255, MASKS), K, r"has the label 255\. .* give the objective ignore_index=255"),
        (255 * (MASKS > 0), 2, r"has the label 255\. .* masks of 0 and 255: give \(targets == 255\)"),
        (MASKS + 1, K, r"The labels go from 1 to 3: give targets - 1"),
        (MASKS[:, None], K, r"\(40, 1, 4, 5\) .* Remove the axis of length 1: targets\[:, 0\], as int64"),
        (MASKS[..., None], K, r"\(40, 4, 5, 1\) .* Remove the axis of length 1: targets\[\.\.\., 0\], as int64"),
        (np.moveaxis(np.eye(K)[MASKS], -1, 1), K, r"The targets are one-hot: give targets\.argmax\(1\)"),
        (MASKS[:, :2, :2], K, r"The labels are 2×2 per sample and the logits 4×5"),
        (CLASSES, K, "labels of whole samples, and the model returns a prediction for each pixel"),
        (IMAGES, K, r'label_loss="squared-error".* Term\("fitnet", student_layer="logits"\)'),
        (MASKS.astype(np.float32), K, "integers stored as floats"),
    ],
    ids=["255", "0 and 255", "from 1", "axis", "last axis", "one-hot", "size", "samples", "images", "floats"],
)
def test_invalid_masks_are_refused_with_a_fix(targets, classes, sentence):
    with pytest.raises(DataError, match=sentence):
        fit(pixels(classes), ArrayData(IMAGES, targets), training=ONCE)


def test_pixels_of_the_ignored_label_do_not_count():
    void = np.where(MASKS == 2, 255, MASKS).astype(np.uint8)
    expected = fit(pixels(), ArrayData(IMAGES, np.where(MASKS == 2, -100, MASKS)), training=ONCE).history[0]["loss"]
    found = fit(pixels(), ArrayData(IMAGES, void), objective=Objective(ignore_index=255), training=ONCE)
    assert found.history[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_batches_of_sequences_and_images_can_differ_in_size():
    tokens = RANDOM.integers(0, 7, (8, 5))
    language = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    assert len(fit(language, [(tokens, tokens), (tokens[:, :3], tokens[:, :3])], training=ONCE).history) == 1
    sizes = [(IMAGES, MASKS), (IMAGES[:, :, :2], MASKS[:, :2])]
    assert len(fit(pixels(), sizes, training=ONCE).history) == 1
    with pytest.raises(DataError, match="has the label 7"):
        fit(language, [(tokens, tokens), (tokens[:, :3], 0 * tokens[:, :3] + 7)], training=ONCE)


@pytest.mark.parametrize(
    ("model", "targets", "sentence"),
    [
        (
            net(1),
            MULTI_LABEL[:, 0].astype(int),
            r'For binary labels take label_loss="binary", and the term "binary-kd"',
        ),
        (net(1), np.zeros(N, int), 'label_loss="binary"'),
        (net(1), MULTI_LABEL[:, :1], 'label_loss="binary"'),
        (net(1), 2 * MULTI_LABEL[:, 0] - 1, r'give \(targets \+ 1\) / 2, and take label_loss="binary"'),
        (net(1), X[:, :1], r'label_loss="squared-error".* Term\("fitnet", student_layer="logits"\)'),
        (net(1), X[:, 0], 'label_loss="squared-error"'),
        (pixels(1), MASKS > 0, r'take label_loss="binary", and Term\("fitnet", student_layer="logits"\)'),
        (pixels(1), 255 * (MASKS > 0)[:, None], 'give targets / 255, and take label_loss="binary"'),
    ],
)
def test_a_single_logit_is_refused_by_the_cross_entropy_with_a_fix(model, targets, sentence):
    inputs = X if targets.ndim < 3 else IMAGES
    with pytest.raises(DataError, match=rf"The model returns one logit for each .*{sentence}"):
        fit(model, ArrayData(inputs, targets), training=ONCE)


def test_labels_of_minus_one_and_one_are_refused_with_a_fix():
    with pytest.raises(DataError, match=r"The targets are -1 and 1: give \(targets \+ 1\) // 2"):
        fit(net(2), ArrayData(X, 2 * (CLASSES > 0) - 1), training=ONCE)


# ------------------------------------------------------------------------------------------------ regression of pixels


def test_losses_of_pixels_are_summed_over_channels_and_averaged_over_pixels():
    """The last axis is the width of the images, and not the classes."""
    outputs, numbers = (torch.from_numpy(RANDOM.standard_normal((2, 3, 4, 5))) for _ in range(2))
    assert float(squared_error(outputs, numbers)) == pytest.approx(float(((outputs - numbers) ** 2).sum(1).mean()))
    labels = (numbers > 0).double()
    expected = nn.functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none").sum(1).mean()
    assert float(binary_label(outputs, labels)) == pytest.approx(float(expected))
    single = nn.functional.binary_cross_entropy_with_logits(outputs[:, :1], labels[:, :1])
    assert float(binary_label(outputs[:, :1], labels[:, 0])) == pytest.approx(float(single))


def test_the_fix_for_a_regression_of_pixels_works():
    images = RANDOM.standard_normal((N, 2, 4, 5))
    data = ArrayData(IMAGES, images)
    for term in ("kd", "binary-kd"):
        with pytest.raises(ShapeError, match=r'"fitnet", student_layer="logits"') as caught:
            distill(
                pixels(2), pixels(2, 1), data, objective=Objective((Term(term),), label_weight=0.0), check_teacher=False
            )
        assert "pixel-kd" in str(caught.value)
    objective = Objective((Term("fitnet", 1.0, student_layer="logits"),), label_weight=1.0, label_loss="squared-error")
    hooks = TrainingHooks(event=lambda event: None)
    found = distill(pixels(2), pixels(2, 1), data, objective=objective, training=ONCE, check_teacher=False, hooks=hooks)
    assert set(found.history[0]["terms"]) == {"label", "fitnet"}


@pytest.mark.parametrize("objective", [Objective(), BINARY, REGRESSION], ids=["classes", "binary", "regression"])
def test_strings_and_objects_are_refused_as_targets(objective):
    for targets in (np.array(["a"] * N), np.array([None] * N)):
        with pytest.raises(KirschError, match=r"type (<U1|object)"):
            fit(net(), ArrayData(X, targets), objective=objective, training=ONCE)


# ------------------------------------------------------------------------------------------------ unused targets


@pytest.mark.parametrize(
    "targets",
    [RANDOM.random((N, 1, 3, 3)), np.arange(N)[:, None], np.arange(N), RANDOM.random((N, 2))],
    ids=["images", "column", "classes", "rows"],
)
@pytest.mark.parametrize("loader", [False, True])
def test_targets_that_no_term_uses_are_not_checked(targets, loader):
    x = RANDOM.random((N, 1, 3, 3))
    data = [(x[i : i + 8], targets[i : i + 8]) for i in range(0, N, 8)]
    objective = Objective((Term("fitnet", student_layer="logits"),), label_weight=0.0)
    with pytest.warns(UserWarning, match="The teacher was not evaluated"):
        found = distill(
            pixels(1),
            pixels(1, 1),
            data if loader else ArrayData(x, targets, batch_size=8),
            objective=objective,
            training=ONCE,
        )
    assert set(found.history[0]["terms"]) == {"fitnet"}


def test_labels_that_mask_pixels_are_checked_without_a_label_loss():
    x, targets = RANDOM.random((N, 1, 3, 3)), np.zeros((N, 2), int)
    objective = Objective((Term("pixel-kd", 1.0, temperature=1.0),), label_weight=0.0)
    with pytest.raises(DataError, match=r"The targets have shape \(8, 2\)"):
        distill(pixels(), pixels(seed=1), ArrayData(x, targets, batch_size=8), objective=objective, training=ONCE)
