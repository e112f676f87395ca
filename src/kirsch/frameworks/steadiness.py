"""Whether a model gives the same outputs for the same inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import NumericError
from kirsch.frameworks.port import framework_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDING = 1e-5
"""Difference of two runs, as a share of the largest output, that the order of sums on a GPU can make."""


def require_steady(model: Any, inputs: tuple[Any, ...]) -> None:
    """Make sure that two runs in inference mode on the same inputs agree.

    Args:
        model: any mode; it keeps it.
        inputs: numpy arrays of one batch.

    Raises:
        NumericError: they do not, so that no comparison of outputs means anything.
    """
    framework = framework_of(model)
    first, second = framework.seeded(lambda: [framework.outputs(model, inputs) for _ in range(2)], 0)
    if len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True)):
        return
    raise NumericError(
        f"The model {type(model).__name__} gives other outputs at each run on the same inputs, in eval mode.",
        "It draws random numbers there, or changes its own state, so that no outputs can be compared with its own.",
        "Let it draw in training alone: F.dropout(x, p, training=self.training), `if self.training:`; "
        "or draw once and keep the numbers in a buffer.",
    )


def _same(first: NDArray[Any], second: NDArray[Any]) -> bool:
    if first.shape != second.shape:
        return False
    if not np.issubdtype(first.dtype, np.inexact):
        return bool((first == second).all())
    finite = np.abs(first[np.isfinite(first)])
    reach = ROUNDING * float(finite.max()) if finite.size else 0.0
    return bool(np.allclose(first, second, rtol=0, atol=reach, equal_nan=True))
