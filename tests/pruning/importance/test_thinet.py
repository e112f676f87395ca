"""The importance "thinet", against the outputs of layers from which channels are removed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.batches import Batch
from kirsch.frameworks.trace import trace
from kirsch.pruning.importance import IMPORTANCES
from kirsch.pruning.importance.statistics import Statistics

IMAGES = torch.randn(4, 2, 5, 5, dtype=torch.float64)

READERS = {
    "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3, bias=False)),
    "convolution": lambda: nn.Conv2d(6, 3, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), bias=False),
    "convolution with groups": lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False),
}


def network(reader):
    """Return a network whose last layer reads six channels, its graph, and the statistics of two batches."""
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), READERS[reader]()).double().eval()
    graph = trace(model, IMAGES[:1])
    return model, graph, Statistics(graph, [Batch(part) for part in IMAGES.split(3)])


@pytest.mark.parametrize("reader", READERS)
def test_the_error_without_channels_is_the_sum_of_the_products(reader):
    model, graph, statistics = network(reader)
    model.requires_grad_(requires_grad=False)
    hidden = model[:2](IMAGES)
    full = model[2](hidden)
    for group in graph.groups:
        (products,) = statistics.contribution_products(group)
        for units in itertools.combinations(range(group.size), 2):
            removed = np.isin(graph.coupling.component[graph.axes["0.weight", 0]], group.components_of(units))
            change = model[2](hidden * torch.from_numpy(removed)[:, None, None])
            expected = float((change**2).sum() / (full**2).sum())
            assert products[np.ix_(units, units)].sum() == pytest.approx(expected, rel=1e-9)


def test_units_are_removed_in_the_order_of_the_smallest_error():
    model, graph, statistics = network("linear")
    model.requires_grad_(requires_grad=False)
    hidden = model[:2](IMAGES)
    (group,) = graph.groups
    scores = IMPORTANCES["thinet"](graph, group, statistics=statistics)
    removed: list[int] = []
    for _ in range(group.size):

        def error(unit, removed=tuple(removed)):
            mask = torch.zeros(6, dtype=torch.float64)
            mask[[*removed, unit]] = 1
            return float((model[2](hidden * mask[:, None, None]) ** 2).sum())

        removed.append(min(set(range(6)) - set(removed), key=error))
    assert np.argsort(scores).tolist() == removed


def test_the_error_of_a_transposed_convolution_is_that_of_its_outputs(monkeypatch):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 1, bias=False), nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, bias=False)
    model, images = (
        nn.Sequential(*layers).double().eval().requires_grad_(False),
        torch.randn(2, 2, 3, 3, dtype=torch.float64),
    )
    monkeypatch.setattr("kirsch.pruning.importance.activations.SAMPLED", 10_000)
    graph = trace(model, images[:1])
    (products,) = Statistics(graph, [Batch(images)]).contribution_products(graph.groups[0])
    hidden, energy = model[0](images), (model(images) ** 2).sum()
    for pair in ([0], [1, 3]):
        alone = torch.zeros(4, 1, 1, dtype=torch.float64)
        alone[pair] = 1
        expected = float((model[1](hidden * alone) ** 2).sum() / energy)
        assert products[np.ix_(pair, pair)].sum() == pytest.approx(expected, rel=1e-9)


def test_a_unit_that_another_unit_cancels_is_removed_with_it():
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.5], [0.5, 0.5]]))
        model[1].weight.copy_(torch.tensor([[10.0, -10.0, 1.0, 1.0]]))
    inputs = torch.randn(20, 2, dtype=torch.float64)
    graph = trace(model, inputs[:1])
    scores = IMPORTANCES["thinet"](graph, graph.groups[0], statistics=Statistics(graph, [Batch(inputs)]))
    assert set(np.argsort(scores)[2:]) == {0, 1}  # the error is large until both are removed
    assert scores[[0, 1]].max() > scores[[2, 3]].max()
