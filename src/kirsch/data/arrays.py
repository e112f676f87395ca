"""Arrays of any framework, alone or in containers: as numpy arrays, and without gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def host(array: Any) -> NDArray[Any]:
    """Convert an array of any framework and device to a numpy array without gradient."""
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)


def is_on_accelerator(array: Any) -> bool:
    """Return whether an array is on an accelerator, so that reading its values waits for the accelerator."""
    return getattr(getattr(array, "device", None), "type", "cpu") != "cpu"


def map_arrays(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to an array, or to each array in a tuple, list or dict; lists become tuples."""
    if isinstance(value, Mapping):
        return {name: map_arrays(function, part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(map_arrays(function, part) for part in value)
    return function(value)


def without_gradient(value: Any) -> Any:
    """Return an array, or a dict or tuple of arrays, detached from the computation of gradients."""
    return map_arrays(lambda part: part.detach() if hasattr(part, "detach") else part, value)
