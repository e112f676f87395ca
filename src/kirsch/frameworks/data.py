"""What a model is trained on: batches, and samples in memory whose order and augmentation follow from a seed."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from kirsch.annotations import Count, Seed
from kirsch.arguments import checked
from kirsch.errors import DataError, ModelError, ShapeError, UsageError, error_text
from kirsch.frameworks.augment import TRIED, Augment, Seeded, apply, check, sample_seeds
from kirsch.frameworks.structure import check_inputs, look, taken_apart

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


ONE_EACH = "Give one for each sample, on the first axis."


@dataclass(frozen=True)
class Batch:
    """What a step sees.

    Args:
        inputs: an array, a tuple of positional or a dict of keyword arguments; samples on the first axis.
        targets: what a loss on labels takes; None where there are none.
        ids: the number of each sample in the data, shape (N,); None where the data does not say.
        view: which augmentation of the samples it is.
        seeds: of their augmentation, numpy, shape (N,); None where they are as they are, or the data does not say.
    """

    inputs: Any
    targets: Any = None
    ids: Any = None
    view: int = 0
    seeds: NDArray[np.uint64] | None = None

    @classmethod
    def of(cls, given: Any) -> Batch:
        """A batch of what a loader gives.

        That is inputs; (inputs, targets); (inputs, targets, ids); or a dict, a dataclass or a named tuple in which
        "labels", "label", "label_ids", "targets", "target" or "y" are the targets and "ids" the ids.

        Raises:
            DataError: the parts cannot be told from each other, or are nothing that a model takes.
        """
        batch = given if isinstance(given, cls) else cls(*taken_apart(given))
        check_inputs(batch.inputs, batch.targets)
        return batch

    def __len__(self) -> int:
        """Samples."""
        return len(_first(self.inputs))


def batches_of(data: Any, name: str = "the data") -> Iterator[Batch]:
    """The batches of data, each of which is named in errors about it.

    Raises:
        DataError: see `Batch.of`.
    """
    for number, given in enumerate(data, 1):
        with naming(f"Batch {number} of {name}"):
            batch = Batch.of(given)
        yield batch


@contextlib.contextmanager
def naming(batch: str) -> Iterator[None]:
    """Name the batch in errors about it that are raised within the block."""
    try:
        yield
    except (DataError, ModelError, UsageError) as error:
        if type(error) not in (DataError, ModelError, ShapeError, UsageError):  # which are not about a batch
            raise
        raise type(error)(f"{batch}: {error.what}", error.why, error.fix) from error


def _first(part: Any) -> Any:
    """The first array of inputs, among which there may be switches."""
    if not isinstance(part, (tuple, list, dict)):
        return part
    parts = list(part.values() if isinstance(part, dict) else part)
    return _first(next((one for one in parts if not isinstance(one, (bool, int, float, str))), parts[0]))


class SeededData(ABC):
    """Data each of whose epochs follows from a seed, so that a run can go on in the middle of one in the same bits.

    Started by `torchrun`, each process goes through all batches and takes its part of each.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Batches of one epoch."""

    @abstractmethod
    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch of a run with this seed, from batch `start` on."""


def count_of(samples: int, batch_size: int) -> int:
    """Batches of so many samples; a last one of one sample joins the one before, since normalization needs two."""
    full, rest = divmod(samples, batch_size)
    return max(1, full + (rest > 1 or (rest == 1 and full == 0)))


def borders_of(samples: int, batch_size: int) -> list[int]:
    """Where each batch begins, and where the last one ends."""
    return [*range(0, count_of(samples, batch_size) * batch_size, batch_size), samples]


@checked
@dataclass(frozen=True, eq=False)
class ArrayData(SeededData):
    """Samples in memory, whose order and augmentation follow from a seed alone.

    The order of an epoch is drawn from (seed, epoch), the augmentation of a sample from (seed, view, id), so that a run
    can go on in the middle of an epoch in the same bits, and a teacher's output for that very look of the sample can be
    looked up.

    Args:
        inputs: shape (N, ...), finite; or a dict of such, keyword arguments of the model. Tensors and lists of numbers
            become arrays of numpy, here as in `targets` and `ids`.
        targets: what the loss on labels takes, such as class numbers (N,) or (N, L); None where there are none.
        batch_size: >= 1; a last batch of one sample joins the one before, since normalization needs two.
        augment: a transform of `kirsch.frameworks.augment`, or a user's (batch, generator) → batch, which is called
            with one sample at a time; None leaves samples as they are.
        ids: unique whole numbers, shape (N,); 0 to N - 1 if left out.
        views: how many looks of a sample there are: epoch e shows look e modulo this; None gives each epoch its own.
        seed: of the augmentation; None takes that of the run.

    Raises:
        DataError: there are no samples, inputs are not finite, or ids are not unique.
        ShapeError: inputs and targets or ids differ in number.
        UsageError: the transform takes no generator or does not follow from it, or a setting is out of range.
    """

    made_by: ClassVar[str] = "kirsch.frameworks.data.ArrayData(inputs, targets)"

    inputs: Any
    targets: Any
    batch_size: Count = 64
    augment: Seeded | Augment | None = None
    ids: Any = None
    views: Count | None = None
    seed: Seed | None = None

    def __post_init__(self) -> None:
        self._make_arrays()
        if not self.parts or not self.samples:
            raise DataError("The data is empty: its inputs have no sample.", fix="Give at least one sample.")
        if self.targets is not None and self.samples != len(self.targets):
            raise ShapeError(f"There are {self.samples} inputs and {len(self.targets)} targets.", fix=ONE_EACH)
        for name, part in self.parts.items():
            _check_part(name, part, self.samples)
        if self.ids is not None:
            _check_ids(self.ids, self.samples)
        if self.augment is not None and isinstance(self.inputs, dict):
            raise UsageError("A transform takes one array; the inputs are a dict.", fix="Augment them beforehand.")
        if self.augment is not None:
            check(self.augment, self.rows(np.linspace(0, self.samples - 1, min(self.samples, TRIED)).astype(int)))

    def _make_arrays(self) -> None:
        """Make arrays of tensors and lists."""
        own = {name: _array(name, part) for name, part in self.parts.items()}
        object.__setattr__(self, "inputs", own if isinstance(self.inputs, dict) else own["inputs"])
        for name in ("targets", "ids"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _array(name, getattr(self, name)))

    @property
    def parts(self) -> dict[str, Any]:
        """The arrays of the inputs by name."""
        return self.inputs if isinstance(self.inputs, dict) else {"inputs": self.inputs}

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(next(iter(self.parts.values())))

    def rows(self, places: Any) -> Any:
        """The inputs of some samples, as they are."""
        if isinstance(self.inputs, dict):
            return {name: part[places] for name, part in self.inputs.items()}
        return self.inputs[places]

    def __len__(self) -> int:
        """Batches of one epoch."""
        return count_of(self.samples, self.batch_size)

    @cached_property
    def sample_ids(self) -> NDArray[Any]:
        """The id of each sample: those given, or 0 to N - 1."""
        return np.arange(self.samples) if self.ids is None else self.ids

    def look(self, places: NDArray[Any], seed: int, view: int) -> Batch:
        """Some samples as one view of a run shows them.

        Args:
            places: indices of samples, shape (N,).
            seed: of the run.
            view: see `Batch`.
        """
        ids = self.sample_ids[places]
        inputs, seeds = self.rows(places), None
        if self.augment is not None:
            seeds = sample_seeds(seed if self.seed is None else self.seed, view, ids)
            inputs = apply(self.augment, inputs, seeds)
        return Batch(inputs, None if self.targets is None else self.targets[places], ids, view, seeds)

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on."""
        order = np.random.default_rng([seed, epoch]).permutation(self.samples)
        borders = borders_of(self.samples, self.batch_size)
        view = epoch if self.views is None else epoch % self.views
        for number in range(start, len(self)):
            yield self.look(order[borders[number] : borders[number + 1]], seed, view)


def _array(name: str, given: Any) -> NDArray[Any]:
    """An array of an array, a tensor or a list of numbers.

    Raises:
        DataError: it is anything else, or samples differ in shape.
    """
    try:
        found = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(
            f"The {name} of ArrayData are {look(given)}, of which no array can be made.",
            error_text(error),
            "Give one array with all samples on the first axis; pad or resize samples that differ in shape.",
        ) from error
    if found.ndim:
        return found
    raise DataError(
        f"The {name} of ArrayData are {look(given)}; one array with all samples on the first axis is needed.",
        fix="A DataLoader is data by itself: give it in place of ArrayData.",
    )


def _check_part(name: str, part: NDArray[Any], samples: int) -> None:
    if len(part) != samples:
        raise ShapeError(f"There are {samples} samples of the first input and {len(part)} of {name!r}.", fix=ONE_EACH)
    if part.dtype.kind not in "biufc":
        raise DataError(
            f"The input {name!r} is {look(part)}.", "A model takes numbers.", "Give arrays of numbers, not of objects."
        )
    bad = ~np.isfinite(part.reshape(len(part), -1)).all(axis=1)
    if bad.any():
        raise DataError(f"Sample {int(bad.argmax())} holds NaN or infinity.", fix="Repair or leave it out.")


def _check_ids(ids: NDArray[Any], count: int) -> None:
    if len(ids) != count:
        raise ShapeError(f"There are {count} inputs and {len(ids)} ids.", fix=ONE_EACH)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"The ids have shape {ids.shape} and type {ids.dtype}.", "One whole number a sample is needed.")
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise DataError(
            "The sample ids are not unique.",
            f"{int(twice[0])} stands for more than one sample.",
            "Give each sample a number of its own.",
        )
