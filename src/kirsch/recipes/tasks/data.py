"""A data set in three parts, and where it comes from."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.distillation.losses.labels import IGNORED
from kirsch.distillation.targets import not_class_numbers, out_of_range
from kirsch.errors import DataError, KirschError, UsageError
from kirsch.frameworks.data import ArrayData
from kirsch.frameworks.port import host
from kirsch.frameworks.structure import look
from kirsch.recipes.models import FAILURES, resolve
from kirsch.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from kirsch.frameworks.augment import Augment, Seeded


@dataclass(frozen=True, eq=False)
class Split:
    """Samples and their classes.

    Args:
        inputs: shape (N, ...), float32, prepared as the models take them.
        labels: class numbers, shape (N,), int64. Tensors and lists become arrays.

    Raises:
        DataError: one of them is not an array of numbers, such as a DataLoader.
    """

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name in ("inputs", "labels"):
            object.__setattr__(self, name, _array(name, getattr(self, name)))

    def __len__(self) -> int:
        return len(self.labels)


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

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    augment: Seeded | Augment | None = None

    def __post_init__(self) -> None:
        if isinstance(self.classes, (int, str)):
            names = "tuple(map(str, range(10)))" if isinstance(self.classes, int) else f"({self.classes!r}, ...)"
            raise DataError(
                f"The classes of {self.name} are {self.classes!r}; the name of each class is needed.",
                "They are in the order of the models' outputs.",
                f"Give classes={names.replace('10', str(self.classes)) if isinstance(self.classes, int) else names}.",
            )
        for part in ("train", "validation", "test"):
            split: Split = getattr(self, part)
            if not len(split):
                raise DataError(f"The {part} part of {self.name} is empty.", mend="Give it at least one sample.")
            if len(split.inputs) != len(split.labels):
                raise DataError(
                    f"The {part} part of {self.name} has {len(split.inputs)} inputs and {len(split)} labels."
                )
            self._check_labels(part, split)
            if split.inputs.ndim != self.train.inputs.ndim:
                raise DataError(
                    f"The {part} part of {self.name} has inputs of shape {split.inputs.shape}, the train part "
                    f"{self.train.inputs.shape}.",
                    "The models take the samples of all parts alike.",
                )
            if not np.isfinite(split.inputs).all():
                raise DataError(
                    f"The {part} part of {self.name} holds NaN or infinity.", mend="Repair or leave it out."
                )
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
            if "label_loss" in error.mend:
                fix = f"A DataSet is for classifiers that answer one class a sample. For kirsch.distill: {error.mend}"
            elif split.labels.ndim <= len("NK"):
                fix = error.mend
            raise DataError(what, why, fix)
        wrong = (split.labels < 0) | (split.labels >= count)
        if wrong.any():
            error = out_of_range(split.labels, wrong, count, IGNORED)
            raise DataError(
                error.what.replace(" has the label", f" of the {part} part of {self.name} has the label"),
                f"There are {count} classes, so labels go from 0 to {count - 1}.",
                "Give targets - 1." if split.labels.min() == 1 else "Leave such samples out, or name all classes.",
            )

    def batches(self, batch_size: int) -> ArrayData:
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
        return found
    what = look(given) if found is None or isinstance(given, list) else f"{found.dtype} of shape {found.shape}"
    loads = hasattr(given, "dataset") or (hasattr(given, "__getitem__") and not hasattr(given, "__array__"))
    raise DataError(
        f"The {name} of a Split are {what}; one array with all samples on the first axis is needed.",
        "A data set of kirsch.compress lies in memory.",
        "Collect them: numpy.concatenate([batch[0].numpy() for batch in loader]), and batch[1] for the labels."
        if loads and not isinstance(given, (list, tuple, str))
        else "Give numbers of one shape for each sample.",
    )


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
    seeded = _takes_seed(load)
    if seeded and "seed" in options:
        raise UsageError(f"data.options holds the seed of {source!r}.", mend="Set the seed of the recipe.")
    given = {**options, "seed": seed} if seeded else options
    try:
        inspect.signature(load).bind(**given)
    except TypeError as error:
        takes = [name for name in inspect.signature(load).parameters if name != "seed"]
        raise UsageError(
            f"The data source {source!r} does not take these options.",
            f"{error}.",
            f"It takes {', '.join(takes)}: change data.options." if takes else "It takes no options: leave them out.",
        ) from error
    except ValueError:  # it has no signature
        pass
    try:
        data = load(**given)
    except KirschError:
        raise
    except FAILURES as error:
        raise DataError(
            f"The data source {source!r} failed.", f"{type(error).__name__}: {error}.", "Mend it, or data.options."
        ) from error
    if not isinstance(data, DataSet):
        raise DataError(
            f"{source} gives a {type(data).__name__}.",
            mend="It must give a kirsch DataSet: kirsch.DataSet(name, train=kirsch.Split(inputs, labels), ...).",
        )
    return data


def _takes_seed(load: Source) -> bool:
    """Whether a source has an argument for the seed."""
    try:
        parameters = inspect.signature(load).parameters
    except ValueError:
        return False
    return "seed" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
