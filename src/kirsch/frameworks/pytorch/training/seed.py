"""Random numbers from a seed, without a change of the caller's random state."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def seeded(build: Callable[[], T], seed: int) -> T:
    """Return the result of `build` with this random seed; the caller's random state is not changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()
