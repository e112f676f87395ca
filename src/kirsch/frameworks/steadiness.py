"""Whether a model gives the same outputs for the same inputs."""

from __future__ import annotations

from typing import Any

from kirsch.errors import NumericError
from kirsch.frameworks.port import framework_of


def require_steady(model: Any, inputs: tuple[Any, ...]) -> None:
    """Make sure that two runs in inference mode on the same inputs agree.

    Args:
        model: any mode; it keeps it.
        inputs: numpy arrays of one batch.

    Raises:
        NumericError: they do not, so that no comparison of outputs means anything; names the line that draws random
            numbers, or the state that changes, where it can be found.
    """
    why, fix = framework_of(model).unsteady(model, inputs)
    if why:
        what = f"The model {type(model).__name__} gives other outputs at each run on the same inputs, in eval mode."
        raise NumericError(what, why, fix)
