"""Optimal brain surgeon for a whole weight matrix (SparseGPT): choice of zeros, and update of the other weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import linalg

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Choose = Callable[[int, NDArray[np.float64]], NDArray[np.bool_]]

LAZY = 128
"""Columns whose updates are applied to the later columns together; they only save time."""

DAMPING = 0.01
"""Multiple of the identity that is added to the Hessian, relative to the mean of its diagonal."""


def inverse_factor(gram: NDArray[np.float64], damping: float = DAMPING) -> NDArray[np.float64]:
    """Return the upper triangular U with (H + λ)⁻¹ = Uᵀ U; λ is `damping` times the mean of the diagonal of H.

    The first row of U[j:, j:] is proportional to the first row of the inverse of H[j:, j:] + λ, so that all inverses of
    the method are in one matrix.

    Args:
        gram: H = Σ x xᵀ over the inputs of the layer, shape (columns, columns).
        damping: at least 0; above 0, an input that is always zero does not make the matrix singular.

    Raises:
        numpy.linalg.LinAlgError: the matrix is not positive definite.

    Source: Frantar, Alistarh 2023, arXiv:2301.00774, section 3.3 and algorithm 1.
    """
    hessian = gram.copy()
    hessian.flat[:: len(hessian) + 1] += damping * (np.mean(np.diag(hessian)) or 1.0)
    lower = linalg.cholesky(hessian, lower=True, overwrite_a=True)
    inverse = linalg.cho_solve((lower, True), np.eye(len(lower)), overwrite_b=True)
    return np.asarray(linalg.cholesky(inverse, lower=False, overwrite_a=True))


def prune_columns(
    weight: NDArray[np.float64], factor: NDArray[np.float64], choose: Choose, width: int, lazy: int = LAZY
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return the mask (False: zero) and the updated weights of one matrix.

    The columns are processed from the first to the last. When a weight w_j becomes zero, the later weights of its row
    change by -w_j / U_jj · U_j, which minimizes the squared error of the output of the row. The increase of the error
    is w_j² / U_jj², which is the score by which the zeros are chosen.

    Args:
        weight: shape (rows, columns).
        factor: U of `inverse_factor`, shape (columns, columns).
        choose: called as choose(start, scores) for `width` columns at a time, with the scores of the updated weights,
            shape (rows, width); returns their mask.
        width: number of columns for which zeros are chosen together.
        lazy: number of columns whose updates are applied to the later columns together.

    Source: Frantar, Alistarh 2023, arXiv:2301.00774, algorithm 1.
    """
    weight = weight.copy()
    columns = weight.shape[1]
    mask = np.ones(weight.shape, bool)
    step = max(lazy // width, 1) * width  # so that no choice spans two steps
    diagonal = np.diag(factor)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        errors = np.zeros((len(weight), end - start))
        for j in range(start, end):
            if (j - start) % width == 0:
                part = slice(j, min(j + width, columns))
                mask[:, part] = choose(j, (weight[:, part] / diagonal[part]) ** 2)
            error = np.where(mask[:, j], 0.0, weight[:, j] / factor[j, j])
            weight[:, j:end] -= np.outer(error, factor[j, j:end])
            errors[:, j - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    weight[~mask] = 0.0  # up to rounding, they are zero already
    return mask, weight
