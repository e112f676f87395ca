"""Terms of the training loss that drive weights or channels towards zero, in preparation for pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from kirsch.annotations import Between
from kirsch.arguments import checked
from kirsch.errors import UsageError
from kirsch.frameworks.find import framework_of


@checked
@dataclass(frozen=True)
class L1:
    """strength · Σ |w| over all weights of two or more axes.

    Args:
        strength: >= 0; 1e-5 to 1e-4 is usual.

    Source: Han et al. 2015, arXiv:1506.02626, section 3.1.
    """

    strength: Annotated[float, Between(0)]

    def __call__(self, model: Any) -> Any:
        """Return the term, a scalar with gradient."""
        return self.strength * sum(abs(weight).sum() for weight in framework_of(model).training.weight_arrays(model))


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
