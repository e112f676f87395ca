"""A student learns from generated inputs, and a run that is interrupted sees the same ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.batches import ArrayData
from kirsch.data.generated import GeneratedData
from kirsch.distillation.distill import distill
from kirsch.distillation.objective import Objective
from kirsch.errors import Interrupted
from kirsch.frameworks.model_generator import ModelGenerator
from kirsch.frameworks.training import Training, TrainingHooks

D, K = 6, 3
SOFT = Objective.kd(2.0, 1.0)


def normal(count, generator):
    return generator.standard_normal((count, D))


def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, K)).double()


class Painter(nn.Module):
    """A generator as of a GAN: noise to inputs, and other numbers in training mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.layer, self.norm, self.drop = nn.Linear(2, D), nn.BatchNorm1d(D), nn.Dropout(0.5)

    def forward(self, noise):
        return self.drop(self.norm(self.layer(noise)))


def test_a_student_learns_its_teacher_without_any_data():
    """On normal inputs a linear student has one minimum, the teacher up to a shift of all classes."""
    teacher = linear(1)
    training = Training(epochs=20, learning_rate=1.0, weight_decay=0.0)
    found = distill(
        linear(2), teacher, GeneratedData(normal, 128, 32), objective=SOFT, training=training, check_teacher=False
    ).model
    inputs = np.random.default_rng(0).standard_normal((50, D))
    learned, wanted = (model(torch.from_numpy(inputs)).softmax(-1) for model in (found, teacher))
    torch.testing.assert_close(learned, wanted, atol=0.02, rtol=0)  # gradient descent ends where it is stopped


def test_a_model_makes_the_inputs_in_inference_mode_and_stays_as_it_is():
    painter = Painter().train()
    before = {name: value.clone() for name, value in painter.state_dict().items()}
    data = GeneratedData(ModelGenerator(painter, noise=(2,)), 8, 4)
    (first, _) = data.epoch(0, 0)
    noise = np.random.default_rng([0, 0, 0]).standard_normal((4, 2), dtype=np.float32)
    with torch.no_grad():
        wanted = painter.layer(torch.from_numpy(noise)) / (1 + 1e-5) ** 0.5
    np.testing.assert_allclose(first.inputs, wanted.numpy(), rtol=1e-5)
    torch.manual_seed(3)
    found = distill(
        nn.Linear(D, K), nn.Linear(D, K), data, objective=SOFT, training=Training(epochs=2), check_teacher=False
    )
    assert len(found.history) == 2
    assert painter.training
    assert all(torch.equal(before[name], value) for name, value in painter.state_dict().items())
    assert all(parameter.grad is None for parameter in painter.parameters())


def test_no_gradient_reaches_into_what_made_the_inputs():
    layer = nn.Linear(2, D).double()

    def painted(count, generator):
        return layer(torch.from_numpy(generator.standard_normal((count, 2))))

    distill(
        linear(1),
        linear(2),
        GeneratedData(painted, 8, 4),
        objective=SOFT,
        training=Training(epochs=1),
        check_teacher=False,
    )
    assert layer.weight.grad is None


def test_keyword_inputs_are_made_too():
    data = GeneratedData(lambda count, generator: {"input": generator.standard_normal((count, D))}, 8, 4)
    torch.manual_seed(0)
    student, teacher = nn.Linear(D, K).double(), nn.Linear(D, K).double()
    found = distill(student, teacher, data, objective=SOFT, training=Training(epochs=1), check_teacher=False)
    assert len(found.history) == 1


@pytest.mark.parametrize("stop_at", [2, 4, 7])
def test_a_run_that_is_cut_ends_in_the_same_bits(stop_at):
    data, training, asked, states = GeneratedData(normal, 24, 8), Training(epochs=3, learning_rate=0.1), [], []

    def run(**hooks):
        quiet = TrainingHooks(event=lambda event: None, **hooks)
        return distill(linear(2), linear(1), data, objective=SOFT, training=training, hooks=quiet)

    def stop():
        asked.append(1)
        return Interrupted("enough") if len(asked) == stop_at else None

    whole = run()
    with pytest.raises(Interrupted):
        run(stop=stop, save=states.append)
    rest = run(resume=states[-1])
    assert torch.equal(whole.model[0].weight, rest.model[0].weight)
    assert [record["loss"] for record in rest.history] == [record["loss"] for record in whole.history]


def test_a_teacher_that_no_label_judges_is_doubted_aloud():
    told = []
    hooks = TrainingHooks(event=told.append)
    data, training = GeneratedData(normal, 8), Training(epochs=1)
    distill(linear(2), linear(1), data, objective=SOFT, training=training, hooks=hooks)
    (doubt,) = (event["text"] for event in told if event["event"] == "warning")
    assert "not evaluated" in doubt
    told.clear()
    inputs = np.random.default_rng(0).standard_normal((40, D))
    judged = ArrayData(inputs, linear(1)(torch.from_numpy(inputs)).argmax(-1).numpy())
    distill(linear(2), linear(1), data, objective=SOFT, training=training, hooks=hooks, validation=judged)
    distill(linear(2), linear(1), data, objective=SOFT, training=training, hooks=hooks, check_teacher=False)
    assert [event for event in told if event["event"] == "warning"] == []
