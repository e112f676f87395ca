"""Filling a store: range by range, by one process or several, again and again until it is whole."""

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
from kirsch.distillation.probabilities import shape_of
from kirsch.distillation.store import specification as spec
from kirsch.distillation.store.description import description
from kirsch.distillation.store.reading import TeacherStore
from kirsch.distillation.store.record import Dense, Keep, TopK, fields_of, packed, values
from kirsch.distillation.store.running import Outputs, Runner
from kirsch.distillation.store.specification import Manifest, Specification, range_file, view_file
from kirsch.errors import OutputError, StoreError, UsageError
from kirsch.frameworks.annotations import Model
from kirsch.frameworks.augment import sample_seeds
from kirsch.frameworks.data import ArrayData

if TYPE_CHECKING:
    from collections.abc import Iterator

RANGE_SAMPLES, RANGE_BYTES = 16384, 1 << 26
"""A range, which is what a kill may cost, has at most as many samples and bytes."""
DIGEST = hashlib.sha256().digest_size
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
    """Run a teacher once on every view of every sample, and keep what it puts out.

    What is built already is kept, so that a build that was stopped or killed goes on. Several processes may share one
    build: process i of n gives `ranges=(i, n)`, and when all are done, one calls `finish`.

    Args:
        folder: of the store; made if it is not there.
        teacher: run in inference mode; it is left as it is.
        data: inputs, ids and transform; targets do not matter.
        keep: of the scores: `TopK(k)`, `Dense()`, or None where `outputs` has no "logits".
        outputs: inputs → arrays by name, for features beside or instead of the scores: "logits" are kept as `keep`
            says, all else as float16. The scores of the teacher if left out.
        views: how many looks of each sample; training takes `ArrayData(..., views=views)`.
        seed: of the augmentation; that of the data, or 0, if left out.
        temperature: of the log-probabilities of `TopK`.
        batch_size: samples that the teacher is run on at a time.
        ranges: (i, n): build each n-th range from the i-th on, and do not finish.
        range_size: samples of a range; at most 16,384 samples and 64 MiB if left out.
        event: called with {"event": "range", "view", "range", "done", "of"} after each range.
        stop: asked after each range; the error that it gives is raised.

    Returns:
        The store; None where the build is shared.

    Raises:
        UsageError: an option is out of range, or does not fit the outputs, or these are probabilities.
        StoreError: the folder holds a store of another teacher, data or transform; says which differs.
        NumericError: an output is not finite, or too large for 16 bits.
        OutputError: the folder cannot be written, or has too little room.
    """
    folder, (share, shares) = Path(folder), ranges
    runner = Runner(teacher, data, outputs, batch_size)
    seed = seed if seed is not None else data.seed or 0
    _check_options(data, keep, views, seed, temperature, ranges, range_size)
    wanted = _specified(runner, data, keep, views, seed, temperature, range_size)
    if (folder / spec.MANIFEST).is_file():
        store = TeacherStore.open(folder)
        _check_same(folder, store.manifest, wanted)
        return store if shares == 1 else None
    _begin(folder, data, wanted, shares)
    own = [(v, n) for v in range(views) for n in range(wanted.ranges) if (v * wanted.ranges + n) % shares == share]
    for done, (view, number) in enumerate(own, start=1):
        if view_file(folder, view).is_file() or range_file(folder, view, number).is_file():
            continue
        _build_range(folder, runner, data, wanted, view, number)
        if event is not None:
            event({"event": "range", "view": view, "range": number, "done": done, "of": len(own)})
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
    """Raise a UsageError that names all that is wrong."""
    wrong = []
    if views < 1:
        wrong.append(f"views is {views}; at least 1 is needed")
    if data.augment is None and views > 1:
        wrong.append(f"views is {views}, but without a transform all views are the same")
    said = {"views": (views, data.views), "seed": (seed, data.seed)} if data.augment is not None else {}
    wrong += [f"{name} is {own}, and the data has {it}" for name, (own, it) in said.items() if it not in (None, own)]
    if seed < 0:
        wrong.append(f"seed is {seed}; a whole number of at least 0 is needed")
    if not (math.isfinite(temperature) and temperature > 0):
        wrong.append(f"temperature is {temperature}; a number above 0 is needed")
    elif temperature != 1 and not isinstance(keep, TopK):
        wrong.append(f"temperature is {temperature}, but what {keep} keeps knows none: it is chosen while learning")
    if not 0 <= ranges[0] < ranges[1]:
        wrong.append(f"ranges is {ranges}; (i, n) with 0 <= i < n is needed")
    if range_size is not None and range_size < 1:
        wrong.append(f"range_size is {range_size}; at least 1 is needed")
    if wrong:
        raise UsageError("The store cannot be built: " + "; ".join(wrong) + ".")


def _specified(
    runner: Runner,
    data: ArrayData,
    keep: Keep | None,
    views: int,
    seed: int,
    temperature: float,
    range_size: int | None,
) -> Specification:
    """What the store will be; the teacher is run on two samples for the shapes."""
    trial = runner(np.arange(min(2, data.samples)), seed, 0)
    fields = fields_of(keep, trial)
    _refuse_probabilities(runner, trial, data, keep)
    ids = spec.ids_on_disk(data)
    known = {
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
        wanted = Specification.model_validate(known | {"range_size": range_size or 1})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError("The store cannot be built.", f"{first['msg']}.", "Keep less of each sample.") from error
    fitting = max(1, min(RANGE_SAMPLES, RANGE_BYTES // wanted.record_bytes))
    return wanted.model_copy(update={"range_size": range_size or fitting})


def _refuse_probabilities(runner: Runner, found: dict[str, Any], data: ArrayData, keep: Keep | None) -> None:
    """Refuse outputs that are kept as logits and are probabilities."""
    shape = shape_of(found["logits"], {"softmax"}) if keep is not None else ""
    if shape == "softmax" or (isinstance(keep, TopK) and shape and runner.squashed(data.rows(slice(len(found))))):
        raise UsageError(
            f"The teacher, a {runner.teacher_name}, puts out probabilities: they are from 0 to 1"
            + (" and sum to 1 for each sample." if shape == "softmax" else "."),
            "A store keeps logits, and what learns from it applies the softmax.",
            'Give the teacher without its last activation, or with outputs= a callable: inputs → {"logits": the '
            "logarithms of its probabilities}.",
        )


def _check_same(folder: Path, stored: Specification, wanted: Specification) -> None:
    found = spec.differences(stored, {name: getattr(wanted, name) for name in spec.SAID})
    if found:
        raise StoreError(
            f"The folder {folder} holds another store.",
            f"It differs in {'; '.join(found)}.",
            "Choose another folder, or remove this one.",
        )


def _begin(folder: Path, data: ArrayData, wanted: Specification, shares: int) -> None:
    """A new store, or one that was begun by the same specification; with room for what is still to come."""
    begun = (folder / spec.BUILDING).is_file()
    if begun:
        _check_same(folder, spec.read(folder / spec.BUILDING, Specification), wanted)
    elif view_file(folder, 0).exists() and not (folder / spec.MANIFEST).exists():
        raise StoreError(f"{folder} holds views without a manifest.", fix="Remove it, or choose another folder.")
    missing = len(spec.missing_ranges(folder, wanted)) * wanted.range_size * wanted.record_bytes
    one_view = wanted.samples * wanted.record_bytes  # `finish` writes a view before it removes its ranges
    files.check_writable(folder, missing // shares + one_view)
    for view in range(wanted.views):
        files.check_writable(range_file(folder, view, 0).parent)
    if not begun:
        ids = spec.ids_on_disk(data)
        if ids is not None:
            files.write_bytes(folder / spec.IDS, ids.tobytes())
        files.write_text(folder / spec.BUILDING, wanted.model_dump_json(indent=2) + "\n")


def _build_range(folder: Path, runner: Runner, data: ArrayData, wanted: Specification, view: int, number: int) -> None:
    records = []
    start, end = wanted.bounds(number)
    for first in range(start, end, runner.batch_size):
        places = np.arange(first, min(first + runner.batch_size, end))
        outputs = runner(places, wanted.seed, view)
        if first == 0:  # of more samples than those that the shapes are found by
            _refuse_probabilities(runner, outputs, data, wanted.kept)
        found = values(wanted.kept, outputs, wanted.temperature)
        seeds = sample_seeds(wanted.seed, view, data.sample_ids[places])
        records.append(packed(wanted.record_fields, found, seeds))
    content = np.concatenate(records).tobytes()
    try:
        files.write_bytes(range_file(folder, view, number), content + hashlib.sha256(content).digest())
    except OutputError:
        if not view_file(folder, view).is_file():  # another process that builds the same has finished the view
            raise


@checked
def finish(folder: str | Path) -> TeacherStore:
    """The store, when all its ranges are built: each view becomes one file, and the manifest is written.

    Raises:
        StoreError: ranges are missing or damaged, or the folder holds no store.
        OutputError: the folder cannot be written, or another process finishes it.
    """
    folder = Path(folder)
    if (folder / spec.MANIFEST).is_file():
        return TeacherStore.open(folder)
    if not (folder / spec.BUILDING).is_file():
        raise StoreError(f"{folder} holds no store.", fix="Build one: kirsch.distillation.store.build.")
    busy = OutputError(f"The store {folder} is being finished by another process.", fix="Wait for it.")
    with files.exclusive_lock(folder / LOCK, busy):
        if not (folder / spec.MANIFEST).is_file():
            stored = spec.read(folder / spec.BUILDING, Specification)
            missing = spec.missing_ranges(folder, stored)
            if missing:
                raise spec.partial(folder, stored, missing)
            hashes = [_finish_view(folder, stored, view) for view in range(stored.views)]
            manifest = Manifest.model_validate(stored.model_dump() | {"sha256": hashes})
            files.write_text(folder / spec.MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        shutil.rmtree(folder / "parts", ignore_errors=True)
        (folder / spec.BUILDING).unlink(missing_ok=True)
        files.remove_temporary(folder)
    return TeacherStore.open(folder)


def _finish_view(folder: Path, stored: Specification, view: int) -> list[str]:
    """Make one file of the ranges of a view, unless it is there; gives the sha256 of each range as it was built."""
    target, known = view_file(folder, view), spec.digest_file(folder, view)
    if target.is_file():  # a process was killed between writing it and the manifest
        return _finished(target, known, stored)
    paths = [range_file(folder, view, number) for number in range(stored.ranges)]
    digests = [_digest(path) for path in paths]

    def chunks() -> Iterator[bytes]:
        for number, (path, digest) in enumerate(zip(paths, digests, strict=True)):
            content, (first, end) = path.read_bytes()[:-DIGEST], stored.bounds(number)
            if len(content) != (end - first) * stored.record_bytes or hashlib.sha256(content).digest() != digest:
                raise StoreError(
                    f"{path} is damaged.", "It does not have the sha256 it was written with.", "Remove it, build again."
                )
            yield content

    files.write_bytes(known, b"".join(digests))
    files.write_chunks(target, chunks())
    shutil.rmtree(range_file(folder, view, 0).parent, ignore_errors=True)
    return [digest.hex() for digest in digests]


def _digest(path: Path) -> bytes:
    """The sha256 that a range was written with, which follows its records."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - DIGEST))
        return file.read()


def _finished(target: Path, known: Path, stored: Specification) -> list[str]:
    """The sha256 of each range of a view that is made already, which must be those that its ranges were built with."""
    whole = known.read_bytes() if known.is_file() else b""
    hashes = [whole[at : at + DIGEST].hex() for at in range(0, len(whole), DIGEST)]
    if len(hashes) != stored.ranges or spec.other_ranges(target, stored, hashes):
        raise StoreError(
            f"{target} is damaged.", "It does not have the sha256 it was written with.", "Remove it, build again."
        )
    return hashes
