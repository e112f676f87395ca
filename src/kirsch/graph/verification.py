"""Result of the numerical verification of a pruned model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.tables import Part, Piece, Printable, Table

if TYPE_CHECKING:
    from collections.abc import Mapping


UNUSUAL_LAYERS = "the unusual layers"
"""Placeholder in an error: `kirsch.prune` replaces it with the groups and blocks whose removal fails by itself."""


@dataclass(frozen=True)
class Verification(Printable):
    """Comparison of the pruned model with the original model whose removed units are masked.

    Args:
        error: largest difference of any output, relative to the largest output.
        tolerance: largest error that is allowed.
        reason: reason for the tolerance.
        power: largest difference between the outputs of the masked and the unmasked original, relative to the larger of
            the two, 0 to 2. With power 0 the mask has no effect, and the comparison verifies nothing.
        statistics: operations with statistics over a pruned axis, such as layer normalization. In the masked original,
            too, they are computed over the kept units only.
        unseen: modules in which the units of a pruned group do not affect any output for the example inputs, such as
            the queries and keys of a single token. A wrong cut of these modules would not be detected.
        reweighted: modules whose weight is computed from parameters, as in spectral normalization, and changes for the
            kept units: module path → RMS of the new weight relative to the old weight.
        not_compared: comparisons that were left out, each with the reason, such as "training mode: the original raises
            RuntimeError."
        undetermined: the reason why `unseen` could not be determined; empty if it was.
    """

    error: float
    tolerance: float
    reason: str
    power: float
    statistics: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    reweighted: Mapping[str, float] = field(default_factory=dict)
    not_compared: tuple[str, ...] = ()
    undetermined: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the error is within the tolerance; False for NaN."""
        return self.error <= self.tolerance

    def __repr__(self) -> str:
        """Return one line."""
        return f"<kirsch.Verification: {self.text}>"

    def parts(self) -> list[Part]:
        """Return the result as a row of a table."""
        verdict = Piece("verified", "good") if self.passed else Piece("not verified", "bad")
        return [Table([[verdict, self.text]])]

    @property
    def text(self) -> str:
        """Return the result in one sentence, for the terminal and the report."""
        verdict = "equal to" if self.passed else "not equal to"
        statistics, modules = len(self.statistics), len(self.reweighted)
        notes = (
            f"; statistics of {figures.counted(statistics, 'operation')} computed over the kept units"
            if statistics
            else ""
        )
        notes += f"; the computed weights of {figures.counted(modules, 'module')} change" if modules else ""
        notes += "".join(f"; not compared: {left_out.rstrip('.')}" for left_out in self.not_compared)
        return f"{verdict} the masked original: error {self.error:.0e}, allowed {self.tolerance:.0e}{notes}"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON; NaN and infinity become null."""
        return {
            "text": self.text,
            "passed": self.passed,
            "error": self.error if math.isfinite(self.error) else None,
            "tolerance": self.tolerance,
            "reason": self.reason,
            "power": self.power if math.isfinite(self.power) else None,
            "statistics": list(self.statistics),
            "unseen": list(self.unseen),
            "reweighted": dict(self.reweighted),
            "not_compared": list(self.not_compared),
            "undetermined": self.undetermined,
        }
