"""Data sets with a training, a validation and a test part, and the sources that recipes load them from."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np

from kirsch.annotations import Count, Fix
from kirsch.arguments import checked
from kirsch.distillation.losses.labels import IGNORED
from kirsch.distillation.targets import not_class_numbers, out_of_range
from kirsch.errors import DataError, KirschError, UsageError
from kirsch.failures import error_with_location
from kirsch.frameworks.augment import Augment, Seeded
from kirsch.frameworks.data import ArrayData
from kirsch.frameworks.port import host
from kirsch.frameworks.structure import summary
from kirsch.recipes.models import FAILURES, is_valid_text, preserved_process_state, resolve
from kirsch.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@checked
@dataclass(frozen=True, eq=False)
class Split:
    """Samples with their class numbers.

    Args:
        inputs: model inputs after preprocessing, shape (N, ...), float32. Tensors and lists become arrays.
        labels: class numbers, shape (N,), int64. Tensors and lists become arrays.

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
    """Data set of a classifier, with a training, a validation and a test part.

    Args:
        name: name of the data set in the report.
        train, validation, test: the three parts; `test` is used for reported results only.
        classes: names of the classes, in the order of the models' outputs.
        augment: augmentation of training samples, see `ArrayData`; None for no augmentation.

    Raises:
        DataError: a part is empty, a label is out of range, an input is not finite, or a class has no training sample.
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
            self._check_labels(part, split)
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
        missing = sorted(set(range(len(self.classes))) - set(np.unique(self.train.labels).tolist()))
        if missing:
            raise DataError(
                f"The class {self.classes[missing[0]]!r} of {self.name} has no training sample.",
                f"No label of the train part is {missing[0]}.",
                "Add samples of this class, or remove the class and renumber the others.",
            )

    def _check_labels(self, part: str, split: Split) -> None:
        """Refuse labels that are not one class number per sample."""
        count = len(self.classes)
        if split.labels.ndim != 1 or not np.issubdtype(split.labels.dtype, np.integer):
            error = not_class_numbers(split.labels, (count,))
            fix = "For labels of pixels or positions, or multi-label targets, use kirsch.distill with ArrayData."
            what = error.what.replace("The targets have", f"The labels of the {part} part of {self.name} have")
            why = f"Expected class numbers: one integer per sample, shape (N,), from 0 to {count - 1}."
            if "label_loss" in error.fix:
                fix = f"A DataSet is for classifiers with one class per sample. For kirsch.distill: {error.fix}"
            elif split.labels.ndim <= len("NK"):
                fix = error.fix
            raise DataError(what, why, fix)
        wrong = (split.labels < 0) | (split.labels >= count)
        if wrong.any():
            error = out_of_range(split.labels, wrong, count, IGNORED)
            raise DataError(
                error.what.replace(" has the label", f" of the {part} part of {self.name} has the label"),
                f"There are {count} classes, so labels go from 0 to {count - 1}.",
                "Give targets - 1." if split.labels.min() == 1 else "Leave such samples out, or name all classes.",
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


def _signature(load: Source) -> inspect.Signature:
    """Return the parameters of a source; **options if Python cannot determine them."""
    try:
        return inspect.signature(load)
    except ValueError:
        return inspect.signature(lambda **options: options)


Source = Callable[..., DataSet]
"""Function that returns a data set. It takes the options of the recipe as keyword arguments, and the recipe's seed as
`seed` if it has such a parameter; its randomness should depend on the seed alone."""

SOURCES: Registry[Source] = Registry("data")


def load_data(source: str, options: dict[str, Any], *, seed: int, base: Path | None = None) -> DataSet:
    """Return the data set of a recipe.

    Args:
        source: registered name, or "file.py:callable" or "package.module:callable" of a `Source`.
        options: keyword arguments of the source.
        seed: seed of the recipe, passed as `seed` if the source has such a parameter.
        base: folder that files are relative to.

    Raises:
        UsageError: the source does not take these options.
        DataError: the source fails, or does not return a `DataSet`.
    """
    load: Source = resolve(source, base=base) if ":" in source else SOURCES[source]
    parameters = _signature(load).parameters
    seeded = "seed" in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if seeded and "seed" in options:
        raise UsageError(
            f"data.options contains `seed`, which {source!r} receives from the recipe.",
            fix="Remove it, and set the seed of the recipe.",
        )
    arguments = {**options, "seed": seed} if seeded else options
    try:
        _signature(load).bind(**arguments)
    except TypeError as error:
        takes = [name for name in parameters if name != "seed"]
        raise UsageError(
            f"The data source {source!r} does not take these options.",
            f"{error}.",
            f"Use only {', '.join(takes)} in data.options." if takes else "Remove data.options: it takes no options.",
        ) from error
    try:
        with preserved_process_state():
            data = load(**arguments)
    except KirschError:
        raise
    except FAILURES as error:
        raise DataError(
            f"The data source {source!r} failed.", error_with_location(error), "Fix the source, or change data.options."
        ) from error
    if not isinstance(data, DataSet):
        raise DataError(
            f"The data source {source} returns a {type(data).__name__}; expected a kirsch.DataSet.",
            fix="Return kirsch.DataSet(name, train=kirsch.Split(inputs, labels), ...).",
        )
    return data
