"""What a store holds and what it was built from, as it is written to disk and read back with suspicion."""

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

    from kirsch.frameworks.data import ArrayData

MANIFEST, BUILDING, IDS = files.MANIFEST, "building.json", "ids.bin"
LARGEST_RECORD = 2**31 - 1
"""Bytes; numpy's types are no larger."""
CHUNK = 1 << 26
"""Bytes that are hashed at a time."""

Sha256 = Annotated[str, Limit(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Limit(ge=1, le=2**40, strict=True)]

SAID = {
    "teacher_sha256": "the teacher's weights",
    "outputs_sha256": "the callable that gives the outputs",
    "data_sha256": "the data (inputs and ids)",
    "transform_sha256": "the transform",
    "temperature": "the temperature",
    "seed": "the seed of the augmentation",
    "views": "the number of views",
    "samples": "the number of samples",
    "range_size": "the size of the ranges",
    "classes": "the number of classes",
    "keep": "what is kept",
    "fields": "the fields of a record",
    "ids_sha256": "the ids",
}
"""What a store was built from, in words."""


class FieldOnDisk(BaseModel):
    """See `record.Field`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Limit(min_length=1, max_length=500)]
    type: Literal["u1", "u2", "u4", "f2", "f4"]
    shape: Annotated[tuple[Size, ...], Limit(max_length=8)]


class Specification(BaseModel):
    """What is known of a store before any of it is built; two processes that build one store agree on all of it."""

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
    def _fields_make_a_record(self) -> Self:
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names) or names[0] != "seed" or self.fields[0].type != "u4" or self.fields[0].shape:
            raise ValueError("fields: they must differ in name and begin with the seed")
        needed = {"top-k": TOP_K, "dense": DENSE, None: ()}[self.keep]
        if not set(needed) <= set(names) or (self.keep == "top-k" and not self._shape("indices")):
            raise ValueError(f"fields: {', '.join(needed)} are needed")
        if self.record_bytes > LARGEST_RECORD:
            raise ValueError(f"fields: a record has {self.record_bytes} bytes; {LARGEST_RECORD} is the most")
        return self

    @property
    def record_bytes(self) -> int:
        """Of one sample and view."""
        return sum(int(field.type[1]) * math.prod(field.shape) for field in self.fields)

    @property
    def record_fields(self) -> tuple[Field, ...]:
        """The fields as `record` takes them."""
        return tuple(Field(field.name, field.type, field.shape) for field in self.fields)

    @property
    def record_type(self) -> np.dtype[Any]:
        """The numpy type of one record."""
        return record_type(self.record_fields)

    @property
    def kept(self) -> Keep | None:
        """What is kept of the logits."""
        return TopK(self._shape("indices")[-1]) if self.keep == "top-k" else Dense() if self.keep == "dense" else None

    def _shape(self, name: str) -> tuple[int, ...]:
        return next(field.shape for field in self.fields if field.name == name)

    @property
    def ranges(self) -> int:
        """How many ranges of samples each view is built in."""
        return -(-self.samples // self.range_size)

    def bounds(self, number: int) -> tuple[int, int]:
        """The first sample of a range, and the one after its last."""
        return number * self.range_size, min((number + 1) * self.range_size, self.samples)


class Manifest(Specification):
    """A finished store: the specification, and the sha256 of each range of each view."""

    sha256: tuple[tuple[Sha256, ...], ...]

    @model_validator(mode="after")
    def _each_range_has_a_hash(self) -> Self:
        if len(self.sha256) != self.views or any(len(view) != self.ranges for view in self.sha256):
            raise ValueError(f"sha256: {self.views} views of {self.ranges} ranges each are needed")
        return self


def read(path: Path, kind: type[Specification]) -> Any:
    """A specification or manifest from its file.

    Raises:
        StoreError: it cannot be read, or says what cannot be.
    """
    try:
        content = json.dumps(strict_json.read(path))
        return kind.model_validate_json(content, strict=True)  # strict: "yes" and 1 are not true, and true is not 1
    except OSError as error:
        raise StoreError(f"{path} cannot be read.", f"{error.strerror or error}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StoreError(
            f"{path} is damaged.",
            f"{place + ': ' if place else ''}{first['msg']}.",
            "Build the store again in another folder.",
        ) from error
    except ValueError as error:
        raise StoreError(f"{path} is damaged.", f"{error}.", "Build the store again in another folder.") from error


def differences(stored: Specification, asked: dict[str, Any]) -> list[str]:
    """What differs between a store and what is asked of it, in words that show both values."""
    found = []
    for name, value in asked.items():
        own = getattr(stored, name)
        if own != value:
            found.append(f"{SAID[name]} ({name}: stored {_shown(own)}, given {_shown(value)})")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == len(hashlib.sha256().hexdigest()):
        return f"{value[:12]}…"
    if isinstance(value, tuple):
        return ", ".join(f"{field.name} {' × '.join([*map(str, field.shape), field.type])}" for field in value)
    return f"{value}"


def data_hash(data: ArrayData) -> str:
    """The sha256 over type, shape and bytes of the inputs, and the ids, in their order; labels do not count."""
    digest = hashlib.sha256()
    for array in (*data.parts.values(), data.sample_ids.astype("<i8")):
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        rows = max(1, CHUNK * len(array) // max(array.nbytes, 1))
        for start in range(0, len(array), rows):
            digest.update(np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def text_hash(text: str) -> str:
    """The sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def ids_on_disk(data: ArrayData) -> NDArray[Any] | None:
    """The ids as they are written, little-endian; None where they count from 0 and need no file."""
    ids = data.sample_ids.astype("<i8")
    return None if np.array_equal(ids, np.arange(len(ids))) else ids


def view_file(folder: Path, view: int) -> Path:
    """Where the records of a finished view lie, one after the other in the order of the data."""
    return folder / f"view-{view:04d}.bin"


def range_file(folder: Path, view: int, number: int) -> Path:
    """Where a range lies while its view is not finished: its records, and their sha256 in 32 bytes."""
    return folder / "parts" / f"view-{view:04d}" / f"range-{number:06d}.bin"


def digest_file(folder: Path, view: int) -> Path:
    """Where the sha256 of the ranges of a view lie, one after the other, from before it is made until the manifest."""
    return folder / "parts" / f"view-{view:04d}.sha256"


def missing_ranges(folder: Path, stored: Specification) -> list[tuple[int, int]]:
    """(view, range) of all that is still to be built."""
    open_views = (view for view in range(stored.views) if not view_file(folder, view).is_file())
    return [(v, n) for v in open_views for n in range(stored.ranges) if not range_file(folder, v, n).is_file()]


def partial(folder: Path, stored: Specification, missing: list[tuple[int, int]]) -> StoreError:
    """The error for a store of which ranges are missing."""
    if not missing:
        return StoreError(
            f"The store {folder} is not finished.", "All its ranges are built.", "Finish it: store.finish(folder)."
        )
    (view, number), count = missing[0], stored.views * stored.ranges
    first, end = stored.bounds(number)
    return StoreError(
        f"The store {folder} is partial.",
        f"{len(missing)} of {count} ranges are missing, the first of view {view}, samples {first} to {end - 1}.",
        "Build it again with the same arguments: what is there is kept.",
    )


def other_ranges(path: Path, stored: Specification, hashes: Sequence[str]) -> list[tuple[int, int]]:
    """The bounds of each range of a finished view that does not have its sha256."""
    found = zip(hashes, range_hashes(path, stored), strict=True)
    return [stored.bounds(number) for number, (wanted, now) in enumerate(found) if wanted != now]


def range_hashes(path: Path, stored: Specification) -> list[str]:
    """The sha256 of each range of a finished view, as its file is now."""
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
