"""Arrays of any framework as numpy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def host(array: Any) -> NDArray[Any]:
    """Convert an array of any framework and device to a numpy array without gradient."""
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
