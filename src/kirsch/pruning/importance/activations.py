"""Statistics of the activations that the weights of a model read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.data.arrays import host
from kirsch.errors import NumericError, UsageError
from kirsch.pruning.importance.padding import Padding, without_padding
from kirsch.tasks.label_losses import IGNORED

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from numpy.typing import NDArray

    from kirsch.data.batches import Batch
    from kirsch.frameworks.protocols import Calibration
    from kirsch.graph.graph import Graph
    from kirsch.graph.group import ParameterAxis
    from kirsch.graph.labels import Labels


@dataclass
class InputStatistics:
    """Statistics of the activations that one weight reads, over all positions of all samples.

    Arrays have the shape (channels,). If the weight is a stack of the weights of experts, they have one value for each
    channel of each expert, shape (experts · channels,); the activations of positions that an expert does not process
    are 0.

    Args:
        name, axis: the weight, and the axis over which its products with the activations are summed.
        labels: labels of the channels.
        positions: number of positions, of all experts together.
        count: number of positions of each value.
        total, absolute, squares, nonzero: sums over these positions of x, |x|, x², and the number of values that are
            not 0.
        centered: sums over these positions of the squared difference from their mean.
        experts: labels of the experts; None for other weights.
    """

    name: str
    axis: int
    labels: Labels
    positions: int
    count: NDArray[np.float64]
    total: NDArray[np.float64]
    absolute: NDArray[np.float64]
    squares: NDArray[np.float64]
    nonzero: NDArray[np.float64]
    centered: NDArray[np.float64]
    experts: Labels | None = None

    @property
    def mean_absolute(self) -> NDArray[np.float64]:
        """Mean of |x| of each channel."""
        return self.absolute / self.positions

    @property
    def root_mean_square(self) -> NDArray[np.float64]:
        """Root of the mean of x² of each channel."""
        return np.asarray(np.sqrt(self.squares / self.positions))

    @property
    def variance(self) -> NDArray[np.float64]:
        """Variance of each channel over the positions."""
        others = self.positions - self.count  # with activation 0
        return (self.centered + _between(self.count, self.total, others, np.zeros_like(self.total))) / self.positions

    @property
    def share_of_nonzero(self) -> NDArray[np.float64]:
        """Fraction of the values of each channel that are not 0."""
        return self.nonzero / self.positions

    def add(self, positions: int, sums: NDArray[np.float64]) -> None:
        """Add the sums of further positions, as `_sums` returns them."""
        count, total, absolute, squares, nonzero, centered = sums
        self.centered += centered + _between(self.count, self.total, count, total)
        self.positions += positions
        self.count += count
        self.total += total
        self.absolute += absolute
        self.squares += squares
        self.nonzero += nonzero


def _between(
    count: NDArray[np.float64], total: NDArray[np.float64], others: NDArray[np.float64], other: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the squared differences from the common mean that two sets add to those from their own means.

    Args:
        count, total: number and sum of the values of the first set.
        others, other: number and sum of the values of the second set.
    """
    difference = total / np.maximum(count, 1) - other / np.maximum(others, 1)
    return np.asarray(difference**2 * count * others / np.maximum(count + others, 1))


def input_statistics(
    graph: Graph, calibration: Calibration, batches: Iterable[Batch]
) -> tuple[dict[tuple[str, int], InputStatistics], set[str]]:
    """Return the statistics of the activations that each weight reads, by weight and summed axis.

    Positions that an attention mask marks as padding do not count. Memory does not grow with the number of batches.

    Returns:
        The statistics, and the names of the weights whose activations are not known; see `Calibration.weight_inputs`.

    Raises:
        NumericError: an activation is NaN or infinite.
        UsageError: padding cannot be left out.
    """
    found: dict[ParameterAxis, InputStatistics] = {}
    unknown: set[str] = set()
    for batch, padding in without_padding(batches):

        def see(name: str, axis: int, labels: Labels | None, x: Any, experts: Any, padding: Padding = padding) -> None:
            if labels is None and experts is None:
                return
            x = ops.upcast(padding.left_out(name, x, experts))
            sums = _sums(x) if experts is None else _sums_by_expert(x, host(experts), graph.tensors[name].shape[0])
            if not np.isfinite(sums).all():
                raise NumericError(
                    f"The activations that {name!r} reads contain NaN or infinity.",
                    "The units cannot be ranked.",
                    "Check the weights of the model and the calibration data.",
                )
            key = name, axis
            if key in found:
                found[key].add(x.shape[0], sums)
            else:
                of_channels, of_experts = _labels(graph, name, labels, x.shape[1], experts)
                count, total, absolute, squares, nonzero, centered = sums
                found[key] = InputStatistics(
                    name, axis, of_channels, x.shape[0], count, total, absolute, squares, nonzero, centered, of_experts
                )

        unknown |= calibration.weight_inputs(graph, batch.inputs, see)
    return found, unknown


def _sums(x: Any) -> NDArray[np.float64]:
    """Return the number of positions, and the sums of `InputStatistics` over them, shape (6, channels)."""
    total = ops.sum(x, 0)
    centered = x - total / max(x.shape[0], 1)
    sums = (total, ops.sum(ops.abs(x), 0), ops.sum(x * x, 0), ops.count_nonzero(x, 0), ops.sum(centered * centered, 0))
    arrays = [host(values).astype(np.float64) for values in sums]
    return np.stack([np.full_like(arrays[0], x.shape[0]), *arrays])


def _sums_by_expert(x: Any, experts: NDArray[np.int64], number: int) -> NDArray[np.float64]:
    """Return the sums of `_sums` over the positions of each expert, shape (6, experts · channels)."""
    sums = np.zeros((6, number, x.shape[1]))
    for expert in np.unique(experts):
        sums[:, expert] = _sums(x[experts == expert])
    return sums.reshape(len(sums), -1)


def _labels(
    graph: Graph, name: str, labels: Labels | None, channels: int, experts: Any
) -> tuple[Labels, Labels | None]:
    """Return the labels of the channels and of the experts for each value of `InputStatistics`."""
    if labels is None:
        labels = np.zeros(channels, np.int64)  # the label 0 is frozen
    if experts is None:
        return labels, None
    of_experts = graph.axes.get((name, 0), np.zeros(graph.tensors[name].shape[0], np.int64))
    return np.tile(labels, len(of_experts)), np.repeat(of_experts, channels)


def column_sums(graph: Graph, inputs: InputStatistics, power: int) -> NDArray[np.float64]:
    """Return the sum of |w|^power over the weights that multiply each value of `InputStatistics`."""
    powers = np.abs(graph.values(inputs.name).astype(np.float64)) ** power
    if inputs.experts is not None:  # (experts, ...)
        return np.asarray(powers.sum(3 - inputs.axis).ravel())
    groups = (
        len(inputs.labels) // powers.shape[inputs.axis]
    )  # a convolution with groups: (output channels, columns, ...)
    if groups == 1:
        return np.asarray(powers.sum(tuple(other for other in range(powers.ndim) if other != inputs.axis)))
    by_group = powers.reshape(groups, -1, powers.shape[1], int(np.prod(powers.shape[2:])))
    return np.asarray(by_group.sum((1, 3)).ravel())


SAMPLED = 64
"""Largest number of outputs of a layer per sample whose errors are computed; they are drawn at random."""

MOST_COLUMNS = 10_000
"""Largest number of inputs of an output of a layer for `contribution_products`, which stores a square matrix."""


def contribution_products(
    graph: Graph, calibration: Calibration, batches: Iterable[Batch], names: Collection[str]
) -> list[tuple[Labels, NDArray[np.float64]]]:
    """Return the products of the contributions of the channels to the outputs of some layers.

    The contribution of a channel is the part that it adds to the outputs of a layer. The error of the outputs without a
    set of channels, the sum of the squares, is the sum of the products over all pairs of these channels.

    Args:
        graph: graph of the model.
        calibration: runs the model.
        batches: calibration batches.
        names: paths of the weights of the layers.

    Returns:
        For each layer, the labels of the channels, and the products, shape (channels, channels), relative to the sum of
        the squares of the outputs. For the stacked weights of experts also the labels of the experts, and the products
        of their contributions; each output is that of one expert.
    """
    grams: dict[tuple[tuple[str, int], int | None], Any] = {}  # sums of products of the activations that a layer reads
    layers: dict[tuple[str, int], Labels] = {}
    random = np.random.default_rng(0)
    for batch, padding in without_padding(batches):

        def see(
            name: str,
            axis: int,
            labels: Labels | None,
            groups: int,
            x: Any,
            experts: Any,
            padding: Padding = padding,
            samples: int = len(batch),
        ) -> None:
            _check_columns(name, x.shape[1] * x.shape[2] // groups)
            x = ops.upcast(padding.left_out(name, x, experts))
            most = SAMPLED * (1 if x.shape[2] > 1 else samples)  # a convolution passes one sample at a time
            chosen = np.sort(random.permutation(x.shape[0])[:most])
            x, experts = x[chosen], None if experts is None else host(experts)[chosen]
            layers[name, axis] = _labels(graph, name, labels, x.shape[1], None)[0]
            for expert in [None] if experts is None else np.unique(experts).tolist():
                part = x if expert is None else x[experts == expert]
                rows = ops.reshape(part, (part.shape[0], groups, -1))
                gram, key = ops.einsum("pgi,pgj->gij", rows, rows), ((name, axis), expert)
                grams[key] = grams[key] + gram if key in grams else gram

        calibration.weight_input_patches(graph, batch.inputs, names, see)
    found = []
    for (name, axis), labels in layers.items():
        weight = graph.values(name).astype(np.float64)
        of_layer = {expert: host(g).astype(np.float64) for (key, expert), g in grams.items() if key == (name, axis)}
        if None in of_layer:
            found.append((labels, _relative(_products(weight, axis, len(labels), of_layer[None]))))
            continue
        products = {e: _products(weight[e], axis - 1, len(labels), gram) for e, gram in of_layer.items()}
        energies = np.array([products[e].sum() if e in products else 0.0 for e in range(len(weight))])
        found.append((labels, _relative(np.sum(list(products.values()), axis=0))))
        if (name, 0) in graph.axes:
            found.append((graph.axes[name, 0], _relative(np.diag(energies))))
    return found


def _check_columns(name: str, columns: int) -> None:
    if columns > MOST_COLUMNS:
        raise UsageError(
            f"The errors of the outputs of {name!r} need a matrix of {columns:,} × {columns:,} numbers.",
            f"At most {MOST_COLUMNS:,} inputs of an output are supported.",
            "Exclude the layer before it, or use another importance, such as 'wanda'.",
        )


def _relative(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return products relative to the sum of the squares of the outputs, which is the sum of all products."""
    energy = products.sum()
    return products / energy if energy > 0 else products


def _products(weight: NDArray[np.float64], axis: int, channels: int, gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the products of the contributions of the channels of one layer; see `contribution_products`.

    Args:
        weight, axis: the weight, and the axis over which its products with the activations are summed.
        channels: number of channels, of all groups.
        gram: products of activations, shape (groups, columns, columns). The columns of a channel, one for each position
            of the kernel, follow each other.
    """
    groups, columns = gram.shape[:2]
    size = channels // groups
    rows = weight.reshape(groups, -1, columns)
    if not axis:  # a product x @ W, or a transposed convolution: (inputs, outputs, kernel ...)
        rows = weight.reshape(groups, size, -1, columns // size).swapaxes(1, 2).reshape(groups, -1, columns)
    products = gram * (rows.swapaxes(1, 2) @ rows)
    blocks = products.reshape(groups, size, columns // size, size, columns // size).sum((2, 4))
    result = np.zeros((channels, channels))
    for group, block in enumerate(blocks):
        part = slice(group * size, (group + 1) * size)
        result[part, part] = block
    return result


def labels_in(batch: Batch) -> int:
    """Return over how many labels the loss of a batch is averaged; labels equal to -100 do not count."""
    labels = host(batch.targets)
    return int((labels != IGNORED).sum()) if labels.dtype.kind in "iu" else len(batch)
