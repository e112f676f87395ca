"""Loaders as parts of a data set.

The training loader is read again in each epoch. The other loaders are read once, into memory.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from kirsch import figures
from kirsch.data.arrays import host
from kirsch.data.batches import batches_of
from kirsch.data.structure import summary
from kirsch.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.data.batches import Batch

AT_ONCE = 2
"""Number of copies of the samples in memory while the batches are joined into one array."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Training part of a data set whose batches come from a loader, in its order and with its augmentation.

    Args:
        loader: a DataLoader, or another iterable that can be iterated over once per epoch. Each batch has one input
            array and labels, in a form that `Batch.of` accepts.
        name: name of the part, for messages.
    """

    loader: Any
    name: str

    @property
    def samples(self) -> int | None:
        """Number of samples of an epoch; None if the loader does not state it."""
        return _length(getattr(self.loader, "sampler", None))

    @property
    def batch_size(self) -> int | None:
        """Batch size of the loader; None if the loader does not state it."""
        size = getattr(self.loader, "batch_size", None)
        return size if isinstance(size, int) else None

    def count_batches(self) -> int:
        """Return the number of batches of an epoch, which are counted if the loader has no length."""
        length = _length(self.loader)
        return sum(1 for _ in self.loader) if length is None else length

    def first_batches(self, count: int) -> list[Batch]:
        """Return the first batches of an epoch."""
        return list(itertools.islice(batches_of(self.loader, self.name), count))

    def first_inputs(self, count: int) -> NDArray[Any]:
        """Return the inputs of the first `count` samples of an epoch, or of all samples if the epoch has fewer."""
        parts: list[NDArray[Any]] = []
        for number, batch in enumerate(batches_of(self.loader, self.name), start=1):
            parts.append(_single_input(batch, f"Batch {number} of {self.name}"))
            if sum(map(len, parts)) >= count:
                break
        return np.concatenate(parts)[:count]


def read(loader: Any, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the inputs and the labels of all batches of a loader.

    Args:
        loader: see `Stream`.
        name: name of the part, for messages.

    Raises:
        DataError: the samples do not fit into memory or differ in shape, or batches have no labels or several inputs.
    """
    inputs, labels, size = [], [], 0
    available, length = psutil.virtual_memory().available, _length(loader) or 1
    for number, batch in enumerate(batches_of(loader, name), start=1):
        inputs.append(_single_input(batch, f"Batch {number} of {name}"))
        if batch.targets is None:
            raise DataError(f"Batch {number} of {name} has no labels.", fix="Give batches of (inputs, labels).")
        labels.append(host(batch.targets))
        size += inputs[-1].nbytes + labels[-1].nbytes
        expected = max(size, size // number * length)
        if AT_ONCE * expected > available:
            raise DataError(
                f"The samples of {name} take {figures.bytes_(expected)}, and {figures.bytes_(available)} of memory are "
                "available.",
                f"This part is read into memory, which needs {AT_ONCE} times its size.",
                "Give a loader of fewer samples: torch.utils.data.Subset(dataset, range(10_000)).",
            )
    if not inputs:
        raise DataError(f"{name[0].upper()}{name[1:]} has no batches.", fix="Give a loader with at least one batch.")
    try:
        return np.concatenate(inputs), np.concatenate(labels)
    except ValueError as error:
        shapes = sorted({part.shape[1:] for part in inputs})
        raise DataError(
            f"The samples of {name} differ in shape: {', '.join(map(str, shapes[:3]))}.",
            "They are read into one array.",
            "Pad or resize all samples to one shape in the dataset.",
        ) from error


def _single_input(batch: Batch, name: str) -> NDArray[Any]:
    """Return the inputs of a batch as one array."""
    inputs = batch.inputs
    if isinstance(inputs, (dict, tuple, list)) and len(inputs) == 1:
        (inputs,) = inputs.values() if isinstance(inputs, dict) else inputs
    if not hasattr(inputs, "shape"):
        raise DataError(
            f"{name} has several inputs: {summary(inputs)}.",
            "kirsch.compress takes data sets with a single input array.",
            "Give batches of (inputs, labels); for models with several inputs, call kirsch.distill, kirsch.prune and "
            "kirsch.export.",
        )
    return host(inputs)


def _length(value: Any) -> int | None:
    """Return the length of a loader or sampler; None if it has none."""
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None
