"""Check that a model returns the same outputs for the same inputs."""

from __future__ import annotations

from typing import Any

from kirsch.errors import NumericError
from kirsch.frameworks.find import framework_of


def require_deterministic(model: Any, inputs: Any) -> None:
    """Check that two forward passes in inference mode return the same outputs.

    Args:
        model: model in any mode; the mode is not changed.
        inputs: inputs of one batch, as numpy arrays.

    Raises:
        NumericError: the outputs differ. The message names the line that draws random numbers, or the state that
            changes, if it can be found.
    """
    why, fix = framework_of(model).inference.nondeterminism(model, inputs)
    if why:
        what = f"The model {type(model).__name__} returns different outputs for the same inputs in inference mode."
        raise NumericError(what, why, fix)
