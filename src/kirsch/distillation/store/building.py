"""Building a store range by range, by one process or several; an interrupted build can be continued."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import ValidationError

from kirsch import files
from kirsch.annotations import Between, Count, Seed
from kirsch.arguments import checked
from kirsch.data.annotations import Model
from kirsch.data.augment import sample_seeds
from kirsch.data.batches import ArrayData
from kirsch.distillation.probabilities import shape_of
from kirsch.distillation.store import specification as spec
from kirsch.distillation.store.description import description
from kirsch.distillation.store.reading import TeacherStore
from kirsch.distillation.store.record import Dense, Keep, TopK, fields_of, pack_records, record_values
from kirsch.distillation.store.running import Outputs, TeacherRunner
from kirsch.distillation.store.specification import Manifest, Specification, range_file, view_file
from kirsch.errors import OutputError, StoreError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

RANGE_SAMPLES, RANGE_BYTES = 16384, 1 << 26
"""Upper limits for a range, the unit of work that is lost if a build is killed."""
DIGEST_BYTES = hashlib.sha256().digest_size
LOCK = "store.lock"


@checked
def build(
    folder: str | Path,
    teacher: Model,
    data: ArrayData,
    *,
    keep: Keep | None = TopK(),  # noqa: B008 - it is frozen
    outputs: Outputs | None = None,
    views: Count = 1,
    seed: Seed | None = None,
    temperature: float = 1.0,
    batch_size: Count = 256,
    ranges: tuple[Annotated[int, Between(0)], Count] = (0, 1),
    range_size: Count | None = None,
    event: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], Exception | None] | None = None,
) -> TeacherStore | None:
    """Run a teacher once on every view of every sample, and store its outputs.

    Existing ranges are kept, so an interrupted build continues when it is called again. Several processes may share a
    build: process i of n passes `ranges=(i, n)`, and when all are done, one of them calls `finish`.

    Args:
        folder: folder of the store; created if it does not exist.
        teacher: run in inference mode and not changed.
        data: inputs, ids and transform; targets are not used.
        keep: format of the logits: `TopK(k)`, `Dense()`, or None if `outputs` has no "logits".
        outputs: callable that takes inputs and returns arrays by name, to store features in addition to, or instead of,
            the logits. "logits" are stored as `keep` states, other arrays as float16. By default the teacher's logits.
        views: number of augmented views of each sample; train with `ArrayData(..., views=views)`.
        seed: seed of the augmentation; by default that of the data, or 0.
        temperature: temperature of the log-probabilities of `TopK`.
        batch_size: number of samples in a batch of the teacher.
        ranges: (i, n): build only ranges i, i + n, i + 2n, ..., and do not finish the store.
        range_size: number of samples in a range; by default at most 16,384 samples and 64 MiB.
        event: called with {"event": "range", "view", "range", "done", "of"} after each range.
        stop: called after each range; if it returns an error, the error is raised.

    Returns:
        The store, or None if the build is shared.

    Raises:
        UsageError: an option is out of range or inconsistent with the outputs, or the outputs are probabilities.
        StoreError: the folder has a store of another teacher, data or transform; the message names the differences.
        NumericError: an output is not finite, or too large for 16 bits.
        OutputError: the folder cannot be written, or the disk has too little space.
    """
    folder, (share, shares) = Path(folder), ranges
    runner = TeacherRunner(teacher, data, outputs, batch_size)
    seed = seed if seed is not None else data.seed or 0
    _check_options(data, keep, views, seed, temperature, ranges, range_size)
    specification = _specify(runner, data, keep, views, seed, temperature, range_size)
    if (folder / spec.MANIFEST).is_file():
        store = TeacherStore.open(folder)
        _check_same(folder, store.manifest, specification)
        return store if shares == 1 else None
    _begin(folder, data, specification, shares)
    assigned = [(view, number) for view in range(views) for number in range(specification.ranges)][share::shares]
    for done, (view, number) in enumerate(assigned, start=1):
        if view_file(folder, view).is_file() or range_file(folder, view, number).is_file():
            continue
        _build_range(folder, runner, data, specification, view, number)
        if event is not None:
            event({"event": "range", "view": view, "range": number, "done": done, "of": len(assigned)})
        error = stop() if stop is not None else None
        if error is not None:
            raise error
    return finish(folder) if shares == 1 else None


def _check_options(
    data: ArrayData,
    keep: Keep | None,
    views: int,
    seed: int,
    temperature: float,
    ranges: tuple[int, int],
    range_size: int | None,
) -> None:
    """Raise a UsageError that names all invalid options."""
    problems = []
    if views < 1:
        problems.append(f"views is {views}; at least 1 is needed")
    if data.augment is None and views > 1:
        problems.append(f"views is {views}, but without a transform all views are equal")
    options = {"views": (views, data.views), "seed": (seed, data.seed)} if data.augment is not None else {}
    problems += [
        f"{name} is {value}, and the data has {data_value}"
        for name, (value, data_value) in options.items()
        if data_value not in (None, value)
    ]
    if seed < 0:
        problems.append(f"seed is {seed}; an integer of at least 0 is needed")
    if not (math.isfinite(temperature) and temperature > 0):
        problems.append(f"temperature is {temperature}; a number above 0 is needed")
    elif temperature != 1 and not isinstance(keep, TopK):
        problems.append(
            f"temperature is {temperature}, but {keep} stores no probabilities; set the temperature in training"
        )
    if not 0 <= ranges[0] < ranges[1]:
        problems.append(f"ranges is {ranges}; (i, n) with 0 <= i < n is needed")
    if range_size is not None and range_size < 1:
        problems.append(f"range_size is {range_size}; at least 1 is needed")
    if problems:
        raise UsageError("The store cannot be built: " + "; ".join(problems) + ".")


def _specify(
    runner: TeacherRunner,
    data: ArrayData,
    keep: Keep | None,
    views: int,
    seed: int,
    temperature: float,
    range_size: int | None,
) -> Specification:
    """Return the specification of the store; the teacher is run on two samples to determine the shapes."""
    trial = runner(np.arange(min(2, data.samples)), seed, 0)
    fields = fields_of(keep, trial)
    _check_not_probabilities(runner, trial, data, keep)
    ids = spec.ids_on_disk(data)
    properties = {
        "samples": data.samples,
        "views": views,
        "seed": seed,
        "temperature": float(temperature),
        "classes": None if keep is None else trial["logits"].shape[-1],
        "keep": {TopK: "top-k", Dense: "dense"}.get(type(keep)),
        "augmented": data.augment is not None,
        "fields": [{"name": field.name, "type": field.type, "shape": field.shape} for field in fields],
        "data_sha256": spec.data_hash(data),
        "transform_sha256": spec.text_hash(description(data.augment)),
        "ids_sha256": None if ids is None else hashlib.sha256(ids.tobytes()).hexdigest(),
        **runner.hashes(),
    }
    try:
        specification = Specification.model_validate(properties | {"range_size": range_size or 1})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError("The store cannot be built.", f"{first['msg']}.", "Store less for each sample.") from error
    default_size = max(1, min(RANGE_SAMPLES, RANGE_BYTES // specification.record_bytes))
    return specification.model_copy(update={"range_size": range_size or default_size})


def _check_not_probabilities(
    runner: TeacherRunner, outputs: dict[str, Any], data: ArrayData, keep: Keep | None
) -> None:
    """Raise a UsageError if the outputs to be stored as logits are probabilities."""
    shape = shape_of(outputs["logits"], {"softmax"}) if keep is not None else ""
    if shape == "softmax" or (
        isinstance(keep, TopK) and shape and runner.returns_probabilities(data.rows(slice(len(outputs))))
    ):
        raise UsageError(
            f"The teacher, a {runner.teacher_name}, returns probabilities: its outputs are from 0 to 1"
            + (" and sum to 1 for each sample." if shape == "softmax" else "."),
            "A store needs logits, because the distillation loss applies the softmax.",
            'Pass the teacher without its last activation, or a callable `outputs` that returns {"logits": the '
            "logarithms of the probabilities}.",
        )


def _check_same(folder: Path, stored: Specification, specification: Specification) -> None:
    different = spec.differences(stored, {name: getattr(specification, name) for name in spec.DESCRIPTIONS})
    if different:
        raise StoreError(
            f"The folder {folder} has another store.",
            f"It differs in {'; '.join(different)}.",
            "Choose another folder, or remove this one.",
        )


def _begin(folder: Path, data: ArrayData, specification: Specification, shares: int) -> None:
    """Start or continue a store with this specification, after a check of the free disk space."""
    exists = (folder / spec.BUILDING).is_file()
    if exists:
        _check_same(folder, spec.read(folder / spec.BUILDING, Specification), specification)
    elif view_file(folder, 0).exists() and not (folder / spec.MANIFEST).exists():
        raise StoreError(f"{folder} has views without a manifest.", fix="Remove it, or choose another folder.")
    missing = len(spec.missing_ranges(folder, specification)) * specification.range_size * specification.record_bytes
    one_view = specification.samples * specification.record_bytes  # `finish` writes a view before it removes its ranges
    files.check_writable(folder, missing // shares + one_view)
    for view in range(specification.views):
        files.check_writable(range_file(folder, view, 0).parent)
    if not exists:
        ids = spec.ids_on_disk(data)
        if ids is not None:
            files.write_bytes(folder / spec.IDS, ids.tobytes())
        files.write_text(folder / spec.BUILDING, specification.model_dump_json(indent=2) + "\n")


def _build_range(
    folder: Path, runner: TeacherRunner, data: ArrayData, specification: Specification, view: int, number: int
) -> None:
    records = []
    start, end = specification.bounds(number)
    for first in range(start, end, runner.batch_size):
        indices = np.arange(first, min(first + runner.batch_size, end))
        outputs = runner(indices, specification.seed, view)
        if first == 0:  # again with a full batch; `_specify` checked two samples
            _check_not_probabilities(runner, outputs, data, specification.kept)
        values = record_values(specification.kept, outputs, specification.temperature)
        seeds = sample_seeds(specification.seed, view, data.sample_ids[indices])
        records.append(pack_records(specification.record_fields, values, seeds))
    content = np.concatenate(records).tobytes()
    try:
        files.write_bytes(range_file(folder, view, number), content + hashlib.sha256(content).digest())
    except OutputError:
        if not view_file(folder, view).is_file():  # else another process has finished the view
            raise


@checked
def finish(folder: str | Path) -> TeacherStore:
    """Finish a store whose ranges are all built: merge each view into one file, and write the manifest.

    Raises:
        StoreError: ranges are missing or damaged, or the folder has no store.
        OutputError: the folder cannot be written, or another process is finishing the store.
    """
    folder = Path(folder)
    if (folder / spec.MANIFEST).is_file():
        return TeacherStore.open(folder)
    if not (folder / spec.BUILDING).is_file():
        raise StoreError(f"There is no store in {folder}.", fix="Build one with kirsch.distillation.store.build.")
    busy = OutputError(f"The store {folder} is being finished by another process.", fix="Wait for it.")
    with files.exclusive_lock(folder / LOCK, busy):
        if not (folder / spec.MANIFEST).is_file():
            stored = spec.read(folder / spec.BUILDING, Specification)
            missing = spec.missing_ranges(folder, stored)
            if missing:
                raise spec.partial_store_error(folder, stored, missing)
            hashes = [_finish_view(folder, stored, view) for view in range(stored.views)]
            manifest = Manifest.model_validate(stored.model_dump() | {"sha256": hashes})
            files.write_text(folder / spec.MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        shutil.rmtree(folder / "parts", ignore_errors=True)
        (folder / spec.BUILDING).unlink(missing_ok=True)
        files.remove_temporary(folder)
    return TeacherStore.open(folder)


def _finish_view(folder: Path, stored: Specification, view: int) -> list[str]:
    """Merge the ranges of a view into one file, unless it exists; return the sha256 of each range."""
    target, digest_file = view_file(folder, view), spec.digest_file(folder, view)
    if target.is_file():  # a process was killed before it wrote the manifest
        return _verified_hashes(target, digest_file, stored)
    paths = [range_file(folder, view, number) for number in range(stored.ranges)]
    digests = [_digest(path) for path in paths]

    def chunks() -> Iterator[bytes]:
        for number, (path, digest) in enumerate(zip(paths, digests, strict=True)):
            content, (first, end) = path.read_bytes()[:-DIGEST_BYTES], stored.bounds(number)
            if len(content) != (end - first) * stored.record_bytes or hashlib.sha256(content).digest() != digest:
                raise StoreError(
                    f"{path} is damaged.",
                    "Its sha256 differs from the one it was written with.",
                    "Remove it and build again.",
                )
            yield content

    files.write_bytes(digest_file, b"".join(digests))
    files.write_chunks(target, chunks())
    shutil.rmtree(range_file(folder, view, 0).parent, ignore_errors=True)
    return [digest.hex() for digest in digests]


def _digest(path: Path) -> bytes:
    """Read the sha256 of a range from the end of its file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - DIGEST_BYTES))
        return file.read()


def _verified_hashes(target: Path, digest_file: Path, stored: Specification) -> list[str]:
    """Return the sha256 of each range of a merged view; raise a StoreError if the file does not match them."""
    content = digest_file.read_bytes() if digest_file.is_file() else b""
    hashes = [content[start : start + DIGEST_BYTES].hex() for start in range(0, len(content), DIGEST_BYTES)]
    if len(hashes) != stored.ranges or spec.changed_ranges(target, stored, hashes):
        raise StoreError(
            f"{target} is damaged.",
            "Its sha256 differs from the one it was written with.",
            "Remove it and build again.",
        )
    return hashes
