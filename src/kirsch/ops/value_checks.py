"""Checks of the values of arrays."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from kirsch.ops.operations import any, convert_to_numpy, is_traced

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
    if is_traced(condition) or not _enabled.get():
        return
    if convert_to_numpy(any(condition)):
        raise error()


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
