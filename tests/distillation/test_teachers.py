"""The outputs of several teachers are combined."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distillation.examples import image_data, trained
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.objective import Objective
from kirsch.distillation.teachers import combined_logits
from kirsch.distillation.term import Term
from kirsch.errors import UsageError
from kirsch.frameworks.training import TrainingHooks

K = 3


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, K)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("combine", ["probabilities", "logits", "confidence", "sum"])
def test_a_student_can_learn_from_several_teachers(combine):
    objective = Objective((Term("kd", 1.0, temperature=2.0),), combine_teachers=combine)
    events = []
    found = trained(Net(4), [Net(6), Net(5)], image_data(), objective, hooks=TrainingHooks(event=events.append))
    assert set(found.history[0]["terms"]) == {"label", "kd"}
    texts = [event["text"] for event in events if event["event"] == "warning"]
    assert any("geometric mean of their probabilities" in text for text in texts) == (combine == "logits")


TWO = torch.tensor([[0.0, 2.0], [-1.0, 1.0]]), torch.tensor([[3.0, -2.0], [1.0, 0.5]])
"""Logits of two teachers, (N, K)."""


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_binary_probabilities_of_teachers_are_averaged_for_each_label(temperature):
    found = combined_logits(TWO, "probabilities", temperature, "sigmoid")
    expected = sum((logits / temperature).sigmoid() for logits in TWO) / 2
    torch.testing.assert_close((found / temperature).sigmoid(), expected)


def test_the_option_confidence_weights_teachers_by_the_entropy_of_each_label():
    probabilities = [logits.sigmoid() for logits in TWO]
    entropy = [-(p * p.log() + (1 - p) * (1 - p).log()) for p in probabilities]
    weights = [(-e).exp() for e in entropy]
    expected = sum(w * p for w, p in zip(weights, probabilities, strict=True)) / sum(weights)
    torch.testing.assert_close(combined_logits(TWO, "confidence", 1.0, "sigmoid").sigmoid(), expected)


def test_real_valued_outputs_of_several_teachers_are_averaged():
    torch.testing.assert_close(combined_logits(TWO, "probabilities", 1.0, "identity"), sum(TWO) / 2)


def test_logits_of_each_pixel_are_combined_over_the_class_axis():
    maps = [logits[:, :, None, None].expand(2, 2, 3, 1) for logits in TWO]
    found = combined_logits(maps, "probabilities", 2.0, axis=1)
    torch.testing.assert_close(found[:, :, 0, 0], combined_logits(TWO, "probabilities", 2.0))


@pytest.mark.parametrize(
    ("loss", "combine"),  # real-valued outputs do not show how confident a teacher is
    [
        (loss, combine)
        for loss in ("kd", "binary-kd", "logit-l2")
        for combine in ("probabilities", "confidence", "logits", "sum")
        if (loss, combine) != ("logit-l2", "confidence")
    ],
)
def test_a_student_that_equals_both_of_its_teachers_has_a_loss_of_0(loss, combine):
    model = Net(4)
    objective = Objective((Term(loss, 1.0),), label_weight=0.0, combine_teachers=combine)
    batch = image_data().inputs[:4], image_data().targets[:4]
    warnings = []
    found = Distiller(model, [copy.deepcopy(model)] * 2, objective, batch, warn=warnings.append)
    with found.eval():
        assert float(found(batch).total.detach()) == pytest.approx(0.0, abs=1e-6)
    assert all("geometric mean of their probabilities" in text for text in warnings)
    assert bool(warnings) == (combine == "logits" and loss != "logit-l2")


def test_the_option_confidence_is_refused_for_losses_on_real_valued_outputs():
    objective = Objective((Term("logit-l2", 1.0),), combine_teachers="confidence")
    with pytest.raises(UsageError, match="compares real numbers, which do not show how confident"):
        trained(Net(4), [Net(6), Net(5)], image_data(), objective)


def test_a_teacher_that_no_term_uses_is_refused():
    with pytest.raises(UsageError, match=r"Teacher 1 \(of 2, counted from 0\) is not used by any term.*teacher=1"):
        trained(Net(4), [Net(6), Net(5)], image_data(), Objective((Term("at", 1.0, student_layer="conv"),)))
