"""Loaders as parts of a data set.

The training loader is read again in each epoch. The other loaders are read once, into memory.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from kirsch import figures
from kirsch.data.arrays import host
from kirsch.data.batches import batches_of
from kirsch.data.inputs import capitalized, inputs_of_batch, joined, joined_arrays, named_arrays, rows
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
        loader: a DataLoader, or another iterable that can be iterated over once per epoch. Each batch has inputs and
            labels, in a form that `Batch.of` accepts.
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
        """Return the number of batches of an epoch. If the loader has no length, one epoch is read to count them."""
        length = _length(self.loader)
        return sum(1 for _ in self.loader) if length is None else length

    def first_batches(self, count: int) -> list[Batch]:
        """Return the first batches of an epoch."""
        return list(itertools.islice(batches_of(self.loader, self.name), count))

    def first_inputs(self, count: int) -> list[Any]:
        """Return the inputs of the first batches of an epoch, with `count` samples, or all if the epoch has fewer."""
        found: list[Any] = []
        for number, batch in enumerate(batches_of(self.loader, self.name), start=1):
            inputs = inputs_of_batch(batch.inputs, len(batch), f"batch {number} of {self.name}")
            found.append(rows(inputs, slice(count)))
            count -= len(batch)
            if count <= 0:
                break
        return found


def read(loader: Any, name: str) -> tuple[Any, NDArray[Any]]:
    """Return the inputs and the labels of all batches of a loader.

    Args:
        loader: see `Stream`.
        name: name of the part, for messages.

    Raises:
        DataError: the samples do not fit into memory or differ in shape, a batch has no labels, the batches differ in
            the names of their inputs, or there are no batches.
    """
    inputs, labels, size = [], [], 0
    available, length = psutil.virtual_memory().available, _length(loader) or 1
    for number, batch in enumerate(batches_of(loader, name), start=1):
        if batch.targets is None:
            raise DataError(f"Batch {number} of {name} has no labels.", fix="Give batches of (inputs, labels).")
        labels.append(host(batch.targets))
        inputs.append(inputs_of_batch(batch.inputs, len(labels[-1]), f"batch {number} of {name}"))
        size += labels[-1].nbytes + sum(array.nbytes for array in named_arrays(inputs[-1]).values())
        expected = max(size, size // number * length)
        if AT_ONCE * expected > available:
            raise DataError(
                f"The samples of {name} take {figures.bytes_(expected)}, and {figures.bytes_(available)} of memory are "
                "available.",
                f"This part is read into memory, which needs {AT_ONCE} times its size.",
                "Give a loader of fewer samples: torch.utils.data.Subset(dataset, range(10_000)).",
            )
    if not inputs:
        raise DataError(f"{capitalized(name)} has no batches.", fix="Give a loader with at least one batch.")
    return joined(inputs, name), joined_arrays(labels, name, "labels")


def _length(value: Any) -> int | None:
    """Return the length of a loader or sampler; None if it has none."""
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None
