"""A small neural network in numpy: forward and backward pass, and Adam.

The search trains networks of a few thousand weights. In numpy, it works with any framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]


class Network:
    """A multilayer perceptron with ReLU between its layers.

    Args:
        widths: number of inputs, of the units of each hidden layer, and of outputs.
        random: generator of the initial weights: uniform in ±1/sqrt(inputs), as in PyTorch, and ±0.003 in the last
            layer, as in DDPG (Lillicrap et al. 2016, arXiv:1509.02971, section 7), so that outputs are near 0 first.
    """

    def __init__(self, widths: Sequence[int], random: np.random.Generator) -> None:
        bounds = [1 / np.sqrt(inputs) for inputs in widths[:-2]] + [3e-3]
        pairs = zip(widths[:-1], widths[1:], bounds, strict=True)
        self.parameters: list[Array] = []
        for inputs, outputs, bound in pairs:
            self.parameters += [random.uniform(-bound, bound, shape) for shape in ((inputs, outputs), outputs)]

    def __call__(self, x: Array) -> Array:
        """Return the outputs (N, outputs) for inputs (N, inputs)."""
        return self.forward(x)[-1]

    def forward(self, x: Array) -> list[Array]:
        """Return the inputs of each layer, and the outputs."""
        values = [x]
        last = len(self.parameters) // 2 - 1
        for layer in range(last + 1):
            weight, bias = self.parameters[2 * layer : 2 * layer + 2]
            x = x @ weight + bias
            values.append(x if layer == last else np.maximum(x, 0))
            x = values[-1]
        return values

    def backward(self, values: Sequence[Array], gradient: Array) -> tuple[list[Array], Array]:
        """Return the gradients of the parameters, and of the inputs.

        Args:
            values: result of `forward`.
            gradient: gradient of the outputs, shape (N, outputs).
        """
        gradients: list[Array] = []
        for layer in reversed(range(len(self.parameters) // 2)):
            weight, entry = self.parameters[2 * layer], values[layer]
            gradients = [entry.T @ gradient, gradient.sum(0), *gradients]
            gradient = gradient @ weight.T
            if layer:
                gradient = gradient * (entry > 0)
        return gradients, gradient


class Adam:
    """Adam with the default decay rates.

    Args:
        network: the network whose parameters are updated.
        learning_rate: step size.

    Source: Kingma, Ba 2015, arXiv:1412.6980, algorithm 1.
    """

    def __init__(self, network: Network, learning_rate: float) -> None:
        self._network, self._learning_rate, self._steps = network, learning_rate, 0
        self._first = [np.zeros_like(parameter) for parameter in network.parameters]
        self._second = [np.zeros_like(parameter) for parameter in network.parameters]

    def step(self, gradients: Sequence[Array]) -> None:
        """Move the parameters against the gradients."""
        self._steps += 1
        decay_first, decay_second = 0.9, 0.999
        for index, gradient in enumerate(gradients):
            first = self._first[index] = decay_first * self._first[index] + (1 - decay_first) * gradient
            second = self._second[index] = decay_second * self._second[index] + (1 - decay_second) * gradient**2
            scaled = np.sqrt(second / (1 - decay_second**self._steps)) + 1e-8
            self._network.parameters[index] -= self._learning_rate * first / (1 - decay_first**self._steps) / scaled
