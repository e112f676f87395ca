"""Watching a model leaves the model, and what it is given, as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.distillation.term import Term
from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.data import ArrayData
from kirsch.frameworks.pytorch.features.capture import Watch, dry_run
from kirsch.frameworks.pytorch.features.layers import expand, shapes
from kirsch.frameworks.pytorch.inference.predict import predict

N, D, K = 8, 4, 3
SAMPLES = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
LABELS = np.arange(N) % K


class Writer(nn.Module):
    """Halves what it is given in place, always or in training mode alone, and notes it before."""

    def __init__(self, *, when=lambda model: True):
        super().__init__()
        self.layers, self.when, self.seen = nn.Sequential(nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, K)), when, []

    def forward(self, inputs):
        self.seen.append(inputs.detach().clone())
        if self.when(self):
            inputs *= 0.5
        return self.layers(inputs)


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("layers", [["0", "absent"], ["0/linear", "0", "absent"]])
def test_a_site_that_the_model_lacks_leaves_no_hook(layers):
    model = nn.Sequential(nn.Linear(D, K))
    with pytest.raises(UnknownNameError, match="There is no layer in Sequential 'absent'"):
        Watch(model, layers)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "run",
    [
        lambda model, given: dry_run(model, ["logits", "layers.0"], given),
        lambda model, given: expand(model, "penultimate", given),
        shapes,
    ],
)
def test_a_model_that_writes_into_its_inputs_is_looked_at_on_a_copy(run):
    given = torch.from_numpy(SAMPLES.copy())
    run(Writer(), given)
    np.testing.assert_array_equal(given, SAMPLES)


def test_predicting_leaves_the_arrays_as_they_are():
    given, model = SAMPLES.copy(), Writer()
    found = predict(model, given)
    np.testing.assert_array_equal(given, SAMPLES)
    with torch.no_grad():
        wanted = model.layers(torch.from_numpy(SAMPLES * 0.5))
    np.testing.assert_allclose(np.reshape(found, (N, K)), wanted, rtol=1e-5)  # float32


@pytest.mark.parametrize("when", [lambda model: True, lambda model: model.training])
def test_student_and_teacher_are_given_the_same_and_the_batch_stays_as_it_is(when):
    student, teacher = Writer(when=when), Writer()
    batch = torch.from_numpy(SAMPLES.copy()), torch.from_numpy(LABELS)
    with kirsch.Distiller(student, teacher, kirsch.Objective.kd(), batch) as distiller:
        for mode in (True, False, True):
            distiller.train(mode)
            for _ in range(3):
                distiller(batch)
    for seen in student.seen:
        np.testing.assert_array_equal(seen, SAMPLES)
    np.testing.assert_array_equal(batch[0], SAMPLES)


def test_distilling_leaves_the_arrays_as_they_are():
    inputs, judged = SAMPLES.copy(), SAMPLES.copy()
    kirsch.distill(
        Writer(),
        Writer(),
        ArrayData(inputs, LABELS, N),
        objective=kirsch.Objective((Term("kd"), Term("fitnet", student="layers.0"))),
        training=kirsch.Training(epochs=2),
        validation=(judged, LABELS),
        check_teacher=False,
    )
    np.testing.assert_array_equal(inputs, SAMPLES)
    np.testing.assert_array_equal(judged, SAMPLES)


def test_a_model_that_does_not_write_is_given_the_very_batch_from_the_second_run_on():
    given, seen = torch.from_numpy(SAMPLES), []
    model = nn.Sequential(nn.Linear(D, K))
    model.register_forward_pre_hook(lambda _module, args: seen.append(args[0] is given))
    watch = Watch(model, ["logits"])
    for _ in range(3):
        watch(given)
    assert seen == [False, True, True]


def test_writing_that_begins_late_is_refused():
    given, late = torch.from_numpy(SAMPLES.copy()), []
    watch = Watch(Writer(when=lambda _model: bool(late)), ["logits"])
    watch(given)
    late.append(True)
    sentence = r"Writer writes into its inputs in this forward, and did not before\. .* inputs\.clone\(\)"
    with pytest.raises(UsageError, match=sentence):
        watch(given)
