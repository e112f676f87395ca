"""Layers that read removed units, and their weights as matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kirsch.frameworks.protocols import Surgery
    from kirsch.frameworks.pruned_models import LinearLayer
    from kirsch.graph.graph import Graph

MOST_COLUMNS = 10_000
"""Largest number of inputs of an output of a layer; the products of the inputs are a square matrix."""

PER_INPUT, FEWEST = 32, 4096
"""Number of positions to which the weight of a layer is fitted, for each of its inputs, and the smallest number."""

OF_SAMPLE = 256
"""Largest number of positions of a sample, on average, for a convolution; neighbors are almost the same."""

SLICE_ERROR = 0.01
"""Largest difference of a pruned weight from the slice of the original, relative to its largest entry (bfloat16)."""

NOT_LINEAR = "its weight is shared, computed, or not that of a linear layer or convolution"
COMPUTED = "its weight is computed from parameters, or changes in another way than by the removal of rows and columns"


@dataclass(frozen=True)
class ReadingLayer:
    """A layer that has lost inputs.

    Args:
        name: path of the weight.
        axis: axis of the weight over which its products with the activations are summed, 0 or 1.
        bias: path of the bias; None if the layer has none of its own.
        target: weight of the original for the kept outputs, as a matrix: shape (outputs, inputs).
        kept: mask of the kept indices of the axis.
        shape: shape of the pruned weight.
    """

    name: str
    axis: int
    bias: str | None
    target: NDArray[np.float64]
    kept: NDArray[np.bool_]
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Number of inputs of each output in the pruned model; each position of a kernel counts."""
        return int(np.prod(self.shape)) // self.shape[1 - self.axis]

    def drawn(self, random: np.random.Generator, positions: int, samples: int, total: int) -> NDArray[np.int64]:
        """Return the numbers of the positions of some samples to which the weight is fitted, in ascending order.

        Args:
            random: draws the positions.
            positions: number of the positions of these samples.
            samples: number of these samples.
            total: number of all calibration samples.
        """
        limit = OF_SAMPLE if len(self.shape) > len("OI") else math.inf
        most = math.ceil(samples * min(max(PER_INPUT * self.columns, FEWEST) / total, limit))
        if most >= positions:
            return np.arange(positions, dtype=np.int64)
        return np.sort(random.choice(positions, most, replace=False))

    def grouped_target(self, groups: int) -> NDArray[np.float64]:
        """Return `target` by group of a convolution, shape (groups, outputs, inputs)."""
        return self.target.reshape(groups, -1, self.target.shape[1])

    def matrix(self, weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a weight of the pruned layer as a matrix, shape (outputs, inputs)."""
        return _matrix(weight, self.axis)

    def unflattened(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the weight of a matrix, the inverse of `matrix`."""
        return np.ascontiguousarray(matrix.T if self.axis == 0 else matrix).reshape(self.shape)


def reading_layers(
    graph: Graph, keep: NDArray[np.bool_], linear: Mapping[str, LinearLayer], surgery: Surgery, pruned: object
) -> tuple[list[ReadingLayer], dict[str, str]]:
    """Return the layers that have lost inputs and can be compensated, and the reason for each of the others.

    Args:
        graph: graph of the original.
        keep: mask of the components that stay.
        linear: `Calibration.linear_layers` of the graph.
        surgery: reads the parameters of the pruned model.
        pruned: the pruned model.
    """
    found, skipped = [], dict[str, str]()
    for (name, axis), labels in graph.axes.items():
        kept = graph.kept(labels, keep)
        if kept is None or name not in graph.parameters or not graph.has_mark((name, axis), "contracted"):
            continue
        layer = linear.get(name)
        if layer is None or layer.axis != axis:
            skipped[name] = NOT_LINEAR
            continue
        weight = surgery.parameter_values(pruned, graph, name).astype(np.float64)
        target = _target(graph, keep, name, axis, kept, weight)
        if target is None:
            skipped[name] = COMPUTED
            continue
        reading = ReadingLayer(name, axis, layer.bias, target, kept, weight.shape)
        if reading.columns > MOST_COLUMNS:
            skipped[name] = f"it has {reading.columns:,} inputs, and at most {MOST_COLUMNS:,} are supported"
            continue
        found.append(reading)
    return found, skipped


def _target(
    graph: Graph,
    keep: NDArray[np.bool_],
    name: str,
    axis: int,
    kept: NDArray[np.bool_],
    weight: NDArray[np.float64],
) -> NDArray[np.float64] | None:
    """Return the original's weight for the kept outputs as a matrix; None if the pruned weight is not a slice of it.

    Pruning may multiply rows of queries, to keep the scale of attention. The target rows are multiplied, too.
    """
    original = graph.values(name).astype(np.float64)
    outputs = graph.kept(graph.axes.get((name, 1 - axis)), keep)
    if outputs is not None:
        original = original.compress(outputs, 1 - axis)
    sliced, target = _matrix(original.compress(kept, axis), axis), _matrix(original, axis)
    cut = _matrix(weight, axis)
    if cut.shape != sliced.shape:
        return None
    squares = (sliced * sliced).sum(1)
    factors = np.where(squares > 0, (cut * sliced).sum(1) / np.where(squares > 0, squares, 1), 1)
    if np.abs(cut - factors[:, None] * sliced).max() > SLICE_ERROR * np.abs(cut).max():
        return None
    exact = np.abs(factors - 1) < SLICE_ERROR  # rounding of the parameters, no scaling
    return np.asarray(np.where(exact, 1, factors)[:, None] * target)


def _matrix(weight: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return weight.T if axis == 0 else weight.reshape(len(weight), -1)
