"""Statistics of the activations that the weights of a model read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.data.arrays import host
from kirsch.errors import NumericError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from numpy.typing import NDArray

    from kirsch.data.batches import Batch
    from kirsch.frameworks.protocols import Calibration
    from kirsch.graph.graph import Graph
    from kirsch.graph.labels import Labels


@dataclass
class Read:
    """Statistics of the activations that one weight reads, over all positions of all samples; arrays (channels,).

    Args:
        name, axis: the weight, and the axis over which its products with the activations are summed.
        labels: labels of the channels.
        count: number of positions.
        total, absolute, squares, nonzero: sums over the positions of x, |x|, x², and the number of values that are
            not 0.
    """

    name: str
    axis: int
    labels: Labels
    count: int
    total: NDArray[np.float64]
    absolute: NDArray[np.float64]
    squares: NDArray[np.float64]
    nonzero: NDArray[np.float64]

    @property
    def mean_absolute(self) -> NDArray[np.float64]:
        """Mean of |x| of each channel."""
        return self.absolute / self.count

    @property
    def root_mean_square(self) -> NDArray[np.float64]:
        """Root of the mean of x² of each channel."""
        return np.asarray(np.sqrt(self.squares / self.count))

    @property
    def variance(self) -> NDArray[np.float64]:
        """Variance of each channel over the positions."""
        return np.maximum(self.squares / self.count - (self.total / self.count) ** 2, 0)

    @property
    def share_of_nonzero(self) -> NDArray[np.float64]:
        """Fraction of the values of each channel that are not 0."""
        return self.nonzero / self.count


def read_statistics(graph: Graph, calibration: Calibration, batches: Iterable[Batch]) -> dict[str, Read]:
    """Return the statistics of the activations that each weight reads, by the path of the weight.

    Positions that an attention mask marks as padding do not count. Memory does not grow with the number of batches.

    Raises:
        NumericError: an activation is NaN or infinite.
    """
    found: dict[str, Read] = {}
    for batch in batches:
        masks = _masks(batch)

        def see(name: str, axis: int, labels: Labels | None, x: Any, masks: list[Any] = masks) -> None:
            if labels is None:
                return
            x = _unpadded(x, masks)
            x = ops.upcast(x)
            total, absolute, squares = (host(ops.sum(value, 0)).astype(np.float64) for value in (x, ops.abs(x), x * x))
            if not np.isfinite(squares).all():
                raise NumericError(
                    f"The activations that {name!r} reads contain NaN or infinity.",
                    "The units cannot be ranked.",
                    "Check the weights of the model and the calibration data.",
                )
            nonzero = host(ops.count_nonzero(x, 0)).astype(np.float64)
            new = Read(name, axis, labels, x.shape[0], total, absolute, squares, nonzero)
            old = found.get(name)
            found[name] = new if old is None else _added(old, new)

        calibration.reads(graph, batch.inputs, see)
    return found


def _added(first: Read, second: Read) -> Read:
    return Read(
        first.name,
        first.axis,
        first.labels,
        first.count + second.count,
        first.total + second.total,
        first.absolute + second.absolute,
        first.squares + second.squares,
        first.nonzero + second.nonzero,
    )


def _masks(batch: Batch) -> list[Any]:
    """Return the masks of positions in the inputs of a batch, flat, True where a position counts."""
    inputs = batch.inputs if isinstance(batch.inputs, dict) else {}
    names = ("attention_mask", "decoder_attention_mask")
    masks = [host(inputs[name]) != 0 for name in names if inputs.get(name) is not None]
    return [mask.ravel() for mask in masks if mask.ndim == len("NL") and not mask.all()]


def _unpadded(x: Any, masks: list[Any]) -> Any:
    """Return the rows of x that a mask of as many positions keeps."""
    mask = next((mask for mask in masks if len(mask) == x.shape[0]), None)
    return x if mask is None else x[mask]


def column_sums(graph: Graph, read: Read, power: int) -> NDArray[np.float64]:
    """Return the sum of |w|^power over the weights that multiply each channel, shape (channels,)."""
    powers = np.abs(graph.values(read.name).astype(np.float64)) ** power
    groups = len(read.labels) // powers.shape[read.axis]  # a convolution with groups: (output channels, columns, ...)
    if groups == 1:
        return np.asarray(powers.sum(tuple(other for other in range(powers.ndim) if other != read.axis)))
    by_group = powers.reshape(groups, -1, powers.shape[1], int(np.prod(powers.shape[2:])))
    return np.asarray(by_group.sum((1, 3)).ravel())


SAMPLED = 64
"""Largest number of outputs of a layer per sample whose errors are computed; the others are left out evenly."""


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
        the squares of the outputs.
    """
    grams: dict[str, Any] = {}  # name → sum of the products of the activations that the layer reads
    layers: dict[str, tuple[Labels, int]] = {}
    for batch in batches:
        masks, most = _masks(batch), SAMPLED * len(batch)

        def see(
            name: str, axis: int, labels: Labels, groups: int, x: Any, masks: Any = masks, most: int = most
        ) -> None:
            x = ops.upcast(_unpadded(x, masks))
            x = x[:: max(1, x.shape[0] // most)]
            rows = ops.reshape(x, (x.shape[0], groups, -1))
            gram = ops.einsum("pgi,pgj->gij", rows, rows)
            grams[name] = grams[name] + gram if name in grams else gram
            layers[name] = labels, axis

        calibration.patches(graph, batch.inputs, names, see)
    return [(layers[name][0], _products(graph, name, *layers[name], host(gram))) for name, gram in grams.items()]


def _products(graph: Graph, name: str, labels: Labels, axis: int, gram: NDArray[Any]) -> NDArray[np.float64]:
    """Return the products of the contributions of the channels of one layer; see `contribution_products`.

    `gram`: products of activations, shape (groups, columns, columns). The columns of a channel, one for each position
    of the kernel, follow each other.
    """
    groups, columns = gram.shape[:2]
    channels = len(labels) // groups
    weight = graph.values(name).astype(np.float64)
    # Axis 0 is that of a product x @ W, or of a transposed convolution.
    rows = weight.reshape(groups, -1, columns) if axis else weight.reshape(groups, channels, -1).swapaxes(1, 2)
    products = gram.astype(np.float64) * (rows.swapaxes(1, 2) @ rows)
    blocks = products.reshape(groups, channels, columns // channels, channels, columns // channels).sum((2, 4))
    result = np.zeros((len(labels), len(labels)))
    for group, block in enumerate(blocks):
        part = slice(group * channels, (group + 1) * channels)
        result[part, part] = block
    energy = result.sum()
    return result / energy if energy > 0 else result
