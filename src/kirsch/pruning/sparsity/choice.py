"""Choice of the zeros of a model: masks from scores, pattern and sparsity."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import NumericError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.pruning.sparsity import inputs, obs
from kirsch.pruning.sparsity.matrix import from_matrix, matrix_shape, to_matrix
from kirsch.pruning.sparsity.selection import smallest, smallest_in_rows, smallest_of_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.frameworks.masking import WeightMatrix
    from kirsch.pruning.sparsity.options import SparsityOptions

MOST_COLUMNS = 16_384
"""Largest number of inputs of an output for "sparsegpt", which computes with square matrices of this size."""

GRAM_BYTES = 2**30
"""Memory for the matrices of "sparsegpt"; the data is read again for each set of layers that fit."""


@dataclass
class Choice:
    """Masks and new weights by the name of the parameter, in the shapes of the parameters.

    Args:
        masks: False where the weight is zero.
        values: new values of the weights that are updated.
        unused: layers that do not run on the calibration data, and are left as they are.
    """

    masks: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    values: dict[str, NDArray[Any]] = field(default_factory=dict)
    unused: list[WeightMatrix] = field(default_factory=list)


class Chooser:
    """Chooses the zeros of the weights of a model.

    A weight that was masked before stays masked, and counts towards the sparsity.

    Args:
        model: the model without masks; the importance runs it on the data, and "sparsegpt" changes its weights.
        weights: the weights to choose from.
        masks: earlier masks by name; a name without one has no masked weights.
        options: pattern, sparsity and importance.
        data: calibration data; None if the importance needs none.
    """

    def __init__(
        self,
        model: Any,
        weights: Sequence[WeightMatrix],
        masks: Mapping[str, NDArray[np.bool_]],
        options: SparsityOptions,
        data: Any,
    ) -> None:
        self._model, self._weights, self._masks, self._options, self._data = model, weights, masks, options, data
        self._pattern = options.form
        self._squares: dict[str, NDArray[np.float64]] = {}

    def choose(self) -> Choice:
        """Return the masks, and the weights that change."""
        if self._options.importance == "sparsegpt":
            return self._by_obs()
        choice = Choice()
        weights = list(self._weights)
        if self._options.importance == "wanda":
            self._squares = inputs.squares(self._model, self._data, weights)
            choice.unused = [weight for weight in weights if weight.name not in self._squares]
            weights = [weight for weight in weights if weight.name in self._squares]
        for weight, mask in self._global(weights) if self._options.is_global else map(self._local, weights):
            choice.masks[weight.name] = from_matrix(mask & self._earlier(weight), weight)
        return choice

    # ------------------------------------------------------------------------------------------------ scores

    def _scores(self, weight: WeightMatrix) -> NDArray[np.float32]:
        """Return the scores of the weights of a layer, float32, shape (groups, rows, kernel, columns).

        "magnitude": |w|. "wanda": |w| times the norm of the input (Sun et al. 2024, arXiv:2306.11695, equation 1), for
        each position of a kernel.
        """
        if self._options.importance == "random":
            seed = [self._options.seed, zlib.crc32(weight.name.encode())]
            scores: NDArray[np.float32] = np.random.default_rng(seed).random(matrix_shape(weight), np.float32)
            return scores
        values = self._values(weight)
        scores = np.abs(to_matrix(values, weight)).astype(np.float32)
        if self._options.importance == "wanda":
            scores *= np.sqrt(self._squares[weight.name]).astype(np.float32)[:, None]
        if not np.isfinite(scores).all():
            raise NumericError(
                f"The weight `{weight.name}` contains NaN or infinity.", "It cannot be ranked.", "Check the weights."
            )
        return scores

    def _values(self, weight: WeightMatrix) -> NDArray[Any]:
        values: NDArray[Any] = framework_of(self._model).masking.values(self._model, weight.name)
        return values

    def _earlier(self, weight: WeightMatrix) -> NDArray[np.bool_]:
        """Return the earlier mask of a weight as a matrix; all True if there is none."""
        mask = self._masks.get(weight.name)
        return np.ones(matrix_shape(weight), bool) if mask is None else to_matrix(mask, weight)

    # ------------------------------------------------------------------------------------------------ masks

    def _local(self, weight: WeightMatrix) -> tuple[WeightMatrix, NDArray[np.bool_]]:
        """Return a weight with its mask, for the same sparsity in each layer; with "wanda", in each row."""
        scores, earlier = self._scores(weight), self._earlier(weight)
        if self._pattern.is_ratio:
            return weight, self._pattern.ratio_mask(np.where(earlier, scores, np.float32(-1)))
        free = self._free_units(earlier)
        units = np.where(free, self._pattern.units(scores), np.float32(-1))
        if self._options.importance == "wanda" and not self._pattern.is_block:
            rows = units.reshape(units.shape[0] * units.shape[1], -1)
            counts = np.full(len(rows), round(self._options.fraction * rows.shape[1]))
            removed = smallest_in_rows(rows, counts).reshape(units.shape)
        else:
            removed = smallest(units, round(self._options.fraction * units.size))
        return weight, self._pattern.spread(~removed)

    def _free_units(self, earlier: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which blocks have a weight that is not masked yet."""
        return self._pattern.units(earlier.astype(np.float32)) > 0

    def _global(self, weights: Sequence[WeightMatrix]) -> Iterator[tuple[WeightMatrix, NDArray[np.bool_]]]:
        """Yield each weight with its mask, for the smallest scores of all layers."""

        def units(weight: WeightMatrix) -> NDArray[np.float32]:
            scores = self._pattern.units(self._scores(weight)) + np.float32(1e-30)
            return np.where(self._free_units(self._earlier(weight)), scores, np.float32(0))

        sizes = [weight.size // (self._pattern.rows * self._pattern.columns) for weight in weights]
        sources = [partial(units, weight) for weight in weights]
        for index, removed in smallest_of_all(sources, round(self._options.fraction * sum(sizes))):
            yield weights[index], self._pattern.spread(~removed)

    # ------------------------------------------------------------------------------------------------ SparseGPT

    def _by_obs(self) -> Choice:
        """Return the choice of SparseGPT, block after block in the order of a run.

        The inputs of a block are those of the model in which all earlier blocks have their zeros already, so that the
        updates of a block also compensate for the errors of the earlier ones (Frantar, Alistarh 2023,
        arXiv:2301.00774, section 4). The data runs through the model once for each block.
        """
        choice = Choice()
        for block in self._blocks():
            values = {}
            for weights in self._sets_in_memory(block):
                grams = inputs.grams(self._model, self._data, weights)
                choice.unused += [weight for weight in weights if weight.name not in grams]
                for weight in (weight for weight in weights if weight.name in grams):
                    choice.masks[weight.name], values[weight.name] = self._pruned(weight, grams.pop(weight.name))
            framework_of(self._model).masking.hold(self._model, {}, values)
            choice.values |= values
        return choice

    def _blocks(self) -> list[list[WeightMatrix]]:
        """Return the weights of each block, in the order of a run; weights that did not run come last.

        A block is an element of the outermost list of modules, such as `layers.3`, or a layer outside any list.
        """
        order = {name: index for index, name in enumerate(inputs.order_of(self._model, self._data, self._weights))}
        blocks: dict[str, list[WeightMatrix]] = {}
        for weight in sorted(self._weights, key=lambda weight: order.get(weight.name, len(order))):
            parts = weight.layer.split(".")
            end = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
            blocks.setdefault(".".join(parts[: end + 1]), []).append(weight)
        return list(blocks.values())

    def _sets_in_memory(self, weights: Sequence[WeightMatrix]) -> Iterator[list[WeightMatrix]]:
        """Yield sets of weights whose matrices fit into the memory together."""
        current: list[WeightMatrix] = []
        total = 0
        for weight in weights:
            groups, _, kernel, columns = matrix_shape(weight)
            if kernel * columns > MOST_COLUMNS:
                raise UsageError(
                    f'importance="sparsegpt" needs a matrix of {kernel * columns:,} × {kernel * columns:,} numbers for '
                    f"`{weight.layer}`.",
                    f"At most {MOST_COLUMNS:,} inputs of an output are supported.",
                    f"Exclude the layer, exclude={weight.layer!r}, or use importance='wanda'.",
                )
            size = 8 * groups * (kernel * columns) ** 2
            if current and total + size > GRAM_BYTES:
                yield current
                current, total = [], 0
            current.append(weight)
            total += size
        if current:
            yield current

    def _pruned(self, weight: WeightMatrix, grams: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        """Return mask and updated values of a weight."""
        values = self._values(weight)
        matrix, earlier = to_matrix(values, weight).astype(np.float64), self._earlier(weight)
        shape = matrix.shape[1:]
        masks, updated = np.ones(matrix.shape, bool), matrix
        for group, gram in enumerate(grams):
            try:
                factor = obs.inverse_factor(gram)
            except np.linalg.LinAlgError as error:
                raise NumericError(
                    f"The inputs of `{weight.layer}` are almost linearly dependent, and their matrix has no inverse.",
                    fix='Give more samples, exclude the layer, or use importance="wanda".',
                ) from error
            flat, before = matrix[group].reshape(shape[0], -1), earlier[group].reshape(shape[0], -1)
            choose, width = self._column_choice(before)
            mask, new = obs.prune_columns(flat, factor, choose, width)
            masks[group], updated[group] = mask.reshape(shape), new.reshape(shape)
        return from_matrix(masks, weight), from_matrix(updated, weight).astype(values.dtype)

    def _column_choice(self, earlier: NDArray[np.bool_]) -> tuple[Any, int]:
        """Return the function that chooses the zeros in some columns, and the number of these columns."""
        pattern, fraction = self._pattern, self._options.fraction
        rows, columns = earlier.shape
        if pattern.is_ratio:

            def in_ratio(start: int, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
                before = earlier[:, start : start + scores.shape[1]]
                free = np.where(before, scores, -1)[None, :, None]
                return pattern.ratio_mask(free)[0, :, 0] & before

            return in_ratio, pattern.of
        done = 0

        def lowest(start: int, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
            nonlocal done
            end = start + scores.shape[1]
            before = earlier[:, start:end]
            units = pattern.units(scores[None, :, None])
            free = self._free_units(before[None, :, None])
            total = round(fraction * rows * end / (pattern.rows * pattern.columns))
            count = min(max(total - done, int((~free).sum())), units.size)
            done += count
            return pattern.spread(~smallest(np.where(free, units, -1), count))[0, :, 0] & before

        return lowest, min(max(obs.LAZY // pattern.columns, 1) * pattern.columns, columns)
