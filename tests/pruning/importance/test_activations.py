"""Importances from activations: "activation", "apoz", "wanda" and "flap"."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kirsch.data.batches import Batch
from kirsch.errors import NumericError, UsageError
from kirsch.frameworks.trace import trace
from kirsch.pruning.importance import IMPORTANCES
from kirsch.pruning.importance.calibration import CalibrationBatches
from kirsch.pruning.importance.statistics import Statistics

HIDDEN = torch.tensor([[[1.0, 0.0, -2.0], [0.0, 0.0, 4.0]], [[3.0, 0.0, 2.0], [9.0, 9.0, 9.0]]], dtype=torch.float64)
"""Activations, shape (N, L, channels); the last position of the second sample is padding."""
MASK = torch.tensor([[1, 1], [1, 0]])
COUNTED = HIDDEN[MASK.bool()].numpy()
WEIGHT = torch.tensor([[1.0, 5.0, -1.0], [2.0, 0.0, 3.0]], dtype=torch.float64)


class Padded(nn.Module):
    """The units are the identity of the inputs; the second layer reads them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, hidden, attention_mask):
        return (self.second(self.first(hidden)) * attention_mask[..., None]).sum(1)


@pytest.fixture
def padded():
    """Return the graph of the network, its group, and the statistics of two batches."""
    model = Padded().double().eval()
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(3))
        model.second.weight.copy_(WEIGHT)
    graph = trace(model, {"hidden": HIDDEN[:1], "attention_mask": MASK[:1]})
    batches = [Batch({"hidden": h, "attention_mask": m}) for h, m in zip(HIDDEN.split(1), MASK.split(1), strict=True)]
    return graph, graph.groups[0], Statistics(graph, batches)


@pytest.fixture
def padded_by_position(padded):
    """Return the same with one batch of both samples, whose inputs are a tuple."""
    graph, group, _ = padded
    batches = CalibrationBatches(graph.model, [((HIDDEN, MASK), None)], "inputs", "The test", "cross-entropy")
    return graph, group, Statistics(graph, batches)


def relative(values):
    return values / values.mean()


@pytest.mark.parametrize("fixture", ["padded", "padded_by_position"])
def test_activation_is_the_mean_absolute_value_without_padding(request, fixture):
    graph, group, statistics = request.getfixturevalue(fixture)
    found = IMPORTANCES["activation"](graph, group, statistics=statistics)
    np.testing.assert_allclose(found, relative(np.abs(COUNTED).mean(0)))


def test_apoz_is_the_share_of_values_that_are_not_zero(padded):
    graph, group, statistics = padded
    np.testing.assert_allclose(IMPORTANCES["apoz"](graph, group, statistics=statistics), (COUNTED != 0).mean(0))


def test_wanda_is_the_norm_of_the_activation_times_the_weights(padded):
    graph, group, statistics = padded
    products = np.sqrt((COUNTED**2).mean(0)) * WEIGHT.abs().sum(0).numpy()
    np.testing.assert_allclose(IMPORTANCES["wanda"](graph, group, statistics=statistics), relative(products))


def test_flap_is_the_variance_times_the_squared_norm_of_the_weights_standardized(padded):
    graph, group, statistics = padded
    products = COUNTED.var(0) * (WEIGHT**2).sum(0).numpy()
    expected = (products - products.mean()) / products.std()
    np.testing.assert_allclose(IMPORTANCES["flap"](graph, group, statistics=statistics), expected)


def test_a_grouped_convolution_is_read_with_the_weights_of_each_group():
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 6, 1, groups=2, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1, 1))
    images = torch.ones(2, 1, 3, 3, dtype=torch.float64)
    graph = trace(model, images)
    statistics = Statistics(graph, [Batch(images)])
    inputs = statistics.of_inputs(graph.groups[0])[0]
    np.testing.assert_allclose(inputs.mean_absolute, [1, 2, 3, 4])
    weight = model[1].weight.detach().abs().squeeze().numpy()  # (6, 2): rows 0 to 2 read channels 0 and 1
    products = np.array([1, 2, 3, 4]) * np.concatenate([weight[:3].sum(0), weight[3:].sum(0)])
    for group in graph.groups:
        found = IMPORTANCES["wanda"](graph, group, statistics=statistics)
        units = products.reshape(2, 2).sum(0 if group.kind == "position in conv group" else 1)
        np.testing.assert_allclose(found, relative(units))


def test_infinite_activations_name_the_layer(padded):
    graph, group, _ = padded
    hidden = HIDDEN[:1].clone()
    hidden[0, 0, 0] = torch.inf
    statistics = Statistics(graph, [Batch({"hidden": hidden, "attention_mask": MASK[:1]})])
    with pytest.raises(NumericError, match=r"The activations that 'first\.weight' reads contain NaN or infinity"):
        IMPORTANCES["wanda"](graph, group, statistics=statistics)


def test_units_that_no_weight_reads_raise_an_error(attention, graph_of, statistics_of):
    graph = graph_of(attention)
    group = next(group for group in graph.groups if group.name == "query")
    with pytest.raises(UsageError, match=r"The activations of 'query' are not known.*exclude='query'"):
        IMPORTANCES["activation"](graph, group, statistics=statistics_of(graph))


def test_a_layer_whose_weight_is_computed_from_another_one_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), nn.Linear(2, 2))
    graph = trace(model.eval(), torch.ones(1, 3))
    statistics = Statistics(graph, [Batch(torch.ones(2, 3))])
    first, second = graph.groups
    with pytest.raises(UsageError, match=r"The activations that '1\.parametrizations\.weight\.original1' reads are"):
        IMPORTANCES["wanda"](graph, first, statistics=statistics)
    assert len(IMPORTANCES["wanda"](graph, second, statistics=statistics)) == 2
