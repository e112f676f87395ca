"""New weights and biases of a layer that has lost inputs, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RIDGE = 1e-3
"""Weight of the ridge, relative to the mean square of the inputs of the layer; see docs/compensation.md."""


@dataclass
class Products:
    """Sums over calibration positions for one layer.

    x is the input of the layer in the pruned model, and y the output of the layer in the original, without bias. A
    convolution with G groups is G layers, each with I inputs and O outputs; other layers have G = 1.

    Args:
        count: number of positions.
        x, y: sums of inputs and outputs, shapes (G, I) and (G, O).
        xx, yx: sums of products, shapes (G, I, I) and (G, O, I).
        yy: sum of the squares of all outputs.
    """

    count: int
    x: Array
    y: Array
    xx: Array
    yx: Array
    yy: float

    def added_to(self, other: Products | None) -> Products:
        """Add these sums to those of other positions, in place, and return them; None stands for no positions."""
        if other is None:
            return self
        other.count += self.count
        other.x += self.x
        other.y += self.y
        other.xx += self.xx
        other.yx += self.yx
        other.yy += self.yy
        return other

    @property
    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return all(np.isfinite(values).all() for values in (self.x, self.y, self.xx, self.yx, self.yy))


def relative_error(products: Products, weight: Array, shift: Array) -> float:
    """Return the RMS of y - (W x + d), relative to the RMS of y; 0 if both are 0.

    Args:
        products: sums of x and y.
        weight: W, shape (G, O, I).
        shift: d, the change of the bias, shape (G, O).
    """
    squared = products.yy - 2 * (weight * products.yx).sum() + (weight @ products.xx * weight).sum()
    predicted = np.einsum("goi,gi->go", weight, products.x)
    squared += products.count * (shift**2).sum() - 2 * (shift * (products.y - predicted)).sum()
    squared = max(float(squared), 0.0)  # rounding may give a negative number
    if squared == 0:
        return 0.0
    return float(np.sqrt(squared / products.yy)) if products.yy > 0 else float("inf")


def mean_shift(products: Products, weight: Array) -> Array:
    """Return the change of the bias with which the mean output of the layer is that of the original, shape (G, O).

    If x are the kept inputs in the original, this is the mean of each removed input times its weights.

    Source: An et al. 2024, arXiv:2312.11983, baseline bias compensation.
    """
    return np.asarray((products.y - np.einsum("goi,gi->go", weight, products.x)) / products.count)


def least_squares(products: Products, weight: Array, *, intercept: bool, ridge: float = RIDGE) -> tuple[Array, Array]:
    """Return the weight W' and the change d of the bias that minimize Σ |y - W' x - d|² + λ |W' - W|².

    The ridge pulls the solution towards the weight W of the pruned layer, not towards 0, so that inputs which are
    constant or redundant on the calibration data keep their weights. λ is `ridge` times the mean diagonal entry of the
    matrix of the products of the inputs.

    Args:
        products: sums of x and y.
        weight: W, shape (G, O, I).
        intercept: whether d is free; otherwise it is 0.
        ridge: at least 0; with 0, the products of the inputs must be an invertible matrix.

    Returns:
        W', shape (G, O, I), and d, shape (G, O).
    """
    xx, yx = products.xx, products.yx
    if intercept:
        mean = products.x / products.count
        xx = xx - products.x[:, :, None] * mean[:, None, :]
        yx = yx - products.y[:, :, None] * mean[:, None, :]
    fitted = weight.copy()
    for group, (matrix, residual) in enumerate(zip(xx, yx - weight @ xx, strict=True)):
        if matrix.diagonal().max() > 0:  # otherwise the inputs are constant, and the weight has no effect
            fitted[group] += _solved(matrix, residual.T, ridge * float(matrix.diagonal().mean())).T
    return fitted, mean_shift(products, fitted) if intercept else np.zeros_like(products.y)


def _solved(matrix: Array, right: Array, damping: float) -> Array:
    """Return the solution of (matrix + damping · 1) X = right for a positive semidefinite matrix.

    The damping is increased tenfold as long as the matrix is not positive definite: sums in float32 have rounding
    errors relative to the largest input, which may exceed the damping if some inputs are much larger than the others.
    """
    while True:
        damped = matrix.copy()  # up to 10,000 × 10,000 numbers: no further copy
        np.fill_diagonal(damped, matrix.diagonal() + damping)
        try:
            return np.asarray(cho_solve(cho_factor(damped, overwrite_a=True), right))
        except LinAlgError:
            damping = max(10 * damping, float(np.finfo(np.float32).eps) * float(matrix.diagonal().max()))
