"""Capturing features changes neither the model nor its inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from hooks import assert_no_hooks
from kirsch.data.batches import ArrayData
from kirsch.distillation.term import Term
from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.pytorch.features.capture import FeatureCapture, dry_run
from kirsch.frameworks.pytorch.features.layers import expand, shapes
from kirsch.frameworks.pytorch.inference.predict import predict

N, D, K = 8, 4, 3
SAMPLES = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
LABELS = np.arange(N) % K


class InPlaceModel(nn.Module):
    """Model that records a copy of its inputs, and then halves the inputs in place if `when(model)` is true."""

    def __init__(self, *, when=lambda model: True):
        super().__init__()
        self.layers, self.when, self.seen = nn.Sequential(nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, K)), when, []

    def forward(self, inputs):
        self.seen.append(inputs.detach().clone())
        if self.when(self):
            inputs *= 0.5
        return self.layers(inputs)


@pytest.mark.parametrize("layers", [["0", "absent"], ["0/linear", "0", "absent"]])
def test_an_unknown_layer_leaves_no_hooks(layers):
    model = nn.Sequential(nn.Linear(D, K))
    with pytest.raises(UnknownNameError, match="There is no layer in Sequential named 'absent'"):
        FeatureCapture(model, layers)
    assert_no_hooks(model)


@pytest.mark.parametrize(
    "run",
    [
        lambda model, inputs: dry_run(model, ["logits", "layers.0"], inputs),
        lambda model, inputs: expand(model, "penultimate", inputs),
        shapes,
    ],
)
def test_inputs_are_copied_for_a_model_that_writes_into_them(run):
    inputs = torch.from_numpy(SAMPLES.copy())
    run(InPlaceModel(), inputs)
    np.testing.assert_array_equal(inputs, SAMPLES)


def test_predict_does_not_change_the_inputs():
    inputs, model = SAMPLES.copy(), InPlaceModel()
    outputs = predict(model, inputs)
    np.testing.assert_array_equal(inputs, SAMPLES)
    with torch.no_grad():
        expected = model.layers(torch.from_numpy(SAMPLES * 0.5))
    np.testing.assert_allclose(np.reshape(outputs, (N, K)), expected, rtol=1e-5)  # float32


@pytest.mark.parametrize("when", [lambda model: True, lambda model: model.training])
def test_student_and_teacher_get_the_same_unchanged_batch(when):
    student, teacher = InPlaceModel(when=when), InPlaceModel()
    batch = torch.from_numpy(SAMPLES.copy()), torch.from_numpy(LABELS)
    with kirsch.Distiller(student, teacher, kirsch.Objective.kd(), batch) as distiller:
        for mode in (True, False, True):
            distiller.train(mode)
            for _ in range(3):
                distiller(batch)
    for seen in student.seen:
        np.testing.assert_array_equal(seen, SAMPLES)
    np.testing.assert_array_equal(batch[0], SAMPLES)


def test_distill_does_not_change_the_data():
    inputs, validation_inputs = SAMPLES.copy(), SAMPLES.copy()
    kirsch.distill(
        InPlaceModel(),
        InPlaceModel(),
        ArrayData(inputs, LABELS, batch_size=N),
        objective=kirsch.Objective((Term("kd"), Term("fitnet", student_layer="layers.0"))),
        training=kirsch.Training(epochs=2),
        validation=(validation_inputs, LABELS),
        check_teacher=False,
    )
    np.testing.assert_array_equal(inputs, SAMPLES)
    np.testing.assert_array_equal(validation_inputs, SAMPLES)


def test_inputs_are_not_copied_after_the_first_run_if_the_model_does_not_write():
    inputs, seen = torch.from_numpy(SAMPLES), []
    model = nn.Sequential(nn.Linear(D, K))
    model.register_forward_pre_hook(lambda _module, args: seen.append(args[0] is inputs))
    capture = FeatureCapture(model, ["logits"])
    for _ in range(3):
        capture(inputs)
    assert seen == [False, True, True]


def test_a_model_that_writes_into_its_inputs_only_after_the_first_run_raises_an_error():
    inputs, late = torch.from_numpy(SAMPLES.copy()), []
    capture = FeatureCapture(InPlaceModel(when=lambda _model: bool(late)), ["logits"])
    capture(inputs)
    late.append(True)
    message = r"InPlaceModel writes into its inputs in this forward pass, unlike in earlier ones\. .* inputs\.clone\(\)"
    with pytest.raises(UsageError, match=message):
        capture(inputs)
