"""Importances of single weights: "taylor_weights", "snip", "grasp" and "hessian", and the exact "leave_one_out"."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

import kirsch
from kirsch.data.batches import Batch
from kirsch.pruning.importance import IMPORTANCES, statistics


def loss_of_weights(model, labels, name):
    """Return the function weight → mean loss, and the weight."""
    weights = {key: value.detach() for key, value in model.named_parameters()}

    def loss(weight):
        return F.cross_entropy(torch.func.functional_call(model, {**weights, name: weight}, model.inputs), labels)

    return loss, weights[name]


def inner_scores(name, graph, of_batches):
    group = next(group for group in graph.groups if group.name == "inner")
    return IMPORTANCES[name](graph, group, statistics=of_batches)


def test_first_order_scores_are_sums_of_products_with_the_gradient(residual, graph_of, statistics_of, labels):
    loss, weight = loss_of_weights(residual, labels, "outer.weight")
    products = weight * torch.func.grad(loss)(weight)
    graph = graph_of(residual)
    of_batches = statistics_of(graph, 5)
    squares = torch.zeros(5, dtype=torch.float64)
    for sample, label in zip(residual.inputs.split(1), labels.split(1), strict=True):
        [gradient] = torch.autograd.grad(F.cross_entropy(residual(sample), label), residual.outer.weight)
        squares += ((weight * gradient) ** 2).sum((0, 2, 3)) / len(labels)
    np.testing.assert_allclose(inner_scores("taylor_weights", graph, of_batches), squares, rtol=1e-9)
    np.testing.assert_allclose(inner_scores("snip", graph, of_batches), products.abs().sum((0, 2, 3)), rtol=1e-9)


def test_grasp_is_the_product_with_hessian_and_gradient(residual, graph_of, statistics_of, labels):
    graph, names = graph_of(residual), [name for name, _ in residual.named_parameters()]
    weights = {name: value.detach() for name, value in residual.named_parameters()}

    def loss(*values):
        return F.cross_entropy(
            torch.func.functional_call(residual, dict(zip(names, values, strict=True)), residual.inputs), labels
        )

    values = tuple(weights.values())
    gradient = torch.autograd.functional.vjp(loss, values)[1]
    product = dict(zip(names, torch.autograd.functional.vhp(loss, values, gradient)[1], strict=True))
    expected = (weights["outer.weight"] * product["outer.weight"]).sum((0, 2, 3)).numpy()
    np.testing.assert_allclose(inner_scores("grasp", graph, statistics_of(graph, 5)), expected, rtol=1e-9)


def test_hessian_estimates_the_second_derivatives(monkeypatch, residual, graph_of, statistics_of, labels):
    loss, weight = loss_of_weights(residual, labels, "outer.weight")
    diagonal = torch.autograd.functional.hessian(loss, weight).reshape(30, 30).diagonal().reshape(weight.shape)
    expected = (weight**2 * diagonal).sum((0, 2, 3)).numpy() / 2
    graph = graph_of(residual)
    monkeypatch.setattr(statistics, "HESSIAN_VECTORS", 200)
    found = inner_scores("hessian", graph, statistics_of(graph))
    np.testing.assert_allclose(found, expected, atol=0.5 * expected.max())  # an estimate from 200 random vectors
    assert np.corrcoef(found, expected)[0, 1] > 0.95


def test_hessian_does_not_depend_on_the_division_into_batches(residual, graph_of, statistics_of):
    graph = graph_of(residual)
    one, *others = (inner_scores("hessian", graph, statistics_of(graph, size)) for size in (12, 5, 1))
    for other in others:
        np.testing.assert_allclose(other, one, rtol=1e-6)


def test_hessian_orders_the_units_of_wide_layers_like_the_exact_second_derivatives():
    torch.manual_seed(0)
    inputs, labels = torch.randn(12, 8), torch.arange(12) % 4
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    model.inputs = inputs
    with torch.no_grad():
        model[2].weight.mul_(torch.linspace(0.3, 2, 32))  # the units differ as in a trained network
    loss, weight = loss_of_weights(model, labels, "2.weight")
    diagonal = torch.autograd.functional.hessian(loss, weight, vectorize=True).reshape(1024, 1024).diagonal()
    expected = (weight**2 * diagonal.reshape(32, 32)).sum(0)
    graph = kirsch.trace(model, inputs[:1])
    group = next(group for group in graph.groups if group.name == "0")
    of_batches = statistics.Statistics(graph, [Batch(inputs, labels)], F.cross_entropy)
    found = IMPORTANCES["hessian"](graph, group, statistics=of_batches)
    assert spearmanr(found, expected).statistic > 0.8


def test_leave_one_out_is_the_change_of_the_loss_without_the_unit(residual, graph_of, statistics_of, labels):
    loss, weight = loss_of_weights(residual, labels, "outer.weight")
    expected = []
    for unit in range(5):
        without = weight.clone()
        without[:, unit] = 0
        expected.append(float(loss(without) - loss(weight)))
    graph = graph_of(residual)
    np.testing.assert_allclose(inner_scores("leave_one_out", graph, statistics_of(graph, 5)), expected, rtol=1e-9)


def test_taylor_and_fisher_rank_units_of_trained_networks_like_the_exact_change(
    residual_of, graph_of, statistics_of, labels
):
    correlations = []
    for seed in range(6):
        model = residual_of(seed)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(model.inputs), labels).backward()
            optimizer.step()
        graph = graph_of(model)
        of_all = statistics_of(graph)
        exact, *estimates = (
            np.concatenate([IMPORTANCES[name](graph, group, statistics=of_all) for group in graph.groups])
            for name in ("leave_one_out", "taylor", "fisher", "magnitude")
        )
        correlations.append([spearmanr(exact, estimate).statistic for estimate in estimates])
    taylor, fisher, magnitude = np.mean(correlations, 0)
    assert taylor > max(0.65, magnitude)
    assert fisher > max(0.65, magnitude)
