"""A data set in three parts, and where it comes from."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import DataError, KirschError, UsageError
from kirsch.failures import told
from kirsch.frameworks.data import ArrayData
from kirsch.recipes.models import FAILURES, contained, is_text, resolve
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
        labels: shape (N,), int64.
    """

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]

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
        _check_names(self.name, self.classes)
        for part in ("train", "validation", "test"):
            split: Split = getattr(self, part)
            if not len(split):
                raise DataError(f"The {part} part of {self.name} is empty.", mend="Give it at least one sample.")
            if len(split.inputs) != len(split.labels):
                raise DataError(
                    f"The {part} part of {self.name} has {len(split.inputs)} inputs and {len(split)} labels."
                )
            wrong = (split.labels < 0) | (split.labels >= len(self.classes))
            if wrong.any():
                raise DataError(
                    f"Sample {int(wrong.argmax())} of the {part} part of {self.name} has the label "
                    f"{int(split.labels[wrong.argmax()])}.",
                    f"There are {len(self.classes)} classes, so labels go from 0 to {len(self.classes) - 1}.",
                )
            if not np.isfinite(split.inputs).all():
                raise DataError(
                    f"The {part} part of {self.name} holds NaN or infinity.", mend="Repair or leave it out."
                )
        missing = sorted(set(range(len(self.classes))) - set(np.unique(self.train.labels).tolist()))
        if missing:
            raise DataError(f"The class {self.classes[missing[0]]!r} of {self.name} has no training sample.")

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


def _check_names(name: Any, classes: Any) -> None:
    """Refuse names that the files and the report of a run could not hold, which are written after all the work."""
    if not is_text(name):
        raise DataError(f"The data set has the name {name!r}.", "It is not valid text.", "Give a name in Unicode.")
    for place, label in enumerate(classes):
        if not is_text(label):
            why = f"It is of type {type(label).__name__}." if not isinstance(label, str) else "It is not valid text."
            fix = "Give each class a name that can be written as UTF-8."
            raise DataError(f"The class {place} of {name} has the name {label!r}.", why, fix)
    twice = [label for label in classes if list(classes).count(label) > 1]
    if twice:
        raise DataError(f"Two classes of {name} have the name {twice[0]!r}.", mend="Give each class its own name.")


def _signature(load: Source) -> inspect.Signature:
    """The parameters of a source; anything is taken where Python cannot tell them."""
    try:
        return inspect.signature(load)
    except ValueError:
        return inspect.signature(lambda **options: options)


Source = Callable[..., DataSet]
"""(seed=..., options of the recipe as keywords) → the data set; everything random in it follows from the seed."""

SOURCES: Registry[Source] = Registry("data")


def load_data(source: str, options: dict[str, Any], *, seed: int, base: Path | None = None) -> DataSet:
    """The data set of a recipe.

    Args:
        source: a registered name, or "file.py:callable" or "package.module:callable" of a `Source`.
        options: its keyword arguments.
        seed: of splits.
        base: folder that files are relative to.

    Raises:
        UsageError: the source does not take these options.
        DataError: it fails, or gives something else.
    """
    load: Source = resolve(source, base=base) if ":" in source else SOURCES[source]
    try:
        _signature(load).bind(**{"seed": seed} | options)
    except TypeError as error:
        raise UsageError(
            f"The data source {source!r} does not take these options.", f"{error}.", "Mend data.options."
        ) from error
    if "seed" in options:
        raise UsageError(f"data.options holds the seed of {source!r}.", mend="Set the seed of the recipe.")
    try:
        with contained():
            data = load(seed=seed, **options)
    except KirschError:
        raise
    except FAILURES as error:
        raise DataError(
            f"The data source {source!r} failed.", told(error), "Repair it, or change data.options."
        ) from error
    if not isinstance(data, DataSet):
        raise DataError(f"{source} gives a {type(data).__name__}.", mend="It must give a kirsch DataSet.")
    return data
