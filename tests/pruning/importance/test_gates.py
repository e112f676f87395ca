"""Derivatives of the loss for gates of units, which "taylor" and "fisher" use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kirsch.pruning.importance import IMPORTANCES

GATES = {
    "residual": {"stem": ("stem", 6), "inner": ("inner", 5)},
    "attention": {"query": ("query", 4), "value": ("value", 4), "gate": ("hidden", 5)},
}
"""Group name → gates of the network and their number."""


def derivatives(model, labels, gate, units):
    """Return the derivative of the loss of each sample for each gate, by automatic differentiation."""
    found = []
    for inputs, label in zip(model.inputs.split(1), labels.split(1), strict=True):
        gates = torch.ones(units, dtype=torch.float64, requires_grad=True)
        model.gates = {gate: gates}
        found.append(torch.autograd.grad(F.cross_entropy(model(inputs), label), gates)[0].numpy())
    model.gates = {}
    return np.array(found)


@pytest.mark.parametrize(
    ("network", "group", "gate"), [(n, g, gate) for n, groups in GATES.items() for g, gate in groups.items()]
)
def test_the_derivatives_equal_those_of_explicit_gates(request, graph_of, statistics_of, labels, network, group, gate):
    model = request.getfixturevalue(network)
    graph = graph_of(model)
    name, units = gate
    expected = derivatives(model, labels, name, units)
    found = next(found for found in graph.groups if found.name == group)
    gates = statistics_of(graph).gates(found)
    np.testing.assert_allclose(gates.mean_absolute, np.abs(expected).mean(0), rtol=1e-9)
    np.testing.assert_allclose(gates.mean_square, (expected**2).mean(0), rtol=1e-9)
    np.testing.assert_allclose(
        IMPORTANCES["taylor"](graph, found, statistics=statistics_of(graph)), gates.mean_absolute
    )
    np.testing.assert_allclose(
        IMPORTANCES["fisher"](graph, found, statistics=statistics_of(graph)), gates.mean_square / 2
    )


def test_scores_do_not_depend_on_the_batches(residual, graph_of, statistics_of):
    graph = graph_of(residual)
    for name in ("taylor", "fisher", "taylor_weights", "snip", "grasp", "activation", "apoz", "wanda", "flap"):
        for group in graph.groups:
            whole, parts = (IMPORTANCES[name](graph, group, statistics=statistics_of(graph, n)) for n in (12, 5))
            np.testing.assert_allclose(whole, parts, rtol=1e-9, atol=1e-12, err_msg=name)


def test_frozen_parameters_have_the_same_scores_and_stay_frozen(residual, graph_of, statistics_of):
    graph = graph_of(residual)
    before = [IMPORTANCES["taylor"](graph, group, statistics=statistics_of(graph)) for group in graph.groups]
    residual.requires_grad_(requires_grad=False)
    after = [IMPORTANCES["taylor"](graph, group, statistics=statistics_of(graph)) for group in graph.groups]
    for first, second in zip(before, after, strict=True):
        np.testing.assert_array_equal(first, second)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in residual.parameters())
