"""Statistics of the inputs of layers on calibration data: sums of squares, and of products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.data.arrays import host
from kirsch.errors import DataError, NumericError
from kirsch.frameworks.find import framework_of
from kirsch.pruning.importance.calibration import read_batches
from kirsch.pruning.importance.padding import without_padding
from kirsch.pruning.sparsity.matrix import matrix_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kirsch.frameworks.masking import WeightMatrix

Reduce = Callable[[Any], Any]


def squares(model: Any, data: Any, weights: Sequence[WeightMatrix]) -> dict[str, NDArray[np.float64]]:
    """Return the sum of x² over all positions for each column, shape (groups, kernel, columns), by name of the weight.

    A layer that does not run on the data is missing.
    """
    shapes = {weight.name: matrix_shape(weight) for weight in weights}
    sums = _sums(model, data, weights, lambda rows: ops.sum(rows * rows, 0))
    return {name: total.reshape(shapes[name][0], *shapes[name][2:]) for name, total in sums.items()}


def grams(model: Any, data: Any, weights: Sequence[WeightMatrix]) -> dict[str, NDArray[np.float64]]:
    """Return the sum of x xᵀ over all positions, shape (groups, kernel · columns, kernel · columns), by name.

    A layer that does not run on the data is missing.
    """
    return _sums(model, data, weights, lambda rows: ops.einsum("pgi,pgj->gij", rows, rows))


def order_of(model: Any, data: Any, weights: Sequence[WeightMatrix]) -> list[str]:
    """Return the names of the weights in the order in which a run on the first batch reads them first.

    Weights that are not read are missing.
    """
    order: dict[str, None] = {}
    first = next(iter(read_batches(data, model)), None)
    if first is not None:  # `_sums` refuses data without batches
        names = [weight.name for weight in weights]
        framework_of(model).calibration.layer_inputs(
            model, first.inputs, names, lambda name, *_: order.setdefault(name)
        )
    return list(order)


def _sums(model: Any, data: Any, weights: Sequence[WeightMatrix], reduce: Reduce) -> dict[str, NDArray[np.float64]]:
    """Return the sums of `reduce(rows)` over all batches; rows have shape (positions, groups, kernel · columns).

    Padding does not count; see `kirsch.pruning.importance.activations.Padding`.
    """
    known: Mapping[str, WeightMatrix] = {weight.name: weight for weight in weights}
    found: dict[str, NDArray[np.float64]] = {}
    count = 0
    for batch, padding in without_padding(read_batches(data, model)):
        count += 1

        def see(name: str, axis: int, groups: int, x: Any, padding: Any = padding) -> None:
            del axis
            x = ops.upcast(padding.left_out(name, x, None))
            parts = ops.reshape(x, (x.shape[0], groups, x.shape[1] // groups, x.shape[2]))
            rows = ops.reshape(ops.einsum("pgck->pgkc", parts), (x.shape[0], groups, -1))
            total = host(reduce(rows)).astype(np.float64)
            if not np.isfinite(total).all():
                raise NumericError(
                    f"The inputs of `{known[name].layer or 'the model'}` contain NaN or infinity.",
                    "Its weights cannot be ranked.",
                    "Check the weights of the model and the calibration data.",
                )
            found[name] = found[name] + total if name in found else total

        framework_of(model).calibration.layer_inputs(model, batch.inputs, list(known), see)
    if not count:
        raise DataError("`data` of kirsch.sparsify has no batches.", fix="Give at least one batch.")
    return found
