"""Specification and manifest of a store: contents and origin, validated when they are read from disk."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic import Field as Limit

from kirsch import files, strict_json
from kirsch.distillation.store.record import DENSE, TOP_K, Dense, Field, Keep, TopK, record_type
from kirsch.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from kirsch.data.batches import ArrayData

MANIFEST, BUILDING, IDS = files.MANIFEST, "building.json", "ids.bin"
LARGEST_RECORD = 2**31 - 1
"""Bytes; the limit of numpy types."""
CHUNK = 1 << 26
"""Number of bytes that are hashed at a time."""

Sha256 = Annotated[str, Limit(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Limit(ge=1, le=2**40, strict=True)]

DESCRIPTIONS = {
    "teacher_sha256": "the teacher's weights",
    "outputs_sha256": "the callable that returns the outputs",
    "data_sha256": "the data (inputs and ids)",
    "transform_sha256": "the transform",
    "temperature": "the temperature",
    "seed": "the seed of the augmentation",
    "views": "the number of views",
    "samples": "the number of samples",
    "range_size": "the size of the ranges",
    "classes": "the number of classes",
    "keep": "the format of the logits",
    "fields": "the fields of a record",
    "ids_sha256": "the ids",
}
"""Descriptions of the properties of a store, for messages."""


class FieldOnDisk(BaseModel):
    """A `record.Field` as it is stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Limit(min_length=1, max_length=500)]
    type: Literal["u1", "u2", "u4", "f2", "f4"]
    shape: Annotated[tuple[Size, ...], Limit(max_length=8)]


class Specification(BaseModel):
    """Properties of a store that are known before it is built. Processes that share a build agree on all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kirsch_store: Annotated[int, Limit(ge=1, le=1, strict=True)] = 1
    samples: Size
    views: Annotated[int, Limit(ge=1, le=10**6, strict=True)]
    range_size: Size
    seed: Annotated[int, Limit(ge=0, strict=True)]
    temperature: Annotated[float, Limit(gt=0)]
    classes: Size | None
    keep: Literal["top-k", "dense"] | None
    augmented: bool
    fields: Annotated[tuple[FieldOnDisk, ...], Limit(min_length=1, max_length=1000)]
    teacher_sha256: Sha256
    outputs_sha256: Sha256 | None
    data_sha256: Sha256
    transform_sha256: Sha256
    ids_sha256: Sha256 | None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names) or names[0] != "seed" or self.fields[0].type != "u4" or self.fields[0].shape:
            raise ValueError("fields: names must be unique, and the first field must be the seed")
        needed = {"top-k": TOP_K, "dense": DENSE, None: ()}[self.keep]
        if not set(needed) <= set(names) or (self.keep == "top-k" and not self._shape("indices")):
            raise ValueError(f"fields: {', '.join(needed)} are needed")
        if self.record_bytes > LARGEST_RECORD:
            raise ValueError(f"fields: a record has {self.record_bytes} bytes; the limit is {LARGEST_RECORD}")
        return self

    @property
    def record_bytes(self) -> int:
        """Size of the record of one sample and view."""
        return sum(int(field.type[1]) * math.prod(field.shape) for field in self.fields)

    @property
    def record_fields(self) -> tuple[Field, ...]:
        """Fields of a record."""
        return tuple(Field(field.name, field.type, field.shape) for field in self.fields)

    @property
    def record_type(self) -> np.dtype[Any]:
        """Numpy type of one record."""
        return record_type(self.record_fields)

    @property
    def kept(self) -> Keep | None:
        """Format of the logits."""
        return TopK(self._shape("indices")[-1]) if self.keep == "top-k" else Dense() if self.keep == "dense" else None

    def _shape(self, name: str) -> tuple[int, ...]:
        return next(field.shape for field in self.fields if field.name == name)

    @property
    def ranges(self) -> int:
        """Number of ranges of samples in a view."""
        return -(-self.samples // self.range_size)

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the index of the first sample of a range, and that after the last."""
        return number * self.range_size, min((number + 1) * self.range_size, self.samples)


class Manifest(Specification):
    """Specification of a finished store, with the sha256 of each range of each view."""

    sha256: tuple[tuple[Sha256, ...], ...]

    @model_validator(mode="after")
    def _check_hashes(self) -> Self:
        if len(self.sha256) != self.views or any(len(view) != self.ranges for view in self.sha256):
            raise ValueError(f"sha256: {self.views} views of {self.ranges} ranges each are needed")
        return self


def read(path: Path, kind: type[Specification]) -> Any:
    """Read a specification or manifest from its file.

    Raises:
        StoreError: the file cannot be read, or its content is invalid.
    """
    try:
        content = json.dumps(strict_json.read(path))
        return kind.model_validate_json(
            content, strict=True
        )  # strict: "yes" and 1 are not accepted for true, nor true for 1
    except OSError as error:
        raise StoreError(f"{path} cannot be read.", f"{error.strerror or error}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise StoreError(
            f"{path} is damaged.",
            f"{key + ': ' if key else ''}{first['msg']}.",
            "Build the store again in another folder.",
        ) from error
    except ValueError as error:
        raise StoreError(f"{path} is damaged.", f"{error}.", "Build the store again in another folder.") from error


def differences(stored: Specification, expected: dict[str, Any]) -> list[str]:
    """Describe each property of a store that differs from the expected value, with both values."""
    return [
        f"{DESCRIPTIONS[name]} ({name}: stored {_format(getattr(stored, name))}, given {_format(value)})"
        for name, value in expected.items()
        if getattr(stored, name) != value
    ]


def _format(value: Any) -> str:
    if isinstance(value, str) and len(value) == len(hashlib.sha256().hexdigest()):
        return f"{value[:12]}…"
    if isinstance(value, tuple):
        return ", ".join(f"{field.name} {' × '.join([*map(str, field.shape), field.type])}" for field in value)
    return f"{value}"


def data_hash(data: ArrayData) -> str:
    """Return the sha256 of the inputs (type, shape and bytes) and the ids, in their order; labels are not included."""
    digest = hashlib.sha256()
    for array in (*data.parts.values(), data.sample_ids.astype("<i8")):
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        rows = max(1, CHUNK * len(array) // max(array.nbytes, 1))
        for start in range(0, len(array), rows):
            digest.update(np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def text_hash(text: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def ids_on_disk(data: ArrayData) -> NDArray[Any] | None:
    """Return the ids in the byte order of the file, or None if they are 0, 1, 2, ... and need no file."""
    ids = data.sample_ids.astype("<i8")
    return None if np.array_equal(ids, np.arange(len(ids))) else ids


def view_file(folder: Path, view: int) -> Path:
    """Path of the records of a finished view, in the order of the data."""
    return folder / f"view-{view:04d}.bin"


def range_file(folder: Path, view: int, number: int) -> Path:
    """Path of a range of an unfinished view: its records, followed by their sha256 in 32 bytes."""
    return folder / "parts" / f"view-{view:04d}" / f"range-{number:06d}.bin"


def digest_file(folder: Path, view: int) -> Path:
    """Path of the concatenated sha256 of the ranges of a view, until the manifest is written."""
    return folder / "parts" / f"view-{view:04d}.sha256"


def missing_ranges(folder: Path, stored: Specification) -> list[tuple[int, int]]:
    """Return (view, range) of each range that is not built yet."""
    open_views = (view for view in range(stored.views) if not view_file(folder, view).is_file())
    return [(v, n) for v in open_views for n in range(stored.ranges) if not range_file(folder, v, n).is_file()]


def partial_store_error(folder: Path, stored: Specification, missing: list[tuple[int, int]]) -> StoreError:
    """Return the error for a store that is not finished."""
    if not missing:
        return StoreError(
            f"The store {folder} is not finished.", "All its ranges are built.", "Finish it: store.finish(folder)."
        )
    (view, number), count = missing[0], stored.views * stored.ranges
    first, end = stored.bounds(number)
    return StoreError(
        f"The store {folder} is partial.",
        f"{len(missing)} of {count} ranges are missing, the first of view {view}, samples {first} to {end - 1}.",
        "Build it again with the same arguments; existing ranges are kept.",
    )


def changed_ranges(path: Path, stored: Specification, hashes: Sequence[str]) -> list[tuple[int, int]]:
    """Return the bounds of each range of a finished view whose sha256 differs from the expected one."""
    pairs = zip(hashes, range_hashes(path, stored), strict=True)
    return [stored.bounds(number) for number, (expected, actual) in enumerate(pairs) if expected != actual]


def range_hashes(path: Path, stored: Specification) -> list[str]:
    """Compute the sha256 of each range of a finished view."""
    hashes = []
    with path.open("rb") as file:
        for number in range(stored.ranges):
            first, end = stored.bounds(number)
            digest, left = hashlib.sha256(), (end - first) * stored.record_bytes
            while left > 0 and (content := file.read(min(left, CHUNK))):
                digest.update(content)
                left -= len(content)
            hashes.append(digest.hexdigest())
    return hashes
