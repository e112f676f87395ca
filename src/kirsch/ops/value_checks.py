"""Checks of the values of arrays."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from kirsch.ops.operations import all, any, convert_to_numpy, is_traced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_enabled: ContextVar[bool] = ContextVar("value_checks", default=True)


def raise_if(condition: Any, error: Callable[[], Exception]) -> None:
    """Raise an error if a condition is true for any element.

    The check reads one value from the device. It is skipped while a compiler traces the function (`torch.compile`,
    `jax.jit`, `tf.function`), because there are no values then, and within `without_value_checks()`.

    Args:
        condition: booleans of any shape.
        error: function that returns the error; it may read the values of arrays.
    """
    if not is_traced(condition) and _enabled.get() and convert_to_numpy(any(condition)):
        raise error()


def is_known_to_hold(condition: Any) -> bool:
    """Return whether a condition is known to be true for all elements, so that the work for the others can be left out.

    The answer is False while a compiler traces the function, and within `without_value_checks()`; so the result of the
    caller must not depend on it.
    """
    return not is_traced(condition) and _enabled.get() and bool(convert_to_numpy(all(condition)))


@contextmanager
def without_value_checks() -> Iterator[None]:
    """Return a context in which values are not checked, so that a step need not wait for the device.

    Use it for batches whose masks and labels are known to be valid.
    """
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)
