"""Errors for NaN and infinity name the tensor in which these first occur."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kirsch.errors import Interrupted, NumericError
from kirsch.frameworks.training import Training
from training_runs import (
    D,
    K,
    cross_entropy,
    network,
    plain_linear,
    samples,
    trained,
)


def test_nan_in_the_initial_weights_raises_an_error_before_the_first_step():
    model = network()
    model[4].weight.data[0, 0] = math.nan
    sentence = r"The parameter `4\.weight` of the model is not finite before training\. .* Load or initialize its"
    with pytest.raises(NumericError, match=sentence) as caught:
        trained(model=model, loss=lambda *_: pytest.fail("a step was made"))
    assert caught.value.exit_code == 6


def test_nan_in_the_inputs_raises_an_error():
    inputs, targets = samples()
    bad = inputs.copy()
    bad[2, 1] = math.nan
    with pytest.raises(NumericError, match=r"The inputs contain NaN or infinity at epoch 1, batch 2\. Repair") as e:
        trained([(inputs, targets), (bad, targets)])
    assert e.value.exit_code == 6


class Root(nn.Module):
    """√x, which is NaN below zero."""

    def forward(self, x):
        return x.sqrt()


def test_the_error_names_the_first_layer_with_an_output_that_is_not_finite():
    model = nn.Sequential(plain_linear(), Root(), nn.Linear(K, K))
    with pytest.raises(NumericError, match=r"The output of `1` is not finite at epoch 1, batch 1") as caught:
        trained(model=model)
    assert caught.value.exit_code == 6


def test_the_error_names_the_loss_term_that_is_not_finite():
    def loss(model, inputs, targets):
        label, bad = F.cross_entropy(model(inputs), targets), model[0].weight.sum() * math.inf
        return label + bad, {"label": label, "bad": bad}

    with pytest.raises(NumericError, match=r"The loss term bad is not finite at epoch 1, batch 1, although the out"):
        trained(loss=loss)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (1e30, r"The labels are finite and reach 1e\+30, whose square exceeds .* Scale the labels"),
        (math.nan, r"^The labels contain NaN or infinity at epoch 1, batch 1\. Repair"),
        (-math.inf, r"^The labels contain NaN or infinity at epoch 1, batch 1\. Repair"),
        (2.0, r"The labels are finite, so .* the outputs of the teacher, if there is one"),
    ],
)
def test_the_error_names_the_labels_if_they_make_the_loss_infinite_and_else_the_loss_and_the_teacher(label, sentence):
    def loss(model, inputs, targets):
        value = F.mse_loss(model(inputs), targets) / (0 if label == 2 else 1)
        return value, {"label": value}

    inputs, _ = samples()
    with pytest.raises(NumericError, match=sentence):
        trained([(inputs, np.full((len(inputs), K), label, np.float32))], loss=loss)


def test_a_loss_that_was_finite_before_suggests_a_lower_learning_rate_or_weight():
    def loss(model, inputs, targets):
        total = 1e3 * (model(inputs) ** 2).mean()
        return total, {"square": total}

    sentence = r"The loss term square is not finite .* the learning rate is too high for the weight of the term"
    with pytest.raises(NumericError, match=sentence):
        trained(model=nn.Linear(D, K), loss=loss, training=Training(epochs=9, learning_rate=1.0))


def test_the_error_names_the_parameter_that_is_not_finite_at_the_next_step():
    with pytest.raises(NumericError, match=r"The parameter `\d\.\w+` is no longer finite at epoch 1, batch 2\. Lower"):
        trained(loss=exploding(at=1))


def exploding(at):
    """Return a loss with an infinite gradient and a finite value at one batch."""
    calls = itertools.count(1)

    def loss(model, inputs, targets):
        value = F.cross_entropy(model(inputs), targets)
        if next(calls) == at:
            bias = model[4].bias
            value = value + ((bias - bias.detach()).abs() ** 0.5).sum()  # the derivative of √x at 0 is infinite
        return value, {"label": value}

    return loss


def unexpected_save(*_):
    pytest.fail("weights that are not finite were saved")


def test_weights_that_are_not_finite_after_an_epoch_are_neither_validated_nor_saved():
    """An epoch has four batches, so the second epoch ends with batch 8."""
    saved, validated, events = [], [], []
    with pytest.raises(NumericError, match=r"The parameter `4\.bias` is no longer finite in epoch 2\. Lower the") as e:
        trained(
            loss=exploding(at=8),
            training=Training(epochs=2),
            save=saved.append,
            validate=lambda model: validated.append(model) or {},
            event=events.append,
        )
    assert e.value.exit_code == 6
    assert (len(saved), len(validated), [event["event"] for event in events]) == (1, 1, ["first_batch", "epoch"])
    assert all(np.isfinite(array).all() for array in saved[0].arrays.values())


def test_weights_that_are_not_finite_are_not_saved_by_a_stop():
    with pytest.raises(NumericError, match=r"The parameter `4\.bias` is no longer finite in epoch 1"):
        trained(loss=exploding(at=1), save=unexpected_save, stop=lambda: Interrupted("enough"))


def test_the_error_names_a_buffer_that_is_not_finite_after_the_epoch():
    """The running variance overflows. In training mode, `forward` does not read it, so the loss is finite."""
    inputs, targets = samples()
    model = nn.Sequential(nn.BatchNorm1d(D, affine=False), nn.Linear(D, K))
    model[0].running_var.fill_(3e38)

    def loss(model, inputs, targets):
        model[0].running_var.mul_(10)
        return cross_entropy(model, inputs, targets)

    with pytest.raises(NumericError, match=r"The buffer `0\.running_var` is no longer finite in epoch 1"):
        trained([(inputs, targets)], model=model, loss=loss, save=unexpected_save)


def test_a_buffer_that_is_infinite_before_training_is_allowed():
    model = network()
    model.register_buffer("mask", torch.full((3,), -math.inf))
    assert len(trained(model=model).history) == 3
