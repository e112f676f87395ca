"""What a student learns from a store is what the live teacher says of the same looks, or an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import TopK, build
from kirsch.frameworks.data import ArrayData

N, K = 40, 5
INPUTS = np.random.default_rng(0).standard_normal((N, 6)).astype(np.float32)
LABELS = np.arange(N) % K
SHORT = kirsch.Training(epochs=1)


def net(classes=K, seed=0, wide=6):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(wide, classes)


def data(augment=None, targets=LABELS, **options):
    return ArrayData(INPUTS, targets, 16, augment, **options)


def learned(student, teacher, given, temperature=1.0, **options):
    options = {"objective": Objective.kd(temperature), "check_teacher": False, "training": SHORT} | options
    return kirsch.distill(student, teacher, given, **options)


# ------------------------------------------------------------------------------------------------ many classes


@pytest.mark.parametrize("classes", [256, 257, 65_536, 65_537])
def test_a_store_of_many_classes_teaches_what_its_teacher_does(tmp_path, classes):
    """Class numbers are kept in as few bytes as they need, which PyTorch hardly knows."""
    teacher, student = net(classes), net(classes, 1)
    store = build(tmp_path / "store", teacher, data(), keep=TopK(4), temperature=2.0)
    largest = Objective((kirsch.Term("top-k", 1.0, 2.0, options={"k": 4}),), label_weight=0.0)
    stored, live = (learned(student, source, data(), objective=largest).history[0] for source in (store, teacher))
    assert stored["loss"] == pytest.approx(live["loss"], rel=2e-3)


class Writer(nn.Module):
    """A language model without a memory."""

    def __init__(self, words, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding, self.head = nn.Embedding(words, 4), nn.Linear(4, words)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))


@pytest.mark.parametrize("masked", [False, True])
def test_a_store_of_a_language_model_teaches_one(tmp_path, masked):
    words = np.random.default_rng(1).integers(0, 300, (8, 6))
    labels = words.copy()
    labels[:, 4:] = -100 if masked else labels[:, 4:]
    given = ArrayData({"input_ids": words}, labels, 4)
    teacher = Writer(300)
    store = build(tmp_path / "store", teacher, given, keep=TopK(300))
    objective = Objective((kirsch.Term("kd", 1.0, 1.0),), label_weight=0.0, causal=True)
    stored, live = (
        learned(Writer(300, 1), source, given, objective=objective).history[0] for source in (store, teacher)
    )
    assert stored["loss"] == pytest.approx(live["loss"], rel=2e-3)
