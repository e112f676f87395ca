"""Growing regularization of the units that a plan removes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from coupled_networks import NETWORKS, build
from kirsch.errors import PlanError, UsageError


@pytest.fixture(params=NETWORKS)
def case(request):
    model = build(request.param)
    graph = kirsch.trace(model, model.inputs[:2])
    return model, graph, kirsch.plan(graph, kirsch.Goal(parameters=0.6), round_to=1)


def removed_entries(graph, plan):
    """Return for each parameter which entries are not in the pruned model, from the removed indices of its axes."""
    keep, masks = plan.keep(graph), {}
    for name in graph.parameters:
        kept = torch.ones(graph.tensors[name].shape, dtype=torch.bool)
        for axis, labels in enumerate(graph.tensors[name].axes):
            mask = graph.kept(labels, keep)
            if mask is not None:
                kept.index_fill_(axis, torch.tensor((~mask).nonzero()[0]), value=False)
        masks[name] = ~kept
    return masks


def test_the_term_is_half_the_strength_times_the_squares_of_the_removed_parameters(case):
    model, graph, plan = case
    masks = removed_entries(graph, plan)
    term = kirsch.GrowingRegularization(graph, plan, strength=0.8, epochs=4, increments=2)
    for epoch, strength in ((0.0, 0.4), (1.99, 0.4), (2.0, 0.8), (100.0, 0.8)):
        model.zero_grad()
        value = term(model, epoch=epoch)
        value.backward()
        squares = sum(float((p.detach()[masks[name]] ** 2).sum()) for name, p in model.named_parameters())
        assert float(value.detach()) == pytest.approx(strength / 2 * squares, rel=1e-12)
        for name, parameter in model.named_parameters():
            expected = strength * parameter.detach() * masks[name]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0, msg=name)


def test_the_strength_grows_in_equal_steps_and_then_stays(case):
    _, graph, plan = case
    term = kirsch.GrowingRegularization(graph, plan, strength=1.0, epochs=2, increments=4)
    found = [term.strength_at(epoch) for epoch in (0, 0.49, 0.5, 1, 1.5, 1.99, 2, 3)]
    assert found == pytest.approx([0.25, 0.25, 0.5, 0.75, 1, 1, 1, 1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))


def test_training_drives_the_removed_units_to_zero_so_that_the_cut_changes_nothing():
    random = np.random.default_rng(0)
    labels = np.arange(96) % 3
    inputs = (random.normal(0, 1, (96, 6)) + 2 * np.eye(3, 6)[labels]).astype(np.float32)
    model, probe = network(), torch.tensor(inputs)
    graph = kirsch.trace(model, probe[:1])
    plan = kirsch.plan(graph, kirsch.Goal(parameters=0.5), round_to=1)
    changes = {}
    for name, terms in (("without", ()), ("with", [kirsch.GrowingRegularization(graph, plan, strength=2.0, epochs=4)])):
        data, training = kirsch.ArrayData(inputs, labels, batch_size=16), kirsch.Training(epochs=8, learning_rate=0.05)
        trained = kirsch.fit(model, data, training=training, regularizers=terms, progress=False).model
        small = kirsch.prune(trained, plan, verify=False)
        with torch.no_grad():
            changes[name] = float((trained(probe) - small(probe)).abs().max())
    assert changes["with"] < 0.01 * changes["without"]


def test_a_regularizer_with_the_keyword_epoch_gets_the_time_of_each_step():
    times = []

    def term(model, *, epoch):
        times.append(epoch)
        return 0.01 * (model[0].weight ** 2).sum()

    data = kirsch.ArrayData(np.zeros((8, 6), np.float32), np.arange(8) % 3, batch_size=2)
    kirsch.fit(network(), data, training=kirsch.Training(epochs=2), regularizers=[term], progress=False)
    assert times == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


def test_a_plan_of_another_model_is_refused(case):
    _, _, plan = case
    other = network()
    with pytest.raises(PlanError, match="another model"):
        kirsch.GrowingRegularization(kirsch.trace(other.eval(), torch.randn(2, 6)), plan, epochs=1)


def test_a_plan_of_blocks_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.inner(x).relu()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 3)).eval()
    graph = kirsch.trace(model, torch.randn(4, 4))
    plan = kirsch.plan(graph, kirsch.Goal(macs=0.8), kinds="block", data=torch.randn(4, 4))
    with pytest.raises(UsageError, match=r"The plan removes the block '\d'\. GrowingRegularization applies to units"):
        kirsch.GrowingRegularization(graph, plan, epochs=1)
