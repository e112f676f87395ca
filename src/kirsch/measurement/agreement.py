"""Whether a file computes what its model computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import DataError, NumericError, ShapeError
from kirsch.measurement.quality import check_scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

VARIES = 1e-6
"""Share of a reference's energy that must vary over the samples for an agreement to mean anything."""


@dataclass(frozen=True)
class Agreement:
    """Two sets of scores for the same samples.

    Args:
        same_labels: samples with the same largest score.
        n: samples.
        max_error: largest absolute difference.
        relative: root of the squared differences over the root of the squared reference.
        centered: the same after the mean over samples is taken from both, since a constant hides drift.

    A score that is infinite in both sets of scores counts as equal and is left out of the differences.
    """

    same_labels: int
    n: int
    max_error: float
    relative: float
    centered: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def agreement(reference: NDArray[Any], found: NDArray[Any]) -> Agreement:
    """How far `found` lies from `reference`, both of shape (N, K).

    Raises:
        ShapeError: the shapes differ.
        DataError: no samples, or a reference that hardly depends on them, so that agreeing with it proves nothing.
        NumericError: a sample has NaN or no finite number among its scores, or one of the two is infinite alone.
    """
    if reference.shape != found.shape:
        raise ShapeError(f"Scores of shape {reference.shape} cannot be compared with {found.shape}.")
    if not len(reference):
        raise DataError("There are no scores to compare.", fix="Give at least one sample.")
    check_scores(reference, "reference")
    check_scores(found, "file")
    infinite = ~(np.isfinite(reference) & np.isfinite(found))
    apart = infinite & (reference != found)
    if apart.any():
        raise NumericError(
            f"The scores of sample {int(np.argwhere(apart)[0][0])} are infinite in one of two that should agree.",
            "One computes another function, or overflows.",
            "Look for large numbers in the model, such as 1e38 in a mask.",
        )
    labels = [scores.argmax(-1) for scores in (reference, found)]
    a, b = (np.where(infinite, 0.0, scores.astype(np.float64)) for scores in (reference, found))
    middle = a - a.mean(0)
    if len(a) > 1 and (middle**2).sum() <= VARIES * (a**2).sum():  # equal: all scores are zero
        raise DataError(
            "The outputs of the reference hardly depend on its inputs.",
            "An agreement with it would prove nothing.",
            "Compare on a trained model and real samples.",
        )
    centered = middle - (b - b.mean(0))
    return Agreement(
        same_labels=int((labels[0] == labels[1]).sum()),
        n=len(a),
        max_error=float(np.abs(a - b).max()),
        relative=_norm(a - b) / max(_norm(a), 1e-300),
        centered=_norm(centered) / max(_norm(middle), 1e-300),
    )


def _norm(values: NDArray[np.float64]) -> float:
    return float(np.sqrt((values**2).sum()))
