"""Arrays of any framework: as numpy arrays, and without gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def host(array: Any) -> NDArray[Any]:
    """Convert an array of any framework and device to a numpy array without gradient."""
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)


def without_gradient(value: Any) -> Any:
    """Return an array, or a dict or tuple of arrays, detached from the computation of gradients."""
    if isinstance(value, Mapping):
        return {name: without_gradient(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(without_gradient(part) for part in value)
    return value.detach() if hasattr(value, "detach") else value
