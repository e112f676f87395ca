"""Contents and origin of a store, and the paths and hashes of its files.

A folder holds `store.json`, the ids unless they are 0, 1, 2, ..., and one file for each range of samples of each view.
The file of a range is its records, followed by their sha256 together with that of the specification. So it is found
damaged wherever its records, its place or the origin of the store differ from those that it was written with.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic import Field as Limit

from kirsch import strict_json
from kirsch.distillation.store.record import RESERVED, Dense, Keep, Shape, TopK, fields_of
from kirsch.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kirsch.data.batches import ArrayData

NAME, IDS = "store.json", "ids.bin"
LARGEST_RECORD = 2**31 - 1
"""Bytes; the limit of numpy types."""
DIGEST_BYTES = hashlib.sha256().digest_size

Sha256 = Annotated[str, Limit(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Limit(ge=1, le=2**40)]
Axes = Annotated[tuple[Size, ...], Limit(max_length=8)]

DESCRIPTIONS = {
    "teacher_sha256": "the teacher's weights",
    "outputs": "the callable that returns the outputs",
    "data_sha256": "the data (inputs and ids)",
    "transform": "the transform",
    "temperature": "the temperature",
    "seed": "the seed of the augmentation",
    "views": "the number of views",
    "samples": "the number of samples",
    "range_size": "the size of the ranges",
    "keep": "the format of the logits",
    "classes": "the number of classes",
    "positions": "the shape of the logits without the classes",
    "features": "the features",
}
"""Descriptions of the properties of a store, for messages."""


class Specification(BaseModel):
    """Contents and origin of a store, as in `DESCRIPTIONS`. Processes that share a build agree on all of it.

    `classes` is None without logits, and `k` None unless the largest k are kept; shapes are those for one sample. The
    last range may have fewer samples. `transform` and `outputs` are descriptions, None if there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kirsch_store: Literal[2] = 2
    samples: Size
    views: Annotated[int, Limit(ge=1, le=10**6)]
    range_size: Size
    seed: Annotated[int, Limit(ge=0)]
    temperature: Annotated[float, Limit(gt=0)]
    classes: Size | None
    k: Size | None
    positions: Axes
    features: Annotated[dict[Annotated[str, Limit(min_length=1, max_length=500)], Axes], Limit(max_length=1000)]
    transform: str | None
    outputs: str | None
    teacher_sha256: Sha256
    data_sha256: Sha256
    ids_sha256: Sha256 | None

    @model_validator(mode="after")
    def _check_record(self) -> Self:
        if self.k is not None and self.k > (self.classes or 0):
            raise ValueError(f"TopK({self.k}) needs {self.k} classes, and there are {self.classes}; use a smaller k")
        if reserved := set(RESERVED) & self.features.keys():
            raise ValueError(
                f"the feature name {min(reserved)!r} is reserved, as are {', '.join(RESERVED)}; rename the feature"
            )
        if not self.features and self.classes is None:
            raise ValueError("there are neither logits nor features")
        if self.record_bytes > LARGEST_RECORD:
            raise ValueError(f"a record has {self.record_bytes} bytes, and the limit is {LARGEST_RECORD}; store less")
        return self

    @property
    def keep(self) -> Keep | None:
        """Format of the logits."""
        if self.k is not None:
            return TopK(self.k)
        return None if self.classes is None else Dense()

    @property
    def augmented(self) -> bool:
        """Whether the samples are augmented."""
        return self.transform is not None

    @property
    def fields(self) -> list[tuple[str, str, Shape]]:
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

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the index of the first sample of a range, and that after the last."""
        return number * self.range_size, min((number + 1) * self.range_size, self.samples)

    def place(self, view: int, number: int) -> str:
        """Return view and samples of a range, for messages."""
        first, end = self.bounds(number)
        return f"view {view}, samples {first} to {end - 1}"

    def file_bytes(self, number: int) -> int:
        """Return the size of the file of a range."""
        first, end = self.bounds(number)
        return (end - first) * self.record_bytes + DIGEST_BYTES

    def all_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (view, range) of each range."""
        return ((view, number) for view in range(self.views) for number in range(self.ranges))

    @cached_property
    def _origin(self) -> bytes:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json")).encode()).digest()

    def digest(self, view: int, number: int, records: Any) -> bytes:
        """Return the sha256 that the file of a range ends with; `records` is a buffer."""
        digest = hashlib.sha256(self._origin + f"{view} {number} ".encode())
        digest.update(records)
        return digest.digest()


def range_file(folder: Path, view: int, number: int) -> Path:
    """Path of the records of a range of samples in a view, in the order of the data, and their sha256."""
    return folder / f"view-{view:04d}-range-{number:06d}.bin"


def read(folder: Path) -> Specification:
    """Read the specification of the store in a folder.

    Raises:
        StoreError: there is no store, or its specification cannot be read or is invalid.
    """
    path = folder / NAME
    try:
        content = json.dumps(strict_json.read(path))
        return Specification.model_validate_json(content)
    except FileNotFoundError as error:
        fix = "Build one with kirsch.build_store."
        raise StoreError(f"There is no store in {folder}.", fix=fix) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read.", f"{error.strerror or error}.") from error
    except ValueError as error:
        why = problem(error) if isinstance(error, ValidationError) else f"{error}."
        raise StoreError(f"{path} is damaged.", why, "Build the store again in another folder.") from error


def problem(error: ValidationError) -> str:
    """Return a sentence on the first invalid property of a specification."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}."


def check_same(folder: Path, stored: Specification, given: dict[str, Any]) -> None:
    """Compare properties of a store with given values.

    Raises:
        StoreError: some differ; the message names each with both values.
    """
    different = [
        f"{DESCRIPTIONS[name]} ({name}: stored {_format(name, getattr(stored, name))}, given {_format(name, value)})"
        for name, value in given.items()
        if getattr(stored, name) != value
    ]
    if different:
        raise StoreError(
            f"The store {folder} is stale.",
            f"It was built with another value of {'; '.join(different)}.",
            "Pass the values it was built with, or build it in another folder.",
        )


def _format(name: str, value: Any) -> str:
    return f"{value[:12]}…" if name.endswith("_sha256") else f"{value}"


def data_hash(data: ArrayData) -> str:
    """Return the sha256 of the inputs (type, shape and bytes) and the ids, in their order; labels are not included."""
    digest = hashlib.sha256()
    for array in (*data.parts.values(), data.sample_ids.astype("<i8")):
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def damaged(folder: Path, found: str) -> StoreError:
    """Return the error for a store with damaged files."""
    return StoreError(
        f"The store {folder} is damaged.",
        f"{found}.",
        "Delete the damaged files, which `verify` names, and build the store again with the same arguments.",
    )
