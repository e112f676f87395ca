"""Learning rates, weight decay and gradient clipping in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kirsch.data.batches import ArrayData
from kirsch.errors import UsageError
from kirsch.frameworks.pytorch.training.optimizer import learning_rate
from kirsch.frameworks.training import Training
from training_runs import (
    D,
    K,
    N,
    batches,
    network,
    plain_linear,
    trained,
)


def rates(training, length=None):
    """Return the learning rate at each of `length` batches of each epoch, or at the start of each epoch."""
    return [learning_rate(training, step / (length or 1)) for step in range(training.epochs * (length or 1))]


def test_the_cosine_schedule_equals_its_closed_form():
    cosine = math.sqrt(3) / 2  # cos 30°
    expected = [0.8, 0.4 * (1 + cosine), 0.6, 0.4, 0.2, 0.4 * (1 - cosine)]
    assert rates(Training(epochs=6, learning_rate=0.8, schedule="cosine")) == pytest.approx(expected, rel=1e-12)
    # The epoch exceeds `epochs` if the data returns more batches than its `len`. The rate then stays 0.
    for epoch in (6, 6.5, 9):
        assert learning_rate(Training(epochs=6, schedule="cosine"), epoch) == pytest.approx(0, abs=1e-15)


def test_the_multistep_schedule_divides_by_ten_at_its_milestones():
    training = Training(epochs=8, learning_rate=1.0, schedule="multistep", milestones=(0.5, 0.75))
    assert rates(training) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_milestones_are_fractions_of_the_time_after_the_warmup():
    training = Training(epochs=10, learning_rate=1.0, schedule="multistep", milestones=(0.5,), warmup_epochs=2)
    assert rates(training)[2:] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1])


def test_the_constant_schedule_is_constant():
    assert rates(Training(epochs=5, learning_rate=0.3, schedule="constant")) == [0.3] * 5


@pytest.mark.parametrize("schedule", ["cosine", "multistep", "constant"])
def test_the_warmup_is_linear(schedule):
    by_batch = rates(Training(epochs=6, learning_rate=0.4, schedule=schedule, warmup_epochs=2), length=2)
    # A thousandth of an epoch is added, so that the rate of the first step is not 0.
    assert by_batch[:4] == pytest.approx([0.4 * (epoch + 1e-3) / 2 for epoch in (0, 0.5, 1, 1.5)], rel=1e-12)
    assert by_batch[4] == 0.4


def test_a_warmup_shorter_than_a_step_does_not_exceed_the_peak():
    training = Training(epochs=1, learning_rate=0.4, warmup_epochs=1e-3)
    assert [learning_rate(training, epoch) for epoch in (0, 5e-4, 9e-4)] == pytest.approx([0.4] * 3)


def test_each_optimizer_step_uses_the_learning_rate_at_its_time():
    """For a gradient of one, SGD changes the weight by the learning rate times 1 + 0.9 · velocity (Nesterov)."""
    model = nn.Linear(1, 1, bias=False)
    seen = []

    def slope_one(model, inputs, targets):
        seen.append(float(model.weight.detach()))
        return model.weight.sum(), {"slope": model.weight.sum()}

    training = Training(epochs=2, learning_rate=0.1, weight_decay=0.0, warmup_epochs=0.5)
    data = ArrayData(np.zeros((4, 1), np.float32), np.zeros(4, int), batch_size=2)
    found = trained(data, training=training, model=model, loss=slope_one)
    seen.append(float(found.model.weight.detach()))
    velocity, moves = 0.0, []
    for epoch in (0.0, 0.5, 1.0, 1.5):
        velocity = 0.9 * velocity + 1
        moves.append(-learning_rate(training, epoch) * (1 + 0.9 * velocity))
    np.testing.assert_allclose(np.diff(seen), moves, rtol=1e-5, atol=1e-7)  # float32
    assert [record["learning_rate"] for record in found.history] == [learning_rate(training, e) for e in (0.5, 1.5)]


@pytest.mark.filterwarnings("ignore:The term 'flat' is 0 on the first batch")
@pytest.mark.parametrize(("optimizer", "gain"), [("sgd", 1.9), ("adamw", 1.0)])
def test_weight_decay_applies_to_weights_and_not_to_biases_and_scales(optimizer, gain):
    """For a gradient of zero, a step subtracts lr · decay · w, for SGD times 1 + 0.9 (Nesterov)."""
    model = network()
    training = Training(epochs=1, learning_rate=0.1, optimizer=optimizer, weight_decay=0.5, schedule="constant")

    def flat(model, inputs, targets):
        loss = sum((p * 0).sum() for p in model.parameters())
        return loss, {"flat": loss}

    found = trained(batches(N), training=training, model=model, loss=flat).model
    for (name, before), after in zip(model.named_parameters(), found.parameters(), strict=True):
        expected = before * (1 - 0.1 * 0.5 * gain) if before.dim() > 1 else before
        np.testing.assert_allclose(after.detach(), expected.detach(), rtol=1e-6, err_msg=name)


def test_the_first_step_of_adamw_changes_each_weight_by_the_learning_rate():
    """In the first step the ratio of the moments, g / √(g²), is the sign of the gradient."""
    model = plain_linear()
    training = Training(epochs=1, learning_rate=0.01, optimizer="adamw", weight_decay=0.0, schedule="constant")
    found = trained(batches(N), training=training, model=model).model
    moved = (found.weight - model.weight).detach().abs()
    np.testing.assert_allclose(moved, np.full((K, D), 0.01), rtol=1e-4)  # eps of 1e-8 beside gradients of 1e-3


def test_gradients_are_clipped_to_max_grad_norm():
    training = Training(epochs=1, learning_rate=1.0, weight_decay=0.0, schedule="constant", max_grad_norm=0.25)
    model = plain_linear()
    found = trained(batches(N), training=training, model=model, loss=scaled(1e3)).model
    moved = torch.cat([(a - b).ravel() for a, b in zip(found.parameters(), model.parameters(), strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(1.9 * 0.25, rel=1e-4)  # PyTorch adds 1e-6 to the norm


def scaled(factor):
    def loss(model, inputs, targets):
        value = factor * F.cross_entropy(model(inputs), targets)
        return value, {"label": value}

    return loss


def test_a_model_without_trainable_parameters_raises_an_error():
    with pytest.raises(UsageError, match=r"Sequential has no trainable parameters\. All its parameters have req"):
        trained(model=network().requires_grad_(requires_grad=False))
