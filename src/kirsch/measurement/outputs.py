"""Checks of a model's outputs: whether they are finite, and whether they are probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import NumericError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEW_ROWS = 4
TIGHT, LOOSE = 1e-5, 5e-3
"""Tolerances of the sum of a row of probabilities: `TIGHT` for fewer than `FEW_ROWS` rows, whose sums may be near 1 by
chance; `LOOSE`, which allows for 16-bit rounding, for more rows."""
OF_SPREAD = 0.2
"""Largest range of the sums of scaled probabilities, as a fraction of the range of their values. Sums of independent
values have a larger range than the values."""


def are_probabilities(outputs: NDArray[Any]) -> bool:
    """Return whether outputs of shape (..., K) are probabilities: each row is non-negative and sums to 1.

    False for K = 1.
    """
    if outputs.ndim < 2 or outputs.shape[-1] < 2 or not outputs.size:  # noqa: PLR2004 - (N, K), and two classes
        return False
    rows = outputs.reshape(-1, outputs.shape[-1])
    tolerance = LOOSE if len(rows) >= FEW_ROWS else TIGHT
    return bool(rows.min() >= 0 and (abs(rows.sum(-1, dtype=np.float64) - 1) < tolerance).all())


def are_scaled_probabilities(outputs: NDArray[Any]) -> bool:
    """Return whether outputs of shape (..., K) are non-negative and all rows have the same sum, such as 100.

    False for fewer than `FEW_ROWS` rows, which may have the same sum by chance, and for rows whose sums differ about as
    much as their values: the logits of an untrained model hardly differ between samples, and neither do their sums.
    """
    rows = outputs.reshape(-1, outputs.shape[-1])
    sums = rows.sum(-1, dtype=np.float64)
    total = sums.mean()
    if len(rows) < FEW_ROWS or total <= 0 or np.ptp(sums) > OF_SPREAD * np.ptp(rows, axis=0).max():
        return False
    return are_probabilities(rows / total)


def check_outputs(outputs: NDArray[Any], source: str = "model") -> None:
    """Check that every sample has a predicted class.

    A logit of -inf is allowed beside finite ones, since it excludes a class.

    Args:
        outputs: logits or probabilities, shape (N, K).
        source: "model", "reference" or "file", for the message.

    Raises:
        NumericError: a sample has NaN, +inf or no finite output.
    """
    invalid = np.isnan(outputs).any(-1) | np.isposinf(outputs).any(-1) | ~np.isfinite(outputs).any(-1)
    if invalid.any():
        raise NumericError(
            f"The {source} returns NaN or infinity for {int(invalid.sum())} of {len(outputs)} samples, first for "
            f"sample {int(invalid.argmax())}.",
            "The predicted class of these samples is undefined.",
            "Check the weights for NaN, and that the inputs are preprocessed as the model expects.",
        )
