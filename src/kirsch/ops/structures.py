"""Operations on an array, or on each array in a list, a tuple or a dict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kirsch.ops.operations import cast, dtype, stop_gradient

if TYPE_CHECKING:
    from collections.abc import Callable


def map_arrays(function: Callable[[Any], Any], arrays: Any) -> Any:
    """Apply a function to an array, or to each array in a list, a tuple or a dict."""
    if isinstance(arrays, dict):
        return {name: map_arrays(function, array) for name, array in arrays.items()}
    if isinstance(arrays, (list, tuple)):
        return [map_arrays(function, array) for array in arrays]
    return function(arrays)


def first_array(arrays: Any) -> Any:
    """Return the array, or the first one in a list, a tuple or a dict of arrays."""
    while isinstance(arrays, (dict, list, tuple)):
        arrays = next(iter(arrays.values() if isinstance(arrays, dict) else arrays))
    return arrays


def detach(arrays: Any) -> Any:
    """Return the array, or each array in a list or dict, without gradient."""
    return map_arrays(stop_gradient, arrays)


def upcast(arrays: Any) -> Any:
    """Convert floating arrays of 16 bits to 32 bits: sums of many 16-bit numbers lose too much precision."""
    return map_arrays(lambda x: cast(x, "float32") if dtype(x) in ("float16", "bfloat16") else x, arrays)
