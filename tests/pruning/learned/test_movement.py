"""Movement of the weights of units during fine-tuning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kirsch
from coupled_networks import build
from kirsch.errors import NumericError, UsageError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


READERS = {"0": "3.weight", "3": "5.weight"}
"""Group → weight whose columns read the units."""


def samples():
    random = np.random.default_rng(0)
    labels = np.arange(24) % 3
    return (random.normal(0, 1, (24, 5)) + np.eye(3, 5)[labels]).astype(np.float32), labels


def graph_of(model):
    return kirsch.trace(model, torch.randn(2, 5))


def brute_force(total, model):
    """Add minus the products of weights and gradients, by hand for each column of the reading weights."""
    named = dict(model.named_parameters())
    for group, name in READERS.items():
        weight, gradient = named[name].detach(), named[name].grad
        for unit in range(weight.shape[1]):
            products = [float(w) * float(g) for w, g in zip(weight[:, unit], gradient[:, unit], strict=True)]
            total[group][unit] -= sum(products)


def empty():
    return {"0": np.zeros(6), "3": np.zeros(4)}


def assert_scores(movement, expected, **tolerance):
    scores = movement.scores()
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, **tolerance)


def test_scores_of_a_plain_loop_equal_the_sum_over_the_reading_weights():
    model, total = network(), empty()
    movement, optimizer = kirsch.Movement(graph_of(model)), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs, labels = map(torch.tensor, samples())
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        brute_force(total, model)
        movement(model)
        optimizer.step()
    assert movement.steps == 5
    assert_scores(movement, total, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05}, {"optimizer": "adamw"}]
)
def test_scores_of_kirsch_fit_equal_the_sum_over_the_reading_weights(options):
    model, total = network(), empty()
    movement = kirsch.Movement(graph_of(model))

    def before_step(trained):
        movement(trained)
        brute_force(total, trained)

    training = kirsch.Training(epochs=2, learning_rate=0.02, **options)
    data = kirsch.ArrayData(*samples(), batch_size=4)
    hooks = kirsch.TrainingHooks(before_step=before_step)
    kirsch.fit(model, data, training=training, hooks=hooks, progress=False)
    assert movement.steps == 12 // training.gradient_accumulation_steps
    assert_scores(movement, total, rtol=1e-4, atol=1e-7)


def test_with_plain_gradient_descent_the_score_follows_from_the_norms_before_and_after():
    """w' = w - r·g gives -w·g = (|w'|² - |w|²) / 2r - r·|g|² / 2, summed over the steps."""
    model, rate = network().double(), 0.05
    movement = kirsch.Movement(kirsch.trace(model, torch.randn(2, 5, dtype=torch.float64)))
    inputs, labels = samples()
    reader = dict(model.named_parameters())["3.weight"]
    first, squares = (reader.detach() ** 2).sum(0), torch.zeros(6, dtype=torch.float64)
    for _ in range(8):
        model.zero_grad()
        F.cross_entropy(model(torch.tensor(inputs).double()), torch.tensor(labels)).backward()
        movement(model)
        squares += (reader.grad**2).sum(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(rate * parameter.grad)
    expected = ((reader.detach() ** 2).sum(0) - first) / (2 * rate) - rate / 2 * squares
    np.testing.assert_allclose(movement.scores()["0"], expected.numpy(), rtol=1e-9)


def test_units_that_move_to_zero_are_removed_first():
    """Weight decay on some units only: they are shrunk, whatever their initial size, and the plan removes them."""
    model = network()
    graph = graph_of(model)
    shrunk, movement = [1, 4], kirsch.Movement(graph)
    inputs, labels = map(torch.tensor, samples())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model[3].weight.data[:, shrunk] *= 3  # the magnitude would keep them
    for _ in range(10):
        optimizer.zero_grad()
        decay = sum((model[3].weight[:, unit] ** 2).sum() for unit in shrunk)
        (F.cross_entropy(model(inputs), labels) + decay).backward()
        movement(model)
        optimizer.step()
    plan = kirsch.plan(graph, keep={"0": 4}, importance=movement.scores())
    assert plan.groups[0].removed == tuple(shrunk)
    assert kirsch.plan(graph, keep={"0": 4}).groups[0].removed != tuple(shrunk)


def test_heads_and_queries_have_scores_that_a_plan_accepts():
    model = build("attention")
    graph = kirsch.trace(model, model.inputs[:2])
    movement = kirsch.Movement(graph)
    F.cross_entropy(model(model.inputs), torch.arange(6) % 3).backward()
    movement(model)
    scores = movement.scores()
    assert {name: len(values) for name, values in scores.items()} == {g.name: g.size for g in graph.groups}
    assert kirsch.plan(graph, kirsch.Goal(parameters=0.7), importance=scores, round_to=1).groups


def test_a_step_with_an_infinite_gradient_does_not_count():
    model = network()
    movement = kirsch.Movement(graph_of(model))
    inputs, labels = map(torch.tensor, samples())
    F.cross_entropy(model(inputs), labels).backward()
    movement(model)
    before = movement.scores()
    model[3].weight.grad[0, 0] = torch.inf
    movement(model)
    assert_scores(movement, before, rtol=0)


def test_missing_gradients_steps_and_movement_are_refused():
    model = network()
    movement = kirsch.Movement(graph_of(model))
    with pytest.raises(UsageError, match=r"Movement has no steps\. .*before_step=movement"):
        movement.scores()
    with pytest.raises(UsageError, match=r"has no gradients\. .* Call it after loss\.backward\(\)"):
        movement(model)
    model.zero_grad()
    (0.0 * sum(parameter.sum() for parameter in model.parameters())).backward()
    movement(model)
    with pytest.raises(NumericError, match="All scores of movement are 0 after 1 steps"):
        movement.scores()
    other = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    other(torch.randn(2, 5)).sum().backward()
    with pytest.raises(UsageError, match="Movement was made for Sequential"):
        movement(other)
