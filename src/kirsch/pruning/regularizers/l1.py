"""L1 norm of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from kirsch.annotations import Between
from kirsch.arguments import checked
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
