"""A data set in three parts, and where it comes from."""

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
from kirsch.frameworks.structure import look
from kirsch.recipes.models import FAILURES, contained, is_text, resolve
from kirsch.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@checked
@dataclass(frozen=True, eq=False)
class Split:
    """Samples and their classes.

    Args:
        inputs: shape (N, ...), float32, prepared as the models take them.
        labels: class numbers, shape (N,), int64. Tensors and lists become arrays.

    Raises:
        DataError: one of them is not an array of numbers, such as a DataLoader, or they differ in number.
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
                fix="Give one label for each input, on the first axis.",
            )

    def __len__(self) -> int:
        return len(self.labels)


@checked
@dataclass(frozen=True, eq=False)
class DataSet:
    """What a recipe's models are trained on, chosen by, and judged on.

    Args:
        name: for the report.
        train, validation, test: `test` is only ever used to report.
        classes: names, in the order of the models' outputs.
        augment: of training samples, see `ArrayData`; None for none.

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
                    "The models take the samples of all parts alike.",
                )
            if not np.isfinite(split.inputs).all():
                raise DataError(f"The {part} part of {self.name} holds NaN or infinity.", fix="Repair or leave it out.")
        missing = sorted(set(range(len(self.classes))) - set(np.unique(self.train.labels).tolist()))
        if missing:
            raise DataError(
                f"The class {self.classes[missing[0]]!r} of {self.name} has no training sample.",
                f"No label of the train part is {missing[0]}.",
                "Give it samples, or leave it out of the classes and number the others anew.",
            )

    def _check_labels(self, part: str, split: Split) -> None:
        """Refuse labels that are not class numbers, one a sample."""
        count = len(self.classes)
        if split.labels.ndim != 1 or not np.issubdtype(split.labels.dtype, np.integer):
            error = not_class_numbers(split.labels, (count,))
            fix = (
                "For labels of pixels or positions, or of several classes at once, take kirsch.distill with ArrayData."
            )
            what = error.what.replace("The targets have", f"The labels of the {part} part of {self.name} have")
            why = f"They must be class numbers: one whole number a sample, shape (N,), from 0 to {count - 1}."
            if "label_loss" in error.fix:
                fix = f"A DataSet is for classifiers that answer one class a sample. For kirsch.distill: {error.fix}"
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
        """The training part, in batches."""
        return ArrayData(self.train.inputs, self.train.labels, batch_size, self.augment)

    @cached_property
    def sha256(self) -> str:
        """A hash over all samples and labels."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(np.ascontiguousarray(split.inputs).tobytes())
            digest.update(np.ascontiguousarray(split.labels).tobytes())
        return digest.hexdigest()


def _array(name: str, given: Any) -> NDArray[Any]:
    """An array of numbers of what is given as one part of a split."""
    try:
        found = host(given) if hasattr(given, "shape") else np.asarray(given) if isinstance(given, list) else None
    except (ValueError, TypeError, RuntimeError):  # samples of several shapes
        found = None
    if found is not None and found.ndim and found.dtype.kind in "biuf":
        python_floats = isinstance(given, list) and found.size and type(_first(given)) is float
        return found.astype(np.float32) if python_floats else found  # numpy would make them float64
    what = look(given) if found is None or isinstance(given, list) else f"{found.dtype} of shape {found.shape}"
    loads = hasattr(given, "dataset") or (hasattr(given, "__getitem__") and not hasattr(given, "__array__"))
    raise DataError(
        f"The {name} of a Split are {what}; one array with all samples on the first axis is needed.",
        "A data set of kirsch.compress lies in memory.",
        "Collect them: numpy.concatenate([batch[0].numpy() for batch in loader]), and batch[1] for the labels."
        if loads and not isinstance(given, (list, tuple, str))
        else "Give numbers of one shape for each sample.",
    )


def _first(given: Any) -> Any:
    while isinstance(given, (list, tuple)):
        given = given[0]
    return given


def _check_names(name: Any, classes: Any) -> None:
    """Refuse names that the files and the report of a run could not hold, which are written after all the work."""
    if not is_text(name):
        raise DataError(f"The data set has the name {name!r}.", "It is not valid text.", "Give a name in Unicode.")
    for place, label in enumerate(classes):
        if not is_text(label):
            fix = "Give each class a name that can be written as UTF-8."
            raise DataError(f"The class {place} of {name} has the name {label!r}.", "It is not valid text.", fix)
    twice = [label for label in classes if list(classes).count(label) > 1]
    if twice:
        raise DataError(f"Two classes of {name} have the name {twice[0]!r}.", fix="Give each class its own name.")


def _signature(load: Source) -> inspect.Signature:
    """The parameters of a source; anything is taken where Python cannot tell them."""
    try:
        return inspect.signature(load)
    except ValueError:
        return inspect.signature(lambda **options: options)


Source = Callable[..., DataSet]
"""(options of the recipe as keywords, and its seed as seed= if there is such an argument) → the data set.

Everything random in it should follow from the seed."""

SOURCES: Registry[Source] = Registry("data")


def load_data(source: str, options: dict[str, Any], *, seed: int, base: Path | None = None) -> DataSet:
    """The data set of a recipe.

    Args:
        source: a registered name, or "file.py:callable" or "package.module:callable" of a `Source`.
        options: its keyword arguments.
        seed: of splits; given to it as `seed` if it has such an argument.
        base: folder that files are relative to.

    Raises:
        UsageError: the source does not take these options.
        DataError: it fails, or gives something else.
    """
    load: Source = resolve(source, base=base) if ":" in source else SOURCES[source]
    parameters = _signature(load).parameters
    seeded = "seed" in parameters or any(found.kind is found.VAR_KEYWORD for found in parameters.values())
    if seeded and "seed" in options:
        raise UsageError(f"data.options holds the seed of {source!r}.", fix="Set the seed of the recipe.")
    given = {**options, "seed": seed} if seeded else options
    try:
        _signature(load).bind(**given)
    except TypeError as error:
        takes = [name for name in parameters if name != "seed"]
        raise UsageError(
            f"The data source {source!r} does not take these options.",
            f"{error}.",
            f"It takes {', '.join(takes)}: change data.options." if takes else "It takes no options: leave them out.",
        ) from error
    try:
        with contained():
            data = load(**given)
    except KirschError:
        raise
    except FAILURES as error:
        raise DataError(
            f"The data source {source!r} failed.", error_with_location(error), "Repair it, or change data.options."
        ) from error
    if not isinstance(data, DataSet):
        raise DataError(
            f"{source} gives a {type(data).__name__}.",
            fix="It must give a kirsch DataSet: kirsch.DataSet(name, train=kirsch.Split(inputs, labels), ...).",
        )
    return data
