"""Agreement of the outputs of an exported file with those of its model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import DataError, NumericError, ShapeError
from kirsch.measurement.outputs import check_outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_VARIATION = 1e-6
"""The reference counts as nearly constant if differences between samples make up at most this fraction of its squared
norm."""


@dataclass(frozen=True)
class Agreement:
    """Comparison of two sets of outputs for the same samples.

    Outputs that are infinite in both sets count as equal and are left out of the differences.

    Args:
        same_labels: number of samples with the same predicted class.
        n: number of samples.
        max_error: largest absolute difference.
        relative: norm of the difference divided by the norm of the reference.
        centered: as `relative`, after subtracting from both sets their mean over the samples. A large constant in the
            outputs hides differences in `relative`, but not here.
    """

    same_labels: int
    n: int
    max_error: float
    relative: float
    centered: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)


def agreement(reference: NDArray[Any], outputs: NDArray[Any]) -> Agreement:
    """Compare outputs with reference outputs.

    Args:
        reference: outputs of the model, shape (N, K), K classes.
        outputs: outputs of the file, shape (N, K).

    Raises:
        ShapeError: the shapes differ.
        DataError: there are no samples, or the reference is nearly constant over the samples, so that a comparison
            would not detect a file that ignores its inputs.
        NumericError: a sample has NaN, +inf or no finite output, or an output is infinite in one set only.
    """
    if reference.shape != outputs.shape:
        raise ShapeError(f"Outputs of shape {outputs.shape} cannot be compared with a reference of {reference.shape}.")
    if not len(reference):
        raise DataError("There are no outputs to compare.", fix="Pass at least one sample.")
    check_outputs(reference, "reference")
    check_outputs(outputs, "file")
    infinite = ~(np.isfinite(reference) & np.isfinite(outputs))
    differs = infinite & (reference != outputs)
    if differs.any():
        raise NumericError(
            f"An output of sample {int(np.argwhere(differs)[0][0])} is infinite in only one of reference and file.",
            "One of the two overflows or computes another function.",
            "Look for large numbers in the model, such as 1e38 in a mask.",
        )
    labels, reference_labels = outputs.argmax(-1), reference.argmax(-1)
    a, b = (np.where(infinite, 0.0, values.astype(np.float64)) for values in (reference, outputs))
    centered_a, centered_b = a - a.mean(0), b - b.mean(0)
    if len(a) > 1 and (centered_a**2).sum() <= LEAST_VARIATION * (a**2).sum():  # both are 0 if all outputs are 0
        raise DataError(
            "The outputs of the reference hardly depend on its inputs.",
            "A file that ignores its inputs would seem to agree.",
            "Compare a trained model on real samples.",
        )
    return Agreement(
        same_labels=int((labels == reference_labels).sum()),
        n=len(a),
        max_error=float(np.abs(a - b).max()),
        relative=_norm(a - b) / max(_norm(a), 1e-300),
        centered=_norm(centered_a - centered_b) / max(_norm(centered_a), 1e-300),
    )


def _norm(values: NDArray[np.float64]) -> float:
    return float(np.sqrt((values**2).sum()))
