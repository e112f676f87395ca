"""Sums of the losses of an epoch, which stay on the device until they are read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

TOTAL = "loss"
PART = "part."
"""Prefix of the terms of a loss among the losses of an epoch."""

READ_EVERY = {"cpu": 1}
"""Number of batches after which losses are read, by type of device.

Reading a loss waits until an accelerator has completed all queued operations. A CPU has no such queue.
"""
READ_EVERY_ON_ACCELERATORS = 50


class NotFiniteLosses(Exception):  # noqa: N818 - never leaves the training loop
    """A loss is NaN or infinite.

    Args:
        batch: number of the first such batch in the epoch, from 1.
        terms: the loss terms of this batch by name.
    """

    def __init__(self, batch: int, terms: dict[str, float]) -> None:
        super().__init__(batch)
        self.batch, self.terms = batch, terms


class EpochLosses:
    """Weighted sums of losses by name.

    Args:
        device: device of the losses.
        sums: sums over the completed batches of the epoch.
    """

    def __init__(self, device: torch.device, sums: Mapping[str, float]) -> None:
        self._sums = dict(sums)
        self._read_every = READ_EVERY.get(device.type, READ_EVERY_ON_ACCELERATORS)
        self._unread: list[tuple[int, int, dict[str, torch.Tensor]]] = []

    def add(self, batch: int, weight: int, losses: Mapping[str, Any]) -> None:
        """Add the losses of a batch; one of them is `TOTAL`.

        Args:
            batch: number of the batch, from 1.
            weight: factor of the losses in the sums.
            losses: scalars by name.

        Raises:
            NotFiniteLosses: the losses were read, and a total is not finite.
        """
        self._unread.append((batch, weight, {name: value.detach() for name, value in losses.items()}))
        if len(self._unread) >= self._read_every:
            self.sums()

    def sums(self) -> dict[str, float]:
        """Return the sums by name. This waits for the device if losses are unread.

        Raises:
            NotFiniteLosses: a total is not finite.
        """
        unread, self._unread = self._unread, []
        scalars = [value for _, _, losses in unread for value in losses.values()]
        numbers = iter(torch.stack(scalars).tolist() if scalars else ())
        for batch, weight, losses in unread:
            values = {name: next(numbers) for name in losses}
            if not math.isfinite(values[TOTAL]):
                raise NotFiniteLosses(batch, values)
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0.0) + value * weight
        return dict(self._sums)


def prefixed(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the terms of a loss with the prefix in their names."""
    return {f"{PART}{name}": part for name, part in parts.items()}
