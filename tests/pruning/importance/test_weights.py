"""Importances from the weights alone: "lamp", "fpgm" and "bn_scale"."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from kirsch.errors import UsageError
from kirsch.frameworks.trace import trace
from kirsch.pruning.importance import IMPORTANCES


def two_layers(first, second=None):
    """Return a network of two linear layers without bias, whose first weight is given, and its graph."""
    first = torch.as_tensor(first, dtype=torch.float64)
    model = nn.Sequential(
        nn.Linear(first.shape[1], len(first), bias=False), nn.ReLU(), nn.Linear(len(first), 2, bias=False)
    )
    model.double().eval()
    with torch.no_grad():
        model[0].weight.copy_(first)
        model[2].weight.copy_(torch.ones(2, len(first)) if second is None else torch.as_tensor(second))
    return trace(model, torch.ones(1, first.shape[1], dtype=torch.float64))


def scores(name, graph, **options):
    (group,) = graph.groups
    return IMPORTANCES[name](graph, group, **options)


def test_lamp_divides_the_squares_by_the_sum_over_units_that_are_at_least_as_large():
    graph = two_layers(np.diag([3.0, 1.0, 2.0, 2.0]), np.diag([3.0, 1.0, 2.0, 2.0])[:2] * 0 + 1)
    squares = IMPORTANCES["magnitude"](graph, graph.groups[0], norm=2) ** 2
    expected = [squares[u] / squares[squares >= squares[u]].sum() for u in range(4)]
    np.testing.assert_allclose(scores("lamp", graph), expected)
    assert scores("lamp", graph)[0] == 1
    assert scores("lamp", graph)[2] == scores("lamp", graph)[3]


def test_lamp_of_zero_weights_is_finite():
    assert (scores("lamp", two_layers(np.zeros((3, 2)), np.zeros((2, 3)))) >= 0).all()


def test_fpgm_is_the_sum_of_the_distances_between_filters():
    rows = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1).sum(1)
    np.testing.assert_allclose(scores("fpgm", two_layers(rows)), distances / distances.mean())


def test_fpgm_keeps_units_that_differ_from_all_others():
    assert scores("fpgm", two_layers([[1.0, 1.0], [1.1, 1.0], [1.0, 1.1], [-5.0, 0.0]])).argmax() == 3


def test_bn_scale_is_the_mean_absolute_scale_of_the_batch_normalizations(residual, graph_of):
    with torch.no_grad():
        residual.norm.weight.copy_(torch.tensor([0.5, -2.0, 0.0, 1.0, -0.25, 3.0]))
    graph = graph_of(residual)
    group = next(group for group in graph.groups if group.name == "stem")
    np.testing.assert_array_equal(IMPORTANCES["bn_scale"](graph, group), [0.5, 2.0, 0.0, 1.0, 0.25, 3.0])


def test_bn_scale_names_a_group_without_batch_normalization(residual, graph_of):
    graph = graph_of(residual)
    inner = next(group for group in graph.groups if group.name == "inner")
    with pytest.raises(UsageError, match=r"\"bn_scale\" cannot rank the units of 'inner'.*keep_outputs=\['inner'\]"):
        IMPORTANCES["bn_scale"](graph, inner)
    with pytest.raises(UsageError, match="cannot rank the units of 'inner'"):
        kirsch.plan(graph, kirsch.Goal(macs=0.7), importance="bn_scale", round_to=1)
    fixed = kirsch.plan(graph, kirsch.Goal(macs=0.7), importance="bn_scale", round_to=1, keep_outputs=["inner"])
    assert [removal.name for removal in fixed.groups] == ["stem"]
