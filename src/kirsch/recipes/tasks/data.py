"""A data set in three parts, and where it comes from."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kirsch.annotations import Count
from kirsch.arguments import checked
from kirsch.errors import DataError, KirschError, UsageError
from kirsch.frameworks.augment import Augment, Seeded
from kirsch.frameworks.data import ArrayData
from kirsch.recipes.models import FAILURES, resolve
from kirsch.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path


@checked
@dataclass(frozen=True, eq=False)
class Split:
    """Samples and their classes.

    Args:
        inputs: shape (N, ...), float32, prepared as the models take them.
        labels: shape (N,), int64.
    """

    made_by: ClassVar[str] = "kirsch.Split(inputs, labels)"

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]

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
    classes: tuple[str, ...]
    augment: Seeded | Augment | None = None

    def __post_init__(self) -> None:
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
        inspect.signature(load).bind(**{"seed": seed} | options)
    except TypeError as error:
        raise UsageError(
            f"The data source {source!r} does not take these options.", f"{error}.", "Mend data.options."
        ) from error
    if "seed" in options:
        raise UsageError(f"data.options holds the seed of {source!r}.", mend="Set the seed of the recipe.")
    try:
        data = load(seed=seed, **options)
    except KirschError:
        raise
    except FAILURES as error:
        raise DataError(
            f"The data source {source!r} failed.", f"{type(error).__name__}: {error}.", "Mend it, or data.options."
        ) from error
    if not isinstance(data, DataSet):
        raise DataError(f"{source} gives a {type(data).__name__}.", mend="It must give a kirsch DataSet.")
    return data
