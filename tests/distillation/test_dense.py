"""Networks that say something of every pixel, cell or query are taught: segmentation, dense detectors, sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kirsch.distillation.distill import distill, fit
from kirsch.distillation.losses.detection import detection_response, detr
from kirsch.distillation.losses.labels import hard_label
from kirsch.distillation.losses.maps import channel_wise
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import DataError, ShapeError, UnknownNameError, UsageError
from kirsch.frameworks.data import ArrayData
from kirsch.frameworks.pytorch.inference.predict import logits_of
from kirsch.frameworks.training import Training, TrainingHooks

K, N = 3, 12
STILL = Training(epochs=1, learning_rate=1e-12, schedule="constant", weight_decay=0.0)
"""So slow that what is charged is that of the weights given."""


def learned(student, teacher, data, objective, training=STILL, **options):
    hooks = TrainingHooks(event=lambda event: None)
    options = {"hooks": hooks, "check_teacher": False, **options}
    return distill(student, teacher, data, objective=objective, training=training, **options)


# ------------------------------------------------------------------------------------------------ pixels


class Segmenter(nn.Module):
    """Scores of 6 × 5 pixels, behind maps of another width; as torchvision's do, a dict."""

    def __init__(self, width, classes=K):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        maps = self.body(x)
        return {"out": self.head(maps), "aux": maps}


def pixels(*, batch_size=N):
    """Class by brightness; some pixels have no label."""
    random = np.random.default_rng(0)
    labels = random.integers(0, K, (N, 6, 5))
    images = (labels[:, None] + 0.1 * random.standard_normal((N, 1, 6, 5))).astype(np.float64)
    labels[random.random(labels.shape) < 0.3] = -100
    return ArrayData(images, labels, batch_size)


@pytest.fixture
def segmenters():
    made = []
    for width in (4, 6):
        torch.manual_seed(width)
        made.append(Segmenter(width).double())
    return made


def test_segmentation_is_taught_by_channels_and_labels(segmenters):
    """Beside cross-entropy over the pixels that have a label."""
    student, teacher = segmenters
    data = pixels()
    found = learned(student, teacher, data, Objective.preset("cwd"))
    with torch.no_grad():
        mine, theirs = (model(torch.from_numpy(data.inputs))["out"] for model in segmenters)
    label = F.cross_entropy(mine, torch.from_numpy(data.targets))
    assert found.history[0]["parts"] == pytest.approx(
        {"label": float(label), "cwd": 5 * float(channel_wise(mine, theirs))}, rel=1e-6
    )


def test_soft_targets_of_pixels_count_those_with_a_label(segmenters):
    student, teacher = segmenters
    data = pixels()
    found = learned(student, teacher, data, Objective((Term("pixel-kd", 1.0, 2.0),), label_weight=0.0))
    with torch.no_grad():
        log_s, log_t = (
            (model(torch.from_numpy(data.inputs))["out"].movedim(1, -1) / 2).log_softmax(-1) for model in segmenters
        )
    known = torch.from_numpy(data.targets) != -100
    wanted = 4 * F.kl_div(log_s[known], log_t[known], log_target=True, reduction="batchmean")
    assert found.history[0]["parts"] == pytest.approx({"pixel-kd": float(wanted)}, rel=1e-6)


def test_accuracy_of_pixels_is_that_of_those_with_a_label(segmenters):
    student, teacher = segmenters
    data, told = pixels(), []
    hooks = TrainingHooks(event=told.append)
    options = {"validation": data, "check_teacher": True, "hooks": hooks}
    teacher = fit(teacher, data, training=Training(epochs=30, learning_rate=0.3)).model
    found = learned(student, teacher, data, Objective.preset("cwd"), **options)
    known = data.targets != -100
    with torch.no_grad():
        right = [
            (model(torch.from_numpy(data.inputs))["out"].argmax(1).numpy() == data.targets)[known].mean()
            for model in (student, teacher)
        ]
    assert found.history[0]["accuracy"] == pytest.approx(right[0])
    assert told[0] == {"event": "teacher", "accuracy": pytest.approx(right[1]), "classes": K}
    assert right[1] > 0.9  # brightness tells the class


def test_labels_of_pixels_out_of_range_are_refused(segmenters):
    data = pixels()
    data.targets[4, 2, 1] = 3
    with pytest.raises(DataError, match=r"Sample 4 has the label 3\. The model puts out 3 classes"):
        learned(*segmenters, data, Objective.preset("cwd"))
    with pytest.raises(DataError, match=r"The targets have shape \(12,\) .*one whole number a position"):
        learned(*segmenters, ArrayData(data.inputs, np.zeros(N, int)), Objective.preset("cwd"))


def test_cross_entropy_of_pixels_is_that_of_pytorch():
    scores, labels = torch.randn(2, K, 4, 5, dtype=torch.float64), torch.randint(0, K, (2, 4, 5))
    labels[0, :2] = -100
    for smoothing in (0.0, 0.2):
        wanted = F.cross_entropy(scores, labels, label_smoothing=smoothing)
        torch.testing.assert_close(hard_label(scores, labels, label_smoothing=smoothing), wanted)
        assert hard_label(scores.numpy(), labels.numpy(), label_smoothing=smoothing) == pytest.approx(float(wanted))


def test_features_of_a_segmenter_teach_through_an_adapter(segmenters):
    objective = Objective((Term("cwd", 10.0, student="output.aux"), Term("at", 10.0, student="body")))
    found = learned(*segmenters, pixels(batch_size=6), objective, Training(epochs=2, learning_rate=0.01))
    assert np.isfinite(found.history[-1]["loss"])


# ------------------------------------------------------------------------------------------------ detectors


class Queries(nn.Module):
    """Q queries with scores and boxes, under the names of DETR."""

    def __init__(self, queries, width, *, shape="pred_"):
        super().__init__()
        self.queries, self.shape = queries, shape
        self.body = nn.Linear(6, width)
        self.logits = nn.Linear(width, queries * (K + 1))
        self.boxes = nn.Linear(width, queries * 4)

    def forward(self, x):
        states = torch.relu(self.body(x))
        scores = self.logits(states).reshape(len(x), self.queries, K + 1)
        boxes = self.boxes(states).sigmoid().reshape(len(x), self.queries, 4)
        if self.shape == "tuple":
            return scores, boxes
        return {f"{self.shape}boxes": boxes, f"{self.shape}logits": scores}


def detector(queries, width, shape="pred_"):
    torch.manual_seed(width)
    return Queries(queries, width, shape=shape).double()


def scenes():
    return ArrayData(np.random.default_rng(1).standard_normal((N, 6)), None, batch_size=N)


def sides(models, data):
    with torch.no_grad():
        outs = [model(torch.from_numpy(data.inputs)) for model in models]
    return [{"scores": out["pred_logits"], "boxes": out["pred_boxes"]} for out in outs]


SET = {"scores": "logits", "boxes": "output.pred_boxes"}


def test_sets_are_matched_and_taught():
    """4 queries learn from 6, in whatever order."""
    models, data = (detector(4, 5), detector(6, 8)), scenes()
    objective = Objective((Term("detr", 1.0, student=SET),), label_weight=0.0)
    told = []
    found = learned(*models, data, objective, hooks=TrainingHooks(event=told.append))
    assert found.history[0]["parts"] == pytest.approx({"detr": float(detr(*sides(models, data)))}, rel=1e-6)
    (event,) = (event for event in told if event["event"] == "attached")
    assert event["pairs"][0]["student"] == SET
    assert event["pairs"][0]["student_shape"] == "scores 4 × 4, boxes 4 × 4"
    better = learned(*models, data, objective, Training(epochs=20, learning_rate=0.02))
    assert better.history[-1]["loss"] < 0.7 * better.history[0]["loss"]


def test_dense_heads_of_coins_are_taught():
    models, data = (detector(5, 5), detector(5, 8)), scenes()
    objective = Objective((Term("detection-response", 1.0, student=SET),), label_weight=0.0)
    found = learned(*models, data, objective)
    wanted = float(detection_response(*sides(models, data)))
    assert found.history[0]["parts"] == pytest.approx({"detection-response": wanted}, rel=1e-6)
    better = learned(*models, data, objective, Training(epochs=20, learning_rate=0.02))
    assert better.history[-1]["loss"] < 0.7 * better.history[0]["loss"]


def test_outputs_without_names_are_named_by_their_places():
    models, data = (detector(5, 5, "tuple"), detector(5, 8)), scenes()
    term = Term("detection-response", 1.0, student={"scores": "output.0", "boxes": "output.1"}, teacher=SET)
    found = learned(*models, data, Objective((term,), label_weight=0.0))
    wanted = learned(detector(5, 5), models[1], data, Objective((Term("detection-response", 1.0, student=SET),)))
    assert found.history[0]["parts"] == wanted.history[0]["parts"]


def test_coins_alone_are_taught_by_each_class():
    """A dense head without boxes; what is no object is a coin as well."""
    models, data = (detector(5, 5), detector(5, 8)), scenes()
    found = learned(*models, data, Objective((Term("binary-kd", 1.0, 1.0),), label_weight=0.0))
    mine, theirs = (side["scores"] for side in sides(models, data))
    coins = F.binary_cross_entropy_with_logits(mine, theirs.sigmoid(), reduction="none")
    least = F.binary_cross_entropy_with_logits(theirs, theirs.sigmoid(), reduction="none")
    assert found.history[0]["parts"] == pytest.approx({"binary-kd": float((coins - least).sum(-1).mean())}, rel=1e-6)


def test_cells_that_differ_in_number_and_outputs_that_are_not_there_are_refused():
    data = scenes()
    with pytest.raises(ShapeError, match=r"'detection-response' cannot compare `logits`, `output.pred_boxes`"):
        learned(detector(4, 5), detector(5, 8), data, Objective((Term("detection-response", 1.0, student=SET),)))
    other = {"scores": "logits", "boxes": "output.pred_box"}
    with pytest.raises(UnknownNameError, match=r"no output 'pred_box'\. .* Did you mean 'pred_boxes'\?"):
        learned(detector(4, 5), detector(5, 8), data, Objective((Term("detr", 1.0, student=other),)))


def test_scores_are_found_among_what_a_model_puts_out():
    first, second = torch.zeros(1), torch.ones(1)
    assert logits_of({"boxes": second, "pred_logits": first}) is first
    assert logits_of({"out": first, "aux": second}) is first
    assert logits_of({"aux_logits": second, "logits": first}) is first
    assert logits_of((first, second)) is first
    with pytest.raises(UsageError, match="The model returns a list without tensors, so there are no logits"):
        logits_of([])
