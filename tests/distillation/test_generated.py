"""A student learns from generated inputs, and a resumed run generates the same inputs as an uninterrupted run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from data_sets import normal
from kirsch.data.batches import ArrayData
from kirsch.data.generated import GeneratedData
from kirsch.distillation.distill import distill
from kirsch.distillation.objective import Objective
from kirsch.errors import Interrupted
from kirsch.frameworks.model_generator import ModelGenerator
from kirsch.frameworks.training import Training, TrainingHooks

D, K = 6, 3
SOFT = Objective.kd(temperature=2.0, weight=1.0)


def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, K)).double()


class Generator(nn.Module):
    """A generator, like that of a GAN, whose outputs differ in training mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.layer, self.norm, self.drop = nn.Linear(2, D), nn.BatchNorm1d(D), nn.Dropout(0.5)

    def forward(self, noise):
        return self.drop(self.norm(self.layer(noise)))


def test_a_student_converges_to_its_teacher_on_generated_inputs():
    """On normal inputs a linear student has one minimum: the teacher, up to a shift of all classes."""
    teacher = linear(1)
    training = Training(epochs=20, learning_rate=1.0, weight_decay=0.0)
    found = distill(
        linear(2),
        teacher,
        GeneratedData(normal, 128, batch_size=32),
        objective=SOFT,
        training=training,
        check_teacher=False,
    ).model
    inputs = np.random.default_rng(0).standard_normal((50, D))
    probabilities, expected = (model(torch.from_numpy(inputs)).softmax(-1) for model in (found, teacher))
    torch.testing.assert_close(probabilities, expected, atol=0.02, rtol=0)  # after 20 epochs of gradient descent


def test_a_model_generates_inputs_in_inference_mode_and_does_not_change():
    model = Generator().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = GeneratedData(ModelGenerator(model, noise=(2,)), 8, batch_size=4)
    (first, _) = data.epoch(0, 0)
    noise = np.random.default_rng([0, 0, 0]).standard_normal((4, 2), dtype=np.float32)
    with torch.no_grad():
        expected = model.layer(torch.from_numpy(noise)) / (1 + 1e-5) ** 0.5
    np.testing.assert_allclose(first.inputs, expected.numpy(), rtol=1e-5)
    torch.manual_seed(3)
    found = distill(
        nn.Linear(D, K), nn.Linear(D, K), data, objective=SOFT, training=Training(epochs=2), check_teacher=False
    )
    assert len(found.history) == 2
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_gradient_flows_to_the_generator():
    layer = nn.Linear(2, D).double()

    def generate(count, generator):
        return layer(torch.from_numpy(generator.standard_normal((count, 2))))

    distill(
        linear(1),
        linear(2),
        GeneratedData(generate, 8, batch_size=4),
        objective=SOFT,
        training=Training(epochs=1),
        check_teacher=False,
    )
    assert layer.weight.grad is None


def test_a_generator_can_return_a_dict_of_inputs():
    data = GeneratedData(lambda count, generator: {"input": generator.standard_normal((count, D))}, 8, batch_size=4)
    torch.manual_seed(0)
    student, teacher = nn.Linear(D, K).double(), nn.Linear(D, K).double()
    found = distill(student, teacher, data, objective=SOFT, training=Training(epochs=1), check_teacher=False)
    assert len(found.history) == 1


@pytest.mark.parametrize("stop_at", [2, 4, 7])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_run(stop_at):
    data, training, calls, states = (
        GeneratedData(normal, 24, batch_size=8),
        Training(epochs=3, learning_rate=0.1),
        [],
        [],
    )

    def run(**hooks):
        quiet = TrainingHooks(event=lambda event: None, **hooks)
        return distill(linear(2), linear(1), data, objective=SOFT, training=training, hooks=quiet)

    def stop():
        calls.append(1)
        return Interrupted("stopped") if len(calls) == stop_at else None

    uninterrupted = run()
    with pytest.raises(Interrupted):
        run(stop=stop, save=states.append)
    resumed = run(resume=states[-1])
    assert torch.equal(uninterrupted.model[0].weight, resumed.model[0].weight)
    assert [record["loss"] for record in resumed.history] == [record["loss"] for record in uninterrupted.history]


def test_a_teacher_that_cannot_be_evaluated_without_labels_gives_a_warning():
    events = []
    hooks = TrainingHooks(event=events.append)
    data, training = GeneratedData(normal, 8), Training(epochs=1)
    distill(linear(2), linear(1), data, objective=SOFT, training=training, hooks=hooks)
    (warning,) = (event["text"] for event in events if event["event"] == "warning")
    assert "not evaluated" in warning
    events.clear()
    inputs = np.random.default_rng(0).standard_normal((40, D))
    validation = ArrayData(inputs, linear(1)(torch.from_numpy(inputs)).argmax(-1).numpy())
    distill(linear(2), linear(1), data, objective=SOFT, training=training, hooks=hooks, validation=validation)
    distill(linear(2), linear(1), data, objective=SOFT, training=training, hooks=hooks, check_teacher=False)
    assert [event for event in events if event["event"] == "warning"] == []
