"""What a verification found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


UNUSUAL_LAYERS = "the unusual layers"
"""Words of an error that `kirsch.prune` replaces with the names of the layers, once these are found."""


@dataclass(frozen=True)
class Verification:
    """The pruned model held against the original with the removed units masked.

    Args:
        error: largest difference of any output, relative to the largest output.
        tolerance: the error that is allowed.
        reason: why that tolerance.
        power: how far the masked original lies from the dense one: the largest difference of any output relative to the
            larger of both, from 0 to 2. With power 0 two unchanged models are compared, and nothing is verified.
        statistics: operations whose statistics span a cut axis; they were evaluated over what is kept, so that the
            function itself differs from the plainly masked one.
        unseen: modules that were cut where no output depends on them for the example inputs, such as the queries and
            keys of a single token: a wrong cut there would pass.
        reweighted: path of each module that computes its weight from its parameters, as spectral normalization does,
            where that weight changes for the units that stay → its size (RMS) relative to before.
    """

    error: float
    tolerance: float
    reason: str
    power: float
    statistics: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    reweighted: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance

    @property
    def text(self) -> str:
        """One sentence for the terminal and the report."""
        spans = f"; statistics of {len(self.statistics)} operations follow the kept width" if self.statistics else ""
        verdict = "equal to" if self.passed else "not equal to"
        changed = f"; the computed weights of {len(self.reweighted)} modules change" if self.reweighted else ""
        return f"{verdict} the masked original: error {self.error:.0e}, allowed {self.tolerance:.0e}{spans}{changed}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON, which knows neither NaN nor infinity: they become null."""
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
        }
