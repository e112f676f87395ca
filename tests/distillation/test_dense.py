"""Distillation of models with an output for every pixel, cell or query."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kirsch.data.batches import ArrayData
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.losses.detection import detection_response, detr
from kirsch.distillation.losses.maps import channel_wise
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.pytorch.inference.predict import logits_of
from kirsch.frameworks.training import Training, TrainingHooks
from kirsch.tasks.label_losses import hard_label

K, N = 3, 12
NEGLIGIBLE_STEP = Training(epochs=1, learning_rate=1e-12, schedule="constant", weight_decay=0.0)
"""The learning rate is so low that the loss of every batch is that of the initial weights."""


def run_distill(student, teacher, data, objective, training=NEGLIGIBLE_STEP, **options):
    hooks = TrainingHooks(event=lambda event: None)
    options = {"hooks": hooks, "check_teacher": False, **options}
    return distill(student, teacher, data, objective=objective, training=training, **options)


# ------------------------------------------------------------------------------------------------ pixels


class Segmenter(nn.Module):
    """Segmentation model with 6 × 5 pixels that returns a dict, like the models of torchvision."""

    def __init__(self, width, classes=K):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        maps = self.body(x)
        return {"out": self.head(maps), "aux": maps}


def pixels(*, batch_size=N):
    """Return images whose brightness is the class; some pixels have no label."""
    random = np.random.default_rng(0)
    labels = random.integers(0, K, (N, 6, 5))
    images = (labels[:, None] + 0.1 * random.standard_normal((N, 1, 6, 5))).astype(np.float64)
    labels[random.random(labels.shape) < 0.3] = -100
    return ArrayData(images, labels, batch_size=batch_size)


@pytest.fixture
def segmenters():
    models = []
    for width in (4, 6):
        torch.manual_seed(width)
        models.append(Segmenter(width).double())
    return models


def test_a_segmentation_student_learns_from_channels_and_labels(segmenters):
    student, teacher = segmenters
    data = pixels()
    result = run_distill(student, teacher, data, Objective.preset("cwd"))
    with torch.no_grad():
        student_out, teacher_out = (model(torch.from_numpy(data.inputs))["out"] for model in segmenters)
    label = F.cross_entropy(student_out, torch.from_numpy(data.targets))
    assert result.history[0]["terms"] == pytest.approx(
        {"label": float(label), "cwd": 5 * float(channel_wise(student_out, teacher_out))}, rel=1e-6
    )


def test_the_loss_pixel_kd_leaves_out_pixels_without_a_label(segmenters):
    student, teacher = segmenters
    data = pixels()
    result = run_distill(student, teacher, data, Objective((Term("pixel-kd", 1.0, temperature=2.0),), label_weight=0.0))
    with torch.no_grad():
        log_s, log_t = (
            (model(torch.from_numpy(data.inputs))["out"].movedim(1, -1) / 2).log_softmax(-1) for model in segmenters
        )
    known = torch.from_numpy(data.targets) != -100
    expected = 4 * F.kl_div(log_s[known], log_t[known], log_target=True, reduction="batchmean")
    assert result.history[0]["terms"] == pytest.approx({"pixel-kd": float(expected)}, rel=1e-6)


def test_pixel_accuracy_leaves_out_pixels_without_a_label(segmenters):
    student, teacher = segmenters
    data, events = pixels(), []
    hooks = TrainingHooks(event=events.append)
    options = {"validation": data, "check_teacher": True, "hooks": hooks}
    teacher = fit(teacher, data, training=Training(epochs=30, learning_rate=0.3)).model
    result = run_distill(student, teacher, data, Objective.preset("cwd"), **options)
    known = data.targets != -100
    with torch.no_grad():
        accuracies = [
            (model(torch.from_numpy(data.inputs))["out"].argmax(1).numpy() == data.targets)[known].mean()
            for model in (student, teacher)
        ]
    assert result.history[0]["accuracy"] == pytest.approx(accuracies[0])
    (evaluated,) = (event for event in events if event["event"] == "teacher")
    assert evaluated == {"event": "teacher", "accuracy": pytest.approx(accuracies[1]), "classes": K}
    assert accuracies[1] > 0.9  # the brightness determines the class


def test_pixel_labels_out_of_range_are_refused(segmenters):
    data = pixels()
    data.targets[4, 2, 1] = 3
    with pytest.raises(DataError, match=r"Sample 4 has the label 3\. The model returns 3 classes"):
        run_distill(*segmenters, data, Objective.preset("cwd"))
    with pytest.raises(DataError, match=r"The targets have shape \(12,\) .*one integer per position"):
        run_distill(*segmenters, ArrayData(data.inputs, np.zeros(N, int)), Objective.preset("cwd"))


def test_cross_entropy_of_pixels_equals_that_of_pytorch():
    logits, labels = torch.randn(2, K, 4, 5, dtype=torch.float64), torch.randint(0, K, (2, 4, 5))
    labels[0, :2] = -100
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(hard_label(logits, labels, label_smoothing=smoothing), expected)
        assert hard_label(logits.numpy(), labels.numpy(), label_smoothing=smoothing) == pytest.approx(float(expected))


def test_features_of_a_segmentation_model_are_distilled_through_an_adapter(segmenters):
    objective = Objective((Term("cwd", 10.0, student_layer="output.aux"), Term("at", 10.0, student_layer="body")))
    result = run_distill(*segmenters, pixels(batch_size=6), objective, Training(epochs=2, learning_rate=0.01))
    assert np.isfinite(result.history[-1]["loss"])


# ------------------------------------------------------------------------------------------------ detectors


class Queries(nn.Module):
    """Detector with logits and boxes of Q queries, named as in DETR."""

    def __init__(self, queries, width, *, shape="pred_"):
        super().__init__()
        self.queries, self.shape = queries, shape
        self.body = nn.Linear(6, width)
        self.logits = nn.Linear(width, queries * (K + 1))
        self.boxes = nn.Linear(width, queries * 4)

    def forward(self, x):
        states = torch.relu(self.body(x))
        logits = self.logits(states).reshape(len(x), self.queries, K + 1)
        boxes = self.boxes(states).sigmoid().reshape(len(x), self.queries, 4)
        if self.shape == "tuple":
            return logits, boxes
        return {f"{self.shape}boxes": boxes, f"{self.shape}logits": logits}


def detector(queries, width, shape="pred_"):
    torch.manual_seed(width)
    return Queries(queries, width, shape=shape).double()


def scenes():
    return ArrayData(np.random.default_rng(1).standard_normal((N, 6)), None, batch_size=N)


def sides(models, data):
    with torch.no_grad():
        outs = [model(torch.from_numpy(data.inputs)) for model in models]
    return [{"logits": out["pred_logits"], "boxes": out["pred_boxes"]} for out in outs]


SET = {"logits": "logits", "boxes": "output.pred_boxes"}


def test_a_detr_student_with_fewer_queries_learns():
    models, data = (detector(4, 5), detector(6, 8)), scenes()
    objective = Objective((Term("detr", 1.0, student_layer=SET),), label_weight=0.0)
    events = []
    result = run_distill(*models, data, objective, hooks=TrainingHooks(event=events.append))
    assert result.history[0]["terms"] == pytest.approx({"detr": float(detr(*sides(models, data)))}, rel=1e-6)
    (event,) = (event for event in events if event["event"] == "attached")
    assert event["pairs"][0]["student"] == SET
    assert event["pairs"][0]["student_shape"] == "logits 4 × 4, boxes 4 × 4"
    better = run_distill(*models, data, objective, Training(epochs=20, learning_rate=0.02))
    assert better.history[-1]["loss"] < 0.7 * better.history[0]["loss"]


def test_a_detector_with_an_output_for_each_cell_learns_with_detection_response():
    models, data = (detector(5, 5), detector(5, 8)), scenes()
    objective = Objective((Term("detection-response", 1.0, student_layer=SET),), label_weight=0.0)
    result = run_distill(*models, data, objective)
    expected = float(detection_response(*sides(models, data)))
    assert result.history[0]["terms"] == pytest.approx({"detection-response": expected}, rel=1e-6)
    better = run_distill(*models, data, objective, Training(epochs=20, learning_rate=0.02))
    assert better.history[-1]["loss"] < 0.7 * better.history[0]["loss"]


def test_outputs_of_a_tuple_are_named_by_index():
    models, data = (detector(5, 5, "tuple"), detector(5, 8)), scenes()
    term = Term("detection-response", 1.0, student_layer={"logits": "output.0", "boxes": "output.1"}, teacher_layer=SET)
    result = run_distill(*models, data, Objective((term,), label_weight=0.0))
    expected = run_distill(
        detector(5, 5), models[1], data, Objective((Term("detection-response", 1.0, student_layer=SET),))
    )
    assert result.history[0]["terms"] == expected.history[0]["terms"]


def test_binary_kd_applies_to_every_class_of_a_dense_head():
    models, data = (detector(5, 5), detector(5, 8)), scenes()
    result = run_distill(*models, data, Objective((Term("binary-kd", 1.0, temperature=1.0),), label_weight=0.0))
    student_out, teacher_out = (side["logits"] for side in sides(models, data))
    cross_entropy = F.binary_cross_entropy_with_logits(student_out, teacher_out.sigmoid(), reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher_out, teacher_out.sigmoid(), reduction="none")
    assert result.history[0]["terms"] == pytest.approx(
        {"binary-kd": float((cross_entropy - entropy).sum(-1).mean())}, rel=1e-6
    )


def test_unequal_numbers_of_cells_and_unknown_outputs_are_refused():
    data = scenes()
    with pytest.raises(ShapeError, match=r"'detection-response' cannot compare `logits`, `output.pred_boxes`"):
        run_distill(
            detector(4, 5), detector(5, 8), data, Objective((Term("detection-response", 1.0, student_layer=SET),))
        )
    other = {"logits": "logits", "boxes": "output.pred_box"}
    with pytest.raises(UnknownNameError, match=r"no output 'pred_box'\. .* Did you mean 'pred_boxes'\?"):
        run_distill(detector(4, 5), detector(5, 8), data, Objective((Term("detr", 1.0, student_layer=other),)))


def test_logits_are_found_among_the_outputs_of_a_model():
    first, second = torch.zeros(1), torch.ones(1)
    assert logits_of({"boxes": second, "pred_logits": first}) is first
    assert logits_of({"out": first, "aux": second}) is first
    assert logits_of({"aux_logits": second, "logits": first}) is first
    assert logits_of((first, second)) is first
    with pytest.raises(UsageError, match="The model returns a list without tensors, so there are no logits"):
        logits_of([])
