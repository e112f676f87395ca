"""Data sets with a training, a validation and a test part."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from kirsch.annotations import Count, Fix
from kirsch.arguments import checked
from kirsch.data.arrays import host
from kirsch.data.augment import Augment, Seeded
from kirsch.data.batches import ArrayData
from kirsch.data.structure import summary
from kirsch.errors import DataError
from kirsch.references import is_valid_text

if TYPE_CHECKING:
    from numpy.typing import NDArray


@checked
@dataclass(frozen=True, eq=False)
class Split:
    """Samples with their labels.

    Args:
        inputs: model inputs after preprocessing, shape (N, ...), float32. Tensors and lists become arrays.
        labels: as the task needs them, such as class numbers of shape (N,), int64. Tensors and lists become arrays.

    Raises:
        DataError: an argument is not an array of numbers, or inputs and labels differ in number.
    """

    made_by: ClassVar[str] = "kirsch.Split(inputs, labels)"

    inputs: Any
    labels: Any

    def __post_init__(self) -> None:
        for name in ("inputs", "labels"):
            object.__setattr__(self, name, _array(name, getattr(self, name)))
        if len(self.inputs) != len(self.labels):
            raise DataError(
                f"A Split has {len(self.inputs)} inputs and {len(self.labels)} labels.",
                fix="Give one label for each input; samples lie on the first axis.",
            )

    def __len__(self) -> int:
        return len(self.labels)


@checked
@dataclass(frozen=True, eq=False)
class DataSet:
    """Data set with a training, a validation and a test part.

    Args:
        name: name of the data set in the report.
        train, validation, test: the three parts; `test` is used for reported results only.
        classes: names of the classes, in the order of the models' outputs.
        augment: augmentation of training samples, see `ArrayData`; None for no augmentation.

    Raises:
        DataError: a part is empty, an input is not finite, or a name is not valid. The labels are checked by the task
            that uses them, see `kirsch.tasks`.
    """

    made_by: ClassVar[str] = "kirsch.DataSet(name, train=kirsch.Split(inputs, labels), validation=..., test=..., ...)"

    name: str
    train: Split
    validation: Split
    test: Split
    classes: Annotated[
        tuple[str, ...],
        Fix("Give the name of each class, in the order of the models' outputs, such as tuple(map(str, range(10)))."),
    ]
    augment: Seeded | Augment | None = None

    def __post_init__(self) -> None:
        _check_names(self.name, self.classes)
        for part in ("train", "validation", "test"):
            split: Split = getattr(self, part)
            if not len(split):
                raise DataError(f"The {part} part of {self.name} is empty.", fix="Give it at least one sample.")
            if split.inputs.ndim != self.train.inputs.ndim:
                raise DataError(
                    f"The {part} part of {self.name} has inputs of shape {split.inputs.shape}, the train part "
                    f"{self.train.inputs.shape}.",
                    fix="Give inputs with the same number of axes in all parts.",
                )
            if not np.isfinite(split.inputs).all():
                raise DataError(
                    f"The {part} part of {self.name} contains NaN or infinity.", fix="Remove these samples."
                )

    @checked
    def batches(self, batch_size: Count) -> ArrayData:
        """Return the training part in batches."""
        return ArrayData(self.train.inputs, self.train.labels, batch_size, self.augment)

    @cached_property
    def sha256(self) -> str:
        """Return a hash over all samples and labels."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(np.ascontiguousarray(split.inputs).tobytes())
            digest.update(np.ascontiguousarray(split.labels).tobytes())
        return digest.hexdigest()


def _array(name: str, value: Any) -> NDArray[Any]:
    """Convert inputs or labels to an array of numbers."""
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
        f"The {name} of a Split are {what}; expected one array with all samples on the first axis.",
        "A data set of kirsch.compress is held in memory.",
        "Collect the batches: numpy.concatenate([batch[0].numpy() for batch in loader]), and batch[1] for the labels."
        if loads and not isinstance(value, (list, tuple, str))
        else "Give numbers of the same shape for each sample.",
    )


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
