"""Contents and origin of a store, and the paths and hashes of its files.

A folder holds `store.json`, the ids unless they are 0, 1, 2, ..., and one file for each range of samples of each view.
The file of a range contains its records, followed by a sha256 over the specification, the view and number of the range,
and the records together. The sha256 therefore shows whether any of these differ from what was written.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from types import MethodType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kirsch import strict_json
from kirsch.annotations import value_phrase
from kirsch.distillation.store.record import RESERVED, Dense, Keep, TopK, fields_of
from kirsch.errors import StoreError, UsageError, name_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from kirsch.data.batches import ArrayData

NAME, IDS = "store.json", "ids.bin"
LARGEST_RECORD = 2**31 - 1
"""Largest size of a record in bytes: the limit of numpy types."""
DIGEST_BYTES = hashlib.sha256().digest_size

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=2**40)]
Axes = Annotated[tuple[Size, ...], Field(max_length=8)]
FeatureName = Annotated[str, Field(min_length=1, max_length=500)]


@dataclass(frozen=True)
class RangeFile:
    """File of one range of a view: the records of consecutive samples, and their sha256.

    `number` is the index of the range in the view; `samples` are the indices of its samples in the data.
    """

    path: Path
    view: int
    number: int
    samples: range
    size_bytes: int

    def __str__(self) -> str:
        return f"view {self.view}, samples {self.samples[0]} to {self.samples[-1]}"


class Specification(BaseModel):
    """Contents and origin of a store; processes that share a build agree on all of it.

    `classes` is None without logits, and `k` is None unless only the k largest logits are kept. Shapes are those for
    one sample. The last range may have fewer samples. `transform` and `outputs` are texts that describe a callable;
    None if there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kirsch_store: Literal[2] = 2
    samples: Size = Field(description="the number of samples")
    views: int = Field(ge=1, le=10**6, description="the number of views")
    range_size: Size = Field(description="the size of the ranges")
    seed: int = Field(ge=0, description="the seed of the augmentation")
    temperature: float = Field(gt=0, description="the temperature")
    classes: Size | None = Field(description="the number of classes")
    k: Size | None
    positions: Axes = Field(description="the shape of the logits without the classes")
    features: dict[FeatureName, Axes] = Field(max_length=1000, description="the features")
    transform: str | None = Field(description="the transform")
    outputs: str | None = Field(description="the callable that returns the outputs")
    teacher_sha256: Sha256 = Field(description="the teacher's weights")
    data_sha256: Sha256 = Field(description="the data (inputs and ids)")
    ids_sha256: Sha256 | None

    @classmethod
    def read(cls, folder: Path) -> Specification:
        """Read the specification of the store in a folder.

        Raises:
            StoreError: there is no store, or its specification cannot be read or is invalid.
        """
        path = folder / NAME
        try:
            return cls.model_validate_json(json.dumps(strict_json.read(path)))
        except FileNotFoundError as error:
            raise StoreError(f"There is no store in {folder}.", fix="Build one with kirsch.build_store.") from error
        except OSError as error:
            raise StoreError(f"{path} cannot be read.", f"{error.strerror or error}.") from error
        except ValueError as error:
            fix = "Build the store again in another folder."
            raise StoreError(f"{path} is damaged.", problem(error), fix) from error

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse contents that contradict each other; the error names all problems."""
        problems = []
        if self.views > 1 and not self.augmented:
            problems.append(f"views is {self.views}, but without a transform all views are equal")
        if self.temperature != 1 and self.k is None:
            found = f"temperature is {self.temperature}, but {self.keep} stores no probabilities"
            problems.append(f"{found}; set the temperature in training")
        if self.k is not None and self.k > (self.classes or 0):
            problems.append(f"TopK({self.k}) needs {self.k} classes, and there are {self.classes}; use a smaller k")
        if reserved := set(RESERVED) & self.features.keys():
            names = ", ".join(RESERVED)
            problems.append(f"the feature name {min(reserved)!r} is reserved, as are {names}; rename the feature")
        if not self.features and self.classes is None:
            problems.append("there are neither logits nor features")
        if self.record_bytes > LARGEST_RECORD:
            problems.append(f"a record has {self.record_bytes} bytes, and the limit is {LARGEST_RECORD}; store less")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def keep(self) -> Keep | None:
        """Format of the logits."""
        return TopK(self.k) if self.k else Dense() if self.classes else None

    @property
    def augmented(self) -> bool:
        """Whether the samples are augmented."""
        return self.transform is not None

    @property
    def fields(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, numpy type and shape of each field of a record."""
        return fields_of(self.keep, self.classes, self.positions, self.features)

    @property
    def record_bytes(self) -> int:
        """Size of the record of one sample and view."""
        return sum(np.dtype(kind).itemsize * math.prod(shape) for _, kind, shape in self.fields)

    @property
    def ranges(self) -> int:
        """Number of ranges of samples in a view."""
        return -(-self.samples // self.range_size)

    def file(self, folder: Path, view: int, number: int) -> RangeFile:
        """Return the file of a range."""
        path = folder / f"view-{view:04d}-range-{number:06d}.bin"
        samples = range(self.samples)[number * self.range_size : (number + 1) * self.range_size]
        return RangeFile(path, view, number, samples, len(samples) * self.record_bytes + DIGEST_BYTES)

    def files(self, folder: Path, views: Iterable[int] | None = None) -> Iterator[RangeFile]:
        """Yield the files of some views, by default of all."""
        views = range(self.views) if views is None else views
        return (self.file(folder, view, number) for view in views for number in range(self.ranges))

    @cached_property
    def _origin(self) -> bytes:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json")).encode()).digest()

    def digest(self, file: RangeFile, records: Any) -> bytes:
        """Return the sha256 that a file ends with; `records` is a buffer."""
        digest = hashlib.sha256(self._origin + f"{file.view} {file.number} ".encode())
        digest.update(records)
        return digest.digest()

    def check_same(self, folder: Path, given: Mapping[str, Any]) -> None:
        """Raise a StoreError that names each property of the store in a folder that differs from a given value."""
        different = [
            f"{DESCRIPTIONS[name]} ({name}: stored {_shown(name, getattr(self, name))}, given {_shown(name, value)})"
            for name, value in given.items()
            if getattr(self, name) != value
        ]
        if different:
            raise StoreError(
                f"The store {folder} is stale.",
                f"It was built with another value of {'; '.join(different)}.",
                "Pass the values that the store was built with, or build another store in another folder.",
            )


DESCRIPTIONS = {name: field.description for name, field in Specification.model_fields.items() if field.description}
DESCRIPTIONS["keep"] = "the format of the logits"
"""Descriptions of the properties of a store, for messages."""


def _shown(name: str, value: Any) -> str:
    return f"{value[:12]}…" if name.endswith("_sha256") else f"{value}"


def problem(error: ValueError) -> str:
    """Return a sentence on the first invalid property of a specification."""
    if not isinstance(error, ValidationError):
        return f"{error}."
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}."


def damaged_store_error(folder: Path, found: str) -> StoreError:
    """Return the error for a store with damaged files."""
    return StoreError(
        f"The store {folder} is damaged.",
        f"{found}.",
        "Delete the damaged files, which `verify` names, and build the store again with the same arguments.",
    )


# ------------------------------------------------------------------------------------------------ data and transforms


def data_hash(data: ArrayData) -> str:
    """Return the sha256 of the inputs (type, shape and bytes) and the ids, in their order; labels are not included."""
    digest = hashlib.sha256()
    for array in (*data.parts.values(), data.sample_ids.astype("<i8")):
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def view_options(data: ArrayData) -> dict[str, int]:
    """Return the views and the seed of data with a transform, if they are set."""
    options = {"views": data.views, "seed": data.seed} if data.augment is not None else {}
    return {name: value for name, value in options.items() if value is not None}


def description(value: Any) -> str | None:
    """Return a text that is the same for two callables if both have the same name, version and fields.

    Transforms of Kirsch are described by their fields. A callable of the user must declare a version, because its code
    does not determine what it computes: it may call other code, or read values from its module.

    Args:
        value: a transform of Kirsch, a callable of the user with a version, or None.

    Raises:
        UsageError: a callable of the user has no version, or a field of a dataclass cannot be described.
    """
    if value is None:
        return None
    if isinstance(value, MethodType):
        return f"{description(value.__self__)}.{value.__name__}"
    if not is_dataclass(value) or isinstance(value, type):
        return f"{name_of(value)} version {_version(value)}"
    names = [field.name for field in fields(value)]
    settings = ", ".join(f"{name}={_setting(value, name, getattr(value, name))}" for name in names)
    if type(value).__module__.startswith("kirsch."):
        return f"{type(value).__qualname__}({settings})"
    return f"{name_of(value)}({settings}) version {_version(value)}"


def _setting(owner: Any, name: str, value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_setting(owner, name, item) for item in value)})"
    if callable(value):
        return str(description(value))
    raise UsageError(
        f"The field `{name}` of {name_of(owner)} is {value_phrase(value)}, which a store cannot describe.",
        fix="Use numbers, texts, transforms and tuples of these, or a class that is not a dataclass.",
    )


def _version(value: Any) -> str | int:
    """Return the version that a callable declares."""
    version = getattr(value, "version", None)
    settings = [name for name in getattr(value, "__dict__", {}) if name != "version"]
    if isinstance(version, bool) or not isinstance(version, (str, int)) or version == "":
        found = f"{value_phrase(version)} as version; expected a text or a whole number"
        flaw = f"has {'no version' if version is None else found}"
        fix = (
            'Set f.version = "1" after the definition of a function, self.version = "1" in the constructor of a class, '
            "or the class attribute `version` of a dataclass. Change the version whenever the results change, also if "
            "only a setting changed."
        )
    elif settings and not is_dataclass(value) and isinstance(getattr(type(value), "version", None), (str, int)):
        flaw = f"has the version {version!r} for all objects, which may differ in `{settings[0]}`"
        fix = f'Set self.version in the constructor, such as f"{version} {settings[0]}={{{settings[0]}}}".'
    else:
        return version
    raise UsageError(f"{name_of(value)} {flaw}.", "A store recognizes it by its version, not by its code.", fix)
