"""What a verification found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verification:
    """The pruned model held against the original with the removed units masked.

    Args:
        error: largest difference of any output, relative to the largest output.
        tolerance: the error that is allowed.
        reason: why that tolerance.
        power: how far the masked original lies from the dense one, in the same measure. A check with power 0 compares
            two unchanged models and proves nothing.
        statistics: operations whose statistics span a cut axis; they were evaluated over what is kept, so that the
            function itself differs from the plainly masked one.
        unseen: modules that were cut where no output depends on them for the example inputs, such as the queries and
            keys of a single token: a wrong cut there would pass.
    """

    error: float
    tolerance: float
    reason: str
    power: float
    statistics: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance

    @property
    def text(self) -> str:
        """One sentence for the terminal and the report."""
        spans = f"; statistics of {len(self.statistics)} operations follow the kept width" if self.statistics else ""
        verdict = "equal to" if self.passed else "not equal to"
        return f"{verdict} the masked original: error {self.error:.0e}, allowed {self.tolerance:.0e}{spans}"

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
        }
