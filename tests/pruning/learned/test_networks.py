"""Forward and backward pass of the networks of the search, and Adam."""

from __future__ import annotations

import numpy as np
import pytest

from kirsch.pruning.learned.networks import Adam, Network


@pytest.fixture
def random():
    return np.random.default_rng(0)


def with_large_weights(network, random):
    """Set all parameters to random numbers, so that no hidden layer is inactive."""
    network.parameters = [random.normal(size=parameter.shape) for parameter in network.parameters]
    return network


@pytest.mark.parametrize("widths", [[3, 2], [4, 7, 1], [5, 6, 8, 2]])
def test_gradients_agree_with_finite_differences(widths, random):
    network = with_large_weights(Network(widths, random), random)
    x, weights = random.normal(size=(9, widths[0])), random.normal(size=(9, widths[-1]))

    def value():
        return float((network(x) * weights).sum())

    gradients, of_inputs = network.backward(network.forward(x), weights)
    step = 1e-6
    for array, gradient in [*zip(network.parameters, gradients, strict=True), (x, of_inputs)]:
        for index in np.ndindex(array.shape):
            before = array[index]
            array[index] = before + step
            high = value()
            array[index] = before - step
            difference = (high - value()) / (2 * step)
            array[index] = before
            assert gradient[index] == pytest.approx(difference, rel=1e-5, abs=1e-6)  # central differences in float64


def test_hidden_layers_are_rectified_and_the_output_is_not(random):
    network = Network([1, 2, 1], random)
    network.parameters = [np.array([[1.0, -1.0]]), np.zeros(2), np.array([[-1.0], [-3.0]]), np.array([0.5])]
    assert network(np.array([[2.0], [-2.0]])).tolist() == [[0.5 - 2], [0.5 - 6]]


def test_outputs_are_near_zero_at_first(random):
    assert np.abs(Network([4, 64, 64, 1], random)(random.normal(size=(50, 4)))).max() < 0.1


def test_the_first_step_of_adam_has_the_length_of_the_learning_rate(random):
    network = Network([2, 1], random)
    before = [parameter.copy() for parameter in network.parameters]
    gradients = [np.array([[3.0], [-0.02]]), np.array([5.0])]
    Adam(network, 0.01).step(gradients)
    for old, new, gradient in zip(before, network.parameters, gradients, strict=True):
        assert new == pytest.approx(old - 0.01 * np.sign(gradient), rel=1e-5)  # epsilon 1e-8 beside 0.02


def test_the_second_step_of_adam_follows_its_formula(random):
    network = Network([1, 1], random)
    optimizer, start = Adam(network, 0.1), network.parameters[0].item()
    optimizer.step([np.array([[1.0]]), np.zeros(1)])
    optimizer.step([np.array([[-2.0]]), np.zeros(1)])
    first, second = 0.9 * 0.1 - 0.1 * 2, 0.999 * 0.001 + 0.001 * 4  # moving averages
    step = 0.1 * first / (1 - 0.9**2) / (np.sqrt(second / (1 - 0.999**2)) + 1e-8)
    assert network.parameters[0].item() == pytest.approx(start - 0.1 - step)


def test_a_network_learns_a_function_that_is_not_linear(random):
    network = Network([1, 32, 1], random)
    optimizer, x = Adam(network, 0.01), np.linspace(-1, 1, 41)[:, None]
    for _ in range(1500):
        values = network.forward(x)
        gradients, _ = network.backward(values, 2 * (values[-1] - np.abs(x)) / len(x))
        optimizer.step(gradients)
    assert np.abs(network(x) - np.abs(x)).max() < 0.1
