"""Build a store in ranges (consecutive samples, one file each), by one process or several, with interruptions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ValidationError

from kirsch import files
from kirsch.annotations import Between, Count, Positive, Seed
from kirsch.arguments import checked
from kirsch.data.annotations import Model
from kirsch.data.augment import sample_seeds
from kirsch.data.batches import ArrayData
from kirsch.distillation.probabilities import kind_of_outputs
from kirsch.distillation.store import record
from kirsch.distillation.store import specification as spec
from kirsch.distillation.store.reading import TeacherStore
from kirsch.distillation.store.record import LOGITS, Keep, OutputFunction, TeacherRunner, TopK
from kirsch.distillation.store.specification import RangeFile, Specification
from kirsch.errors import OutputError, StoreError, UsageError
from kirsch.frameworks.find import framework_of

RANGE_SAMPLES, RANGE_SHARE, RANGE_BYTES = 16384, 32, 1 << 26
"""A range has the larger of 16,384 samples and 1/32 of all samples, but at most 64 MiB. If a build is killed, its
current range is lost. Smaller ranges would make reading slower, because the samples of a batch lie in more files."""


@checked
def build_store(
    folder: str | Path,
    teacher: Model,
    data: ArrayData,
    *,
    keep: Keep | None = TopK(),  # noqa: B008 - it is frozen
    outputs: OutputFunction | None = None,
    views: Count = 1,
    seed: Seed | None = None,
    temperature: Positive = 1.0,
    batch_size: Count = 256,
    ranges: tuple[Annotated[int, Between(0)], Count] = (0, 1),
    range_size: Count | None = None,
    event: Callable[[dict[str, Any]], None] | None = None,
) -> TeacherStore | None:
    """Run a teacher once on every view of every sample, and store its outputs.

    The outputs are written in ranges of consecutive samples, one file each. Existing ranges are kept, so a second call
    continues an interrupted build. Several processes may share a build: process i of n passes `ranges=(i, n)`.

    Args:
        folder: folder of the store; created if it does not exist.
        teacher: the model to run in inference mode; it is not changed.
        data: inputs, ids and transform; targets are not used.
        keep: format of the logits: `TopK(k)`, `Dense()`, or None if `outputs` has no "logits".
        outputs: callable that takes inputs and returns arrays by name, to store features in addition to, or instead of,
            the logits. "logits" are stored as `keep` states, other arrays as float16. The callable must declare a
            version, such as `outputs.version = "1"`. By default, the teacher's logits are stored.
        views: number of augmented views of each sample; train with `ArrayData(..., views=views)`.
        seed: seed of the augmentation; by default that of the data, or 0.
        temperature: temperature of the log-probabilities of `TopK`.
        batch_size: number of samples in a batch of the teacher.
        ranges: (i, n): build only ranges i, i + n, i + 2n, ...
        range_size: number of samples in a range; by default the larger of 16,384 and 1/32 of all, but at most 64 MiB.
        event: called with {"event": "range", "view", "range", "done", "of"} after each range. An error that
            this callable raises ends the build; the next call of `build_store` continues it.

    Returns:
        The store, or None if ranges of other processes are missing.

    Raises:
        UsageError: an option is out of range or inconsistent with the outputs, the outputs are probabilities, or the
            transform or `outputs` is a callable of the user without a version.
        StoreError: the folder has a store of another teacher, data or transform; the message names the differences.
        NumericError: an output is not finite, or too large for 16 bits.
        OutputError: the folder cannot be written, or the disk has too little space.
    """
    folder, (share, shares) = Path(folder), ranges
    if share >= shares:
        raise UsageError(f"`ranges` is {ranges}; expected (i, n) with 0 <= i < n.")
    runner = TeacherRunner(teacher, data, outputs, batch_size)
    seed = seed if seed is not None else data.seed or 0
    specification = _specify(runner, keep, views, seed, temperature, range_size)
    _begin(folder, data, specification, shares)
    assigned = list(specification.files(folder))[share::shares]
    for done, file in enumerate(assigned, start=1):
        if file.path.is_file():
            continue
        _build_range(file, runner, specification)
        if event is not None:
            event({"event": "range", "view": file.view, "range": file.number, "done": done, "of": len(assigned)})
    if not all(file.path.is_file() for file in specification.files(folder)):
        return None
    files.remove_temporary(folder)  # temporary files of processes that were killed
    return TeacherStore.open(folder)


def _specify(
    runner: TeacherRunner, keep: Keep | None, views: int, seed: int, temperature: float, range_size: int | None
) -> Specification:
    """Return the specification of the store; the teacher is run on one batch to determine the shapes."""
    data, options = runner.data, {"views": views, "seed": seed}
    different = [
        f"{name} is {options[name]}, and the data has {value}"
        for name, value in spec.view_options(data).items()
        if options[name] != value
    ]
    if different:
        raise UsageError(f"The store cannot be built: {'; '.join(different)}.")
    trial = runner(np.arange(min(runner.batch_size, data.samples)), seed, 0)
    if (keep is None) != (LOGITS not in trial):
        raise UsageError(
            f"The outputs {'have no' if keep is not None else 'have'} {LOGITS!r}, and `keep` is {keep!r}.",
            fix="Use TopK(k) or Dense() if the outputs have logits, and keep=None if they have none.",
        )
    if keep is not None:
        _check_not_probabilities(runner, trial, keep)
    ids = data.sample_ids.astype("<i8")
    try:
        specification = Specification(
            samples=data.samples,
            views=views,
            seed=seed,
            range_size=range_size or 1,
            temperature=temperature,
            k=keep.k if isinstance(keep, TopK) else None,
            **record.shapes_of(trial),
            transform=spec.description(data.augment),
            outputs=spec.description(runner.outputs),
            teacher_sha256=framework_of(runner.teacher).inference.fingerprint(runner.teacher),
            data_sha256=spec.data_hash(data),
            ids_sha256=None if np.array_equal(ids, np.arange(len(ids))) else hashlib.sha256(ids.tobytes()).hexdigest(),
        )
    except ValidationError as error:
        raise UsageError("The store cannot be built.", spec.problem(error)) from error
    by_count = max(RANGE_SAMPLES, -(-data.samples // RANGE_SHARE))
    default_size = max(1, min(by_count, RANGE_BYTES // specification.record_bytes))
    return specification.model_copy(update={"range_size": range_size or default_size})


def _check_not_probabilities(runner: TeacherRunner, outputs: dict[str, Any], keep: Keep) -> None:
    """Raise a UsageError if the outputs to be stored as logits are probabilities."""
    kind = kind_of_outputs(outputs[LOGITS], {"softmax"})
    refused = kind == "softmax"
    if kind and not refused and isinstance(keep, TopK) and runner.outputs is None:
        inputs = runner.data.rows(slice(len(outputs[LOGITS])))
        refused = framework_of(runner.teacher).features.is_squashed(runner.teacher, LOGITS, inputs)
    if refused:
        raise UsageError(
            f"The teacher, a {type(runner.teacher).__name__}, returns probabilities: its outputs are from 0 to 1"
            + (" and sum to 1 for each sample." if kind == "softmax" else "."),
            "A store needs logits, because the distillation loss applies the softmax.",
            'Pass the teacher without its last activation, or a callable `outputs` that returns {"logits": the '
            "logarithms of the probabilities}.",
        )


def _begin(folder: Path, data: ArrayData, specification: Specification, shares: int) -> None:
    """Start or continue a store with this specification, after a check of the free disk space."""
    missing = [file.size_bytes for file in specification.files(folder) if not file.path.is_file()]
    files.check_writable(folder, sum(missing) // shares)
    if not (folder / spec.NAME).is_file():
        if len(missing) < specification.views * specification.ranges:
            raise StoreError(
                f"{folder} has records without a {spec.NAME}.", fix="Remove the records, or choose another folder."
            )
        if specification.ids_sha256 is not None:
            files.write_bytes(folder / spec.IDS, data.sample_ids.astype("<i8").tobytes())
        files.write_json(folder / spec.NAME, specification.model_dump(mode="json"))
    given = {name: getattr(specification, name) for name in spec.DESCRIPTIONS}
    Specification.read(folder).check_same(folder, given)


def _build_range(file: RangeFile, runner: TeacherRunner, specification: Specification) -> None:
    chunks = []
    for start in range(0, len(file.samples), runner.batch_size):
        indices = np.array(file.samples[start : start + runner.batch_size])
        outputs = runner(indices, specification.seed, file.view)
        values = record.values_of(specification.keep, outputs, specification.temperature)
        seeds = sample_seeds(specification.seed, file.view, runner.data.sample_ids[indices])
        chunks.append(record.pack_records(np.dtype(specification.fields), values, seeds).tobytes())
    records = b"".join(chunks)
    try:
        files.write_chunks(file.path, (records, specification.digest(file, records)))
    except OutputError:
        if not file.path.is_file():  # else another process has built it, and removed temporary files
            raise
