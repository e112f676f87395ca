"""Hard-concrete gates and the expected cost of a model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import kirsch
from coupled_networks import NETWORKS, build
from kirsch.graph.plan import Goal
from kirsch.pruning.learned import hard_concrete
from kirsch.pruning.learned.expected_cost import ExpectedCost

LOCATIONS = np.array([-3.0, -1.0, 0.0, 0.5, 2.0])


def test_the_open_probability_equals_the_frequency_of_open_gates():
    uniform = np.random.default_rng(0).uniform(size=(100_000, 1))
    gates = hard_concrete.sampled(LOCATIONS, uniform)
    frequency, probability = (gates > 0).mean(0), hard_concrete.open_probability(LOCATIONS)
    np.testing.assert_allclose(frequency, probability, atol=4 * 0.5 / np.sqrt(100_000))  # four standard errors
    assert gates.min() == 0
    assert gates.max() == 1


def test_the_open_probability_of_location_zero_is_the_published_formula():
    """Equation 12: sigmoid(log α - β log(-γ / ζ)) with β = 2/3, γ = -0.1, ζ = 1.1."""
    expected = 1 / (1 + np.exp(2 / 3 * np.log(0.1 / 1.1)))
    assert float(hard_concrete.open_probability(np.zeros(1))[0]) == pytest.approx(expected, rel=1e-12)


def test_fixed_gates_are_the_stretched_sigmoid_within_zero_and_one():
    np.testing.assert_allclose(hard_concrete.fixed(np.array([-5.0, 0.0, 5.0])), [0, 0.5, 1], atol=1e-12)


@pytest.fixture(params=NETWORKS)
def graph(request):
    model = build(request.param)
    return kirsch.trace(model, model.inputs[:2])


@pytest.mark.parametrize("quantity", ["macs", "parameters", "size"])
def test_with_probabilities_zero_and_one_the_expected_cost_is_the_counted_cost(graph, quantity):
    random, cost = np.random.default_rng(0), ExpectedCost(graph, graph.groups, quantity)
    sizes = [group.size for group in graph.groups]
    for _ in range(20):
        kept = random.random(sum(sizes)) < 0.6
        parts = np.split(kept, np.cumsum(sizes)[:-1])
        removed = {g.name: tuple(np.flatnonzero(~part).tolist()) for g, part in zip(graph.groups, parts, strict=True)}
        counted = getattr(graph.prices.price(graph.keep(removed)), quantity)
        expected = float(cost(kept.astype(float), cost.arrays)) * getattr(graph.cost, quantity)
        assert expected == pytest.approx(counted, rel=1e-9)


def test_the_expected_cost_is_the_mean_over_all_choices_if_no_weight_has_a_group_on_both_axes():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2), torch.nn.ReLU())
    model.append(torch.nn.Linear(2, 4))
    graph = kirsch.trace(model, torch.randn(2, 3))
    cost, probability = ExpectedCost(graph, graph.groups, "macs"), np.array([0.2, 0.5, 0.9, 0.3, 0.6])
    mean = 0.0
    for kept in itertools.product([0, 1], repeat=5):
        chance = np.prod(np.where(kept, probability, 1 - probability))
        first, second = sum(kept[:3]), sum(kept[3:])
        mean += chance * (3 * first + first * second + 4 * second) / (9 + 6 + 8)
    assert float(cost(probability, cost.arrays)) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_the_shift_meets_the_target_and_its_gradient_keeps_it(graph, target):
    """The derivative of the expected cost of shifted locations is 0 in all directions, by finite differences, too."""
    cost = ExpectedCost(graph, graph.groups, "parameters")
    size = sum(group.size for group in graph.groups)
    location = torch.randn(size, dtype=torch.float64, requires_grad=True)
    arrays = {name: torch.from_numpy(array) for name, array in cost.arrays.items()}

    def shift_of(values):
        return cost.shift(values, target, arrays, halvings=60)

    shift = shift_of(location)
    reached = cost(hard_concrete.open_probability(location + shift), arrays)
    assert float(reached.detach()) == pytest.approx(target, abs=1e-9)
    (gradient,) = torch.autograd.grad(reached, location, retain_graph=True)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)
    (found,) = torch.autograd.grad(shift, location)
    for index in range(0, size, 3):
        step = torch.zeros(size, dtype=torch.float64)
        step[index] = 1e-4
        with torch.no_grad():
            difference = (shift_of(location + step) - shift_of(location - step)) / 2e-4
        assert float(found[index]) == pytest.approx(float(difference), rel=1e-3, abs=1e-6)


def test_numpy_and_tensors_have_the_same_shift(graph):
    cost = ExpectedCost(graph, graph.groups, "macs")
    location = np.random.default_rng(0).normal(size=sum(group.size for group in graph.groups))
    arrays = {name: torch.from_numpy(array) for name, array in cost.arrays.items()}
    of_tensors = cost.shift(torch.from_numpy(location), 0.5, arrays, halvings=60)
    assert float(of_tensors) == pytest.approx(float(cost.shift(location, 0.5, cost.arrays, halvings=60)), rel=1e-12)


def test_the_goal_of_a_plan_is_not_needed_for_a_polynomial():
    """Terms with the same factors are added: the sum over the terms is the counted cost."""
    model = build("residual")
    graph = kirsch.trace(model, model.inputs[:2])
    polynomial = graph.prices.polynomial("parameters")
    counts = np.append(1, np.bincount(polynomial.array))
    assert (polynomial.coefficient * counts[polynomial.factor].prod(1)).sum() == graph.cost.parameters
    assert Goal(parameters=0.5).met_by(graph.cost, graph.cost) is False
