"""L1 norm of the scales of batch normalizations (Network Slimming)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from kirsch.annotations import Between
from kirsch.arguments import checked
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of


@checked
@dataclass(frozen=True)
class Slimming:
    """strength · Σ |γ| over the scales of all batch normalizations (Network Slimming).

    Args:
        strength: >= 0; 1e-5 to 1e-4 is usual.

    Source: Liu et al. 2017, arXiv:1708.06519, equation 1.
    """

    strength: Annotated[float, Between(0)]

    def __call__(self, model: Any) -> Any:
        """Return the term, a scalar with gradient.

        Raises:
            UsageError: the model has no batch normalization with a scale.
        """
        scales = list(framework_of(model).training.batch_norm_scales(model))
        if not scales:
            raise UsageError(
                f"A {type(model).__name__} has no batch normalization with a scale.",
                "Network Slimming penalizes these scales.",
                "Use L1 instead.",
            )
        return self.strength * sum(abs(scale).sum() for scale in scales)
