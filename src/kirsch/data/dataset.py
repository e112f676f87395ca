"""Data sets with a training, a validation and a test part."""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from kirsch.annotations import Count, Fix
from kirsch.arguments import checked
from kirsch.data.annotations import Labeled
from kirsch.data.arrays import host
from kirsch.data.augment import Augment, Seeded
from kirsch.data.batches import ArrayData, Batch, SeededData, batches_of
from kirsch.data.inputs import (
    capitalized,
    converted,
    inputs_of_batch,
    named_arrays,
    require_same_inputs,
    rows,
    subject,
    without_container,
)
from kirsch.data.stream import Stream, read
from kirsch.data.structure import TARGETS, refuse_dataset, summary
from kirsch.errors import DataError, UsageError
from kirsch.references import is_valid_text

if TYPE_CHECKING:
    from numpy.typing import NDArray


@checked
@dataclass(frozen=True, eq=False)
class Split:
    """Samples with their labels.

    Args:
        inputs: model inputs after preprocessing, shape (N, ...), float32. For a model with several inputs: a tuple of
            its positional arguments, or a dict (also a BatchEncoding of transformers) of its keyword arguments; each
            has N samples. Tensors and lists become arrays.
        labels: labels in the form that the task needs, such as class numbers, int64 of shape (N,). Tensors and lists
            become arrays.

    Raises:
        DataError: an argument is not an array of numbers, or inputs and labels differ in number of samples.
    """

    made_by: ClassVar[str] = "kirsch.Split(inputs, labels)"

    inputs: Any
    labels: Any

    def __post_init__(self) -> None:
        inputs = converted(lambda name, value: _array(subject(name, "a Split"), value), self.inputs)
        object.__setattr__(self, "inputs", without_container(inputs))
        object.__setattr__(self, "labels", _array("The labels of a Split are", self.labels))
        for name, array in named_arrays(self.inputs).items():
            if name == TARGETS[0]:
                raise DataError(
                    f"The inputs of a Split contain {name!r}.",
                    "They are arguments of the model, so the exported file would take the labels as an input.",
                    "Leave the labels out of the inputs: kirsch.Split(inputs, labels).",
                )
            if len(array) != len(self.labels):
                what = f"{len(array)} inputs" if not name else f"{len(array)} samples of the input {name!r}"
                raise DataError(
                    f"A Split has {what} and {len(self.labels)} labels.",
                    fix="Give one label for each sample; samples lie on the first axis. Give several inputs as a tuple "
                    "or dict, not as a list.",
                )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        """Return one line."""
        return f"<kirsch.Split: {len(self)} samples, inputs: {summary(self.inputs)}, labels: {summary(self.labels)}>"


@checked
@dataclass(frozen=True, eq=False)
class DataSet:
    """Data set with a training, a validation and a test part.

    Args:
        name: name of the data set in the report.
        train, validation, test: the three parts; `test` is used for reported results only. Each is a `Split`, a tuple
            (inputs, labels), or a loader: a DataLoader, or anything that gives batches with labels each time it is
            iterated over. A loader of the training part is read in each epoch, with its own batch size, order and
            augmentation. Loaders of the other parts are read once, into memory, and should not shuffle. All parts have
            the same inputs: one array, or a tuple or dict of arrays, see `Split`.
        classes: names of the classes, in the order of the models' outputs. If left out: the class numbers, up to the
            largest label in memory; no names if the labels are not class numbers.
        augment: augmentation of training samples in memory, see `ArrayData`; None for no augmentation.

    Raises:
        DataError: a part is empty, can be read only once or does not fit into memory, its inputs differ from those of
            another part or are not finite, or a name is not valid. The labels are checked by the task that uses them,
            see `kirsch.tasks`.
        UsageError: `augment` is given for a loader.
    """

    made_by: ClassVar[str] = "kirsch.DataSet(name, train=loader, validation=..., test=..., classes=...)"

    name: str
    train: Labeled
    validation: Labeled
    test: Labeled
    _: KW_ONLY
    classes: Annotated[
        tuple[str, ...],
        Fix("Give the name of each class, in the order of the models' outputs, such as tuple(map(str, range(10)))."),
    ] = ()
    augment: Seeded | Augment | None = None

    def __post_init__(self) -> None:
        _check_names(self.name, self.classes)
        for part in ("train", "validation", "test"):
            object.__setattr__(self, part, _part(f"the {part} part of {self.name}", getattr(self, part), part))
        for part, split in self.in_memory.items():
            self._check_split(part, split)
        if self.is_stream and self.augment is not None:
            raise UsageError(
                f"`augment` of {self.name} has no effect: its training part is a loader.",
                fix="Augment the samples in the dataset of the loader.",
            )
        if not self.classes:
            object.__setattr__(self, "classes", _classes(self))

    def __repr__(self) -> str:
        """Return one line."""
        sizes = ", ".join(f"{'?' if size is None else size} {part}" for part, size in self.sizes.items())
        return f"<kirsch.DataSet {self.name}: {len(self.classes)} classes, samples: {sizes}>"

    def _check_split(self, part: str, split: Split) -> None:
        if not len(split):
            raise DataError(f"The {part} part of {self.name} is empty.", fix="Give it at least one sample.")
        first, reference = next(iter(self.in_memory.items()))
        names = (f"the {each} part of {self.name}" for each in (part, first))
        require_same_inputs(split.inputs, next(names), reference.inputs, next(names))
        if not all(np.isfinite(array).all() for array in named_arrays(split.inputs).values()):
            raise DataError(f"The {part} part of {self.name} contains NaN or infinity.", fix="Remove these samples.")

    @property
    def is_stream(self) -> bool:
        """Whether the training part is a loader."""
        return isinstance(self.train, Stream)

    @property
    def in_memory(self) -> dict[str, Split]:
        """Return the parts in memory by name: all parts, except a training part that is a loader."""
        parts = {part: getattr(self, part) for part in ("train", "validation", "test")}
        return {part: split for part, split in parts.items() if isinstance(split, Split)}

    @property
    def sizes(self) -> dict[str, int | None]:
        """Return the number of samples of each part; None for a loader without a length."""
        sizes: dict[str, int | None] = {"train": self.train.samples} if self.is_stream else {}
        return sizes | {part: len(split) for part, split in self.in_memory.items()}

    @checked
    def batches(self, batch_size: Count) -> Any:
        """Return the training part in batches: `ArrayData`, or the loader, which has its own batch size."""
        if self.is_stream:
            return self.train.loader
        return ArrayData(self.train.inputs, self.train.labels, batch_size=batch_size, augment=self.augment)

    def count_batches(self, batch_size: int) -> int:
        """Return the number of training batches of an epoch."""
        return self.train.count_batches() if self.is_stream else len(self.batches(batch_size))

    def first_batches(self, count: int, batch_size: int) -> Any:
        """Return data with the first training batches, for trial runs."""
        if self.is_stream:
            return self.train.first_batches(count)
        end = count * batch_size
        return ArrayData(
            rows(self.train.inputs, slice(end)), self.train.labels[:end], batch_size=batch_size, augment=self.augment
        )

    def first_inputs(self, count: int) -> list[Any]:
        """Return the inputs of the first training samples, in one or more batches.

        A loader determines their order, augmentation and batches.

        Raises:
            DataError: a loader has other inputs than the test part.
        """
        if not self.is_stream:
            return [rows(self.train.inputs, slice(count))]
        batches: list[Any] = self.train.first_inputs(count)
        self._check_inputs_of_loader(batches[0])
        return batches

    def calibration_batches(self, count: int, batch_size: int = 32) -> list[Batch]:
        """Return training samples with their labels, without augmentation.

        Samples in memory are evenly spread over the training part, which may be sorted by class. The first batches of a
        loader are returned, until they have enough samples.
        """
        if not self.is_stream:
            size = len(self.train.labels)
            chosen = np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(np.int64))
            parts = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
            return [Batch(rows(self.train.inputs, part), self.train.labels[part]) for part in parts]
        batches: list[Batch] = []
        for batch in batches_of(self.train.loader, self.train.name):
            batches.append(batch)
            if sum(map(len, batches)) >= count:
                break
        return batches

    def check_first(self, batch: Batch) -> None:
        """Check the inputs of the first training batch. Those of a loader are not known before the batch is read.

        Raises:
            DataError: they have other names or numbers of axes than those of the test part.
        """
        self._check_inputs_of_loader(
            inputs_of_batch(batch.inputs, len(batch), f"batch 1 of the train part of {self.name}")
        )

    def _check_inputs_of_loader(self, inputs: Any) -> None:
        require_same_inputs(inputs, f"the train part of {self.name}", self.test.inputs, f"the test part of {self.name}")

    def test_samples_in_other_parts(self) -> dict[str, int]:
        """Return, for each other part in memory, the number of test samples whose inputs occur in it."""
        rows = _row_hashes(self.test)
        return {
            part: sum(map(set(_row_hashes(split)).__contains__, rows))
            for part, split in self.in_memory.items()
            if part != "test"
        }

    @cached_property
    def sha256(self) -> str:
        """Return a hash over all samples and labels in memory, and over the name if the training part is a loader.

        The names of several inputs are hashed, too. The batches of a loader are not hashed. If they change, the name
        must change, too; otherwise a run on the old data would be continued.
        """
        digest = hashlib.sha256(f"loader {self.name}".encode() if self.is_stream else b"")
        for split in self.in_memory.values():
            for name, array in named_arrays(split.inputs).items():
                digest.update(name.encode())  # the name of a single array is empty
                digest.update(np.ascontiguousarray(array).tobytes())
            digest.update(np.ascontiguousarray(split.labels).tobytes())
        return digest.hexdigest()


def _row_hashes(split: Split) -> list[int]:
    """Return a hash of the inputs of each sample, which holds within a process."""
    samples = zip(*named_arrays(split.inputs).values(), strict=True)
    return [hash(tuple(row.tobytes() for row in sample)) for sample in samples]


def _array(beginning: str, value: Any) -> NDArray[Any]:
    """Convert a value to an array of numbers.

    Raises:
        DataError: the value is not an array of numbers; the message starts with `beginning`.
    """
    try:
        array = host(value) if hasattr(value, "shape") else np.asarray(value) if isinstance(value, list) else None
    except (ValueError, TypeError, RuntimeError):  # samples of several shapes
        array = None
    if array is not None and array.ndim and array.dtype.kind in "biuf":
        python_floats = isinstance(value, list) and array.size and type(_first_number(value)) is float
        return array.astype(np.float32) if python_floats else array  # numpy converts Python floats to float64
    what = summary(value) if array is None or isinstance(value, list) else f"{array.dtype} of shape {array.shape}"
    loads = hasattr(value, "dataset") or (hasattr(value, "__getitem__") and not hasattr(value, "__array__"))
    raise DataError(
        f"{beginning} {what}; expected one array with all samples on the first axis.",
        "A Split is held in memory.",
        "Give the loader to kirsch.DataSet in place of the Split: train=loader."
        if loads and not isinstance(value, (list, tuple, str))
        else "Give numbers of the same shape for each sample.",
    )


def _part(name: str, value: Any, part: str) -> Split | Stream:
    """Return a part of a data set.

    A `Split` is returned unchanged, and a tuple (inputs, labels) becomes a `Split`. A loader becomes a `Stream` in the
    training part, and is read into a `Split` in the other parts.
    """
    if isinstance(value, Split):
        return value
    if isinstance(value, SeededData):
        raise DataError(
            f"{capitalized(name)} is {summary(value)}.", fix="Give kirsch.Split(data.inputs, data.targets)."
        )
    if isinstance(value, tuple):
        return Split(*value)
    if hasattr(value, "__next__"):
        raise DataError(
            f"{capitalized(name)} is {summary(value)}, which can be read only once.",
            "Each epoch, and a run that is continued, reads it again.",
            "Give a DataLoader or a list of batches.",
        )
    if isinstance(value, list) and not value:
        raise DataError(f"{capitalized(name)} is empty.", fix="Give it at least one sample.")
    refuse_dataset(value, f"{capitalized(name)}")
    return Stream(value, name) if part == "train" else Split(*read(value, name))


def _classes(data: DataSet) -> tuple[str, ...]:
    """Return the class numbers as names, up to the largest label in memory; no names for other labels."""
    labels = [split.labels for split in data.in_memory.values()]
    if any(part.ndim != 1 or part.dtype.kind not in "iub" for part in labels):
        return ()
    return tuple(str(number) for number in range(max(int(part.max()) for part in labels) + 1))


def _first_number(value: Any) -> Any:
    while isinstance(value, (list, tuple)):
        value = value[0]
    return value


def _check_names(name: Any, classes: Any) -> None:
    """Refuse names that cannot be written to the files and the report of a run."""
    if not is_valid_text(name):
        raise DataError(f"The data set has the name {name!r}.", "It is not valid text.", "Give a name in Unicode.")
    for number, label in enumerate(classes):
        if not is_valid_text(label):
            fix = "Give each class a name that can be written as UTF-8."
            raise DataError(f"The class {number} of {name} has the name {label!r}.", "It is not valid text.", fix)
    twice = [label for label in classes if list(classes).count(label) > 1]
    if twice:
        raise DataError(f"Two classes of {name} have the name {twice[0]!r}.", fix="Give each class a different name.")
