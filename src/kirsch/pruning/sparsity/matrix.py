"""Weights of layers as matrices: the form in which patterns and scores are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.frameworks.masking import WeightMatrix

T = TypeVar("T", bound=np.generic)


def to_matrix(values: NDArray[T], weight: WeightMatrix) -> NDArray[T]:
    """Return the values of a weight, shape (groups, rows, kernel, columns).

    A row computes one output of a group, and a column multiplies one input of the group. `kernel` is the number of
    positions of the kernel, 1 for a linear layer. The columns are last, because patterns run along the inputs.
    """
    groups, kernel = weight.groups, int(np.prod(weight.shape[2:]))
    if weight.input_axis == 1:  # (outputs, inputs of a group, ...)
        outputs, columns = weight.shape[:2]
        return values.reshape(groups, outputs // groups, columns, kernel).transpose(0, 1, 3, 2)
    inputs, rows = weight.shape[:2]  # (inputs, outputs of a group, ...)
    return values.reshape(groups, inputs // groups, rows, kernel).transpose(0, 2, 3, 1)


def from_matrix(matrix: NDArray[T], weight: WeightMatrix) -> NDArray[T]:
    """Return the values of a weight in its own shape; the inverse of `to_matrix`."""
    axes = (0, 1, 3, 2) if weight.input_axis == 1 else (0, 3, 1, 2)
    return np.ascontiguousarray(matrix.transpose(axes).reshape(weight.shape))


def matrix_shape(weight: WeightMatrix) -> tuple[int, int, int, int]:
    """Return the shape of the matrix of a weight: groups, rows, kernel, columns."""
    groups, kernel = weight.groups, int(np.prod(weight.shape[2:]))
    outputs, inputs = weight.shape[1 - weight.input_axis], weight.shape[weight.input_axis]
    if weight.input_axis == 1:
        return groups, outputs // groups, kernel, inputs
    return groups, outputs, kernel, inputs // groups
