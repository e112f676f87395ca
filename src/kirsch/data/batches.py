"""Training data: batches, and samples in memory whose order and augmentation depend on a seed alone."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from kirsch.annotations import Count, Seed
from kirsch.arguments import checked
from kirsch.data.arrays import host, map_arrays
from kirsch.data.augment import TRIED, Augment, Seeded, apply, check, refuse_moved, sample_seeds
from kirsch.data.inputs import converted, named_arrays, rows, subject
from kirsch.data.structure import check_inputs, split_batch, summary
from kirsch.errors import DataError, ModelError, ShapeError, UsageError, error_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


ONE_EACH = "Give both with one entry for each sample, on the first axis."


@dataclass(frozen=True)
class Batch:
    """Batch of samples.

    Args:
        inputs: an array, a tuple of positional or a dict of keyword arguments of the model; samples on the first axis.
        targets: targets of the label loss; None if there are none.
        ids: id of each sample in the data, integers of shape (N,); None if not known.
        view: number of the augmentation of the samples.
        seeds: seed of the augmentation of each sample, numpy, shape (N,); None if the samples are not augmented, or the
            seeds are not known.
    """

    inputs: Any
    targets: Any = None
    ids: Any = None
    view: int = 0
    seeds: NDArray[np.uint64] | None = None

    def __repr__(self) -> str:
        """Return one line."""
        return f"<kirsch.Batch: {len(self)} samples, {_parts_text(self.inputs, self.targets)}>"

    @classmethod
    def of(cls, value: Any) -> Batch:
        """Convert a batch of a loader to a `Batch`.

        Args:
            value: inputs; (inputs, targets); (inputs, targets, ids); or a dict, a dataclass or a named tuple in which
                "labels", "label", "label_ids", "targets", "target" or "y" are the targets and "ids" the ids.

        Raises:
            DataError: the parts are ambiguous, or a model cannot take the inputs.
        """
        batch = value if isinstance(value, cls) else cls(*split_batch(value))
        check_inputs(batch.inputs, batch.targets)
        return batch

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(_first_array(self.inputs))


def _parts_text(inputs: Any, targets: Any) -> str:
    return f"inputs: {summary(inputs)}, targets: {'none' if targets is None else summary(targets)}"


def batches_of(data: Any, name: str = "the data") -> Iterator[Batch]:
    """Yield the batches of data; error messages name the batch.

    Raises:
        DataError: see `Batch.of`.
    """
    for number, value in enumerate(data, 1):
        with naming(f"Batch {number} of {name}"):
            batch = Batch.of(value)
        yield batch


@contextlib.contextmanager
def naming(batch: str) -> Iterator[None]:
    """Add the name of the batch to the errors about it that are raised within the block."""
    try:
        yield
    except (DataError, ModelError, UsageError) as error:
        if type(error) not in (DataError, ModelError, ShapeError, UsageError):  # other errors are not about a batch
            raise
        raise type(error)(f"{batch}: {error.what}", error.why, error.fix) from error


def _first_array(part: Any) -> Any:
    """Return the first array of inputs, which may also contain numbers, booleans and strings."""
    if not isinstance(part, (tuple, list, dict)):
        return part
    parts = list(part.values() if isinstance(part, dict) else part)
    return _first_array(next((item for item in parts if not isinstance(item, (bool, int, float, str))), parts[0]))


class SeededData(ABC):
    """Data whose epochs depend on a seed alone, so that a run resumed within an epoch reads exactly the same batches.

    With `torchrun`, each process iterates over all batches and trains on its part of each batch.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches per epoch."""

    @abstractmethod
    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from batch `start` on.

        Args:
            seed: seed of the run.
            epoch: number of the epoch, >= 0.
            start: number of the first batch.
        """


def count_of(samples: int, batch_size: int) -> int:
    """Return the number of batches. A last batch of one sample is merged with the batch before; see `ArrayData`."""
    full, rest = divmod(samples, batch_size)
    return max(1, full + (rest > 1 or (rest == 1 and full == 0)))


def borders_of(samples: int, batch_size: int) -> list[int]:
    """Return the index of the first sample of each batch, and the end of the last batch."""
    return [*range(0, count_of(samples, batch_size) * batch_size, batch_size), samples]


@checked
@dataclass(frozen=True, eq=False)
class ArrayData(SeededData):
    """Samples in memory, whose order and augmentation depend on a seed alone.

    The order of an epoch depends on (seed, epoch), the augmentation of a sample on (seed, view, id). A run that is
    resumed within an epoch therefore reads exactly the same batches, and the stored teacher outputs of each augmented
    sample can be found.

    Args:
        inputs: array of finite numbers, shape (N, ...); or a tuple or dict of such arrays, the positional or keyword
            arguments of the model. Tensors and lists of numbers become numpy arrays, also in `targets` and `ids`.
        targets: targets of the label loss, such as class numbers (N,) or (N, L); None if there are none.
        batch_size: samples per batch, >= 1. A last batch of one sample is merged with the batch before, because batch
            normalization needs two samples.
        augment: a transform of `kirsch.data.augment`, or a function (batch, generator) → batch, which is called
            with one sample at a time; None for no augmentation.
        ids: id of each sample, unique integers of shape (N,); 0 to N - 1 by default.
        views: number of different augmentations of a sample: epoch e uses augmentation e modulo `views`. None: each
            epoch uses a new augmentation.
        seed: seed of the augmentation; None for the seed of the run.

    Raises:
        DataError: there are no samples, inputs are not finite, or ids are not unique.
        ShapeError: inputs and targets or ids differ in number.
        UsageError: the transform takes no generator or draws random numbers from another source, it moves pixels and
            the targets are masks, or a setting is out of range.
    """

    made_by: ClassVar[str] = "kirsch.ArrayData(inputs, targets)"

    inputs: Any
    targets: Any
    _: KW_ONLY
    batch_size: Count = 64
    augment: Seeded | Augment | None = None
    ids: Any = None
    views: Count | None = None
    seed: Seed | None = None

    def __repr__(self) -> str:
        """Return one line."""
        parts = _parts_text(self.inputs, self.targets)
        return f"<kirsch.ArrayData: {self.samples} samples in batches of {self.batch_size}, {parts}>"

    def __post_init__(self) -> None:
        self._make_arrays()
        if not self.parts or not self.samples:
            raise DataError("The data is empty: its inputs have no samples.", fix="Give at least one sample.")
        if self.targets is not None and self.samples != len(self.targets):
            raise ShapeError(f"There are {self.samples} inputs and {len(self.targets)} targets.", fix=ONE_EACH)
        for name, part in self.parts.items():
            _check_part(name, part, self.samples)
        if self.ids is not None:
            _check_ids(self.ids, self.samples)
        if self.augment is not None and len(self.parts) > 1:
            raise UsageError(
                f"`augment` takes one array, and the data has {len(self.parts)} inputs: {', '.join(self.parts)}.",
                fix="Augment the inputs beforehand.",
            )
        if self.augment is not None:
            images = next(iter(self.parts.values()))
            tried = np.linspace(0, self.samples - 1, min(self.samples, TRIED)).astype(int)
            check(self.augment, images[tried])
            refuse_moved(self.augment, images, self.targets)

    def _make_arrays(self) -> None:
        """Convert tensors and lists to arrays."""
        inputs = converted(lambda name, value: _array(subject(name, "ArrayData"), value), self.inputs)
        object.__setattr__(self, "inputs", inputs)
        for name in ("targets", "ids"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _array(f"The {name} of ArrayData are", getattr(self, name)))

    @property
    def parts(self) -> dict[str, Any]:
        """Return the arrays of the inputs by name; see `named_arrays`."""
        return named_arrays(self.inputs)

    @property
    def samples(self) -> int:
        """Return the number of samples."""
        return len(next(iter(self.parts.values())))

    def rows(self, indices: Any) -> Any:
        """Return the inputs of some samples without augmentation."""
        return rows(self.inputs, indices)

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return count_of(self.samples, self.batch_size)

    @cached_property
    def sample_ids(self) -> NDArray[Any]:
        """Return the id of each sample."""
        return np.arange(self.samples) if self.ids is None else self.ids

    def batch(self, indices: NDArray[Any], seed: int, view: int) -> Batch:
        """Return a batch of some samples with their augmentation.

        Args:
            indices: indices of the samples, shape (N,).
            seed: seed of the run.
            view: number of the augmentation.
        """
        ids = self.sample_ids[indices]
        inputs, seeds = self.rows(indices), None
        if self.augment is not None:
            seeds = sample_seeds(seed if self.seed is None else self.seed, view, ids)
            inputs = map_arrays(lambda array: apply(self.augment, array, seeds), inputs)
        return Batch(inputs, None if self.targets is None else self.targets[indices], ids, view, seeds)

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `SeededData.epoch`."""
        order = np.random.default_rng([seed, epoch]).permutation(self.samples)
        borders = borders_of(self.samples, self.batch_size)
        view = epoch if self.views is None else epoch % self.views
        for number in range(start, len(self)):
            yield self.batch(order[borders[number] : borders[number + 1]], seed, view)


def _array(beginning: str, value: Any) -> NDArray[Any]:
    """Convert an array, a tensor or a list of numbers to a numpy array.

    Raises:
        DataError: the value is something else, or its samples differ in shape. The message starts with `beginning`.
    """
    try:
        array = host(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(
            f"{beginning} {summary(value)}, and cannot be converted to an array.",
            error_text(error),
            "Give one array with all samples on the first axis; pad or resize samples that differ in shape.",
        ) from error
    if array.ndim:
        return array
    raise DataError(
        f"{beginning} {summary(value)}; expected one array with all samples on the first axis.",
        fix="Give a DataLoader in place of ArrayData, not in it.",
    )


def _check_part(name: str, part: NDArray[Any], samples: int) -> None:
    if len(part) != samples:
        raise ShapeError(f"There are {samples} samples of the first input and {len(part)} of {name!r}.", fix=ONE_EACH)
    if part.dtype.kind not in "biufc":
        raise DataError(
            f"{subject(name, 'ArrayData')} {summary(part)}; expected numbers.",
            fix="Give arrays of numbers, not of objects.",
        )
    bad = ~np.isfinite(part.reshape(len(part), -1)).all(axis=1)
    if bad.any():
        raise DataError(f"Sample {int(bad.argmax())} contains NaN or infinity.", fix="Remove the sample.")


def _check_ids(ids: NDArray[Any], count: int) -> None:
    if len(ids) != count:
        raise ShapeError(f"There are {count} inputs and {len(ids)} ids.", fix=ONE_EACH)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(
            f"The ids have shape {ids.shape} and type {ids.dtype}; expected one integer per sample.",
            fix="Give integers of shape (N,).",
        )
    ordered = np.sort(ids)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise DataError(
            "The sample ids are not unique.",
            f"The id {int(repeated[0])} belongs to more than one sample.",
            "Give each sample a different id.",
        )
