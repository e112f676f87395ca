"""Reading and verifying a finished store.

A record holds the teacher's outputs for one sample and view. A range is a series of consecutive samples, whose records
for one view are one file.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kirsch import figures
from kirsch.annotations import Between, Count, Seed
from kirsch.arguments import checked
from kirsch.data.annotations import Model
from kirsch.data.augment import sample_seeds
from kirsch.data.batches import ArrayData
from kirsch.distillation.store import record
from kirsch.distillation.store import specification as spec
from kirsch.distillation.store.record import LOGITS, SEED, OutputFunction, TeacherRunner
from kirsch.distillation.store.specification import RangeFile, Specification, damaged_store_error
from kirsch.errors import DataError, ShapeError, StoreError
from kirsch.frameworks.find import framework_of

TOLERANCE = 2.0**-9
"""Largest difference of a store that agrees with its teacher: four times the rounding error of 16 bits, because the
teacher's outputs depend slightly on the batch size."""
MAX_LISTED = 4
MAX_MAPPED = 256
"""Largest number of files mapped at the same time: each holds a file descriptor, and a process may have only 1,024."""

View = Annotated[int, Between(0, 2**53)]


@dataclass(frozen=True)
class StoreCheck:
    """Comparison of a store with the current outputs of the teacher.

    Args:
        samples: number of samples compared.
        differences: largest difference by field, absolute for values below 1, and relative above.
        top1_agreement: fraction of samples or positions for which stored and current outputs have the same most
            probable class; None without logits.
    """

    samples: int
    differences: dict[str, float]
    top1_agreement: float | None

    @property
    def agrees(self) -> bool:
        """Whether no difference is above 2⁻⁹, four times the rounding error of 16 bits."""
        return all(difference <= TOLERANCE for difference in self.differences.values())


@checked
class TeacherStore:
    """Outputs of a teacher for each view of each sample, memory-mapped from disk.

    Args:
        folder: folder of the store.
        specification: contents and origin of the store.
    """

    made_by: ClassVar[str] = "kirsch.TeacherStore.open(folder)"

    @staticmethod
    def of_text(text: str) -> str:
        """Return the call that opens a store, for the error of `kirsch.arguments.checked`."""
        return f"If it is the folder of a teacher store, give kirsch.TeacherStore.open({text!r})."

    def __repr__(self) -> str:
        """Return one line: the contents and the folder."""
        stored = self.specification
        views = f", {stored.views} views" if stored.views > 1 else ""
        classes = f", {stored.classes} classes" if stored.classes is not None else ""
        records = ", ".join([LOGITS] * (stored.classes is not None) + list(stored.features))
        return f"<kirsch.TeacherStore: {stored.samples:,} samples{views}{classes}, records {records}, in {self.folder}>"

    def __init__(self, folder: Path, specification: Specification) -> None:
        self.folder, self.specification = folder, specification
        self.record_bytes, self.record_type = specification.record_bytes, np.dtype(specification.fields)
        self._names = [name for name, _, _ in specification.fields if name != SEED]
        self._maps: dict[tuple[int, int], NDArray[Any]] = {}
        self._verified: set[int] = set()
        self._ids: NDArray[Any] | None = None  # sorted; None for 0, 1, 2, ...
        if specification.ids_sha256 is not None:
            path = folder / spec.IDS
            content = path.read_bytes() if path.is_file() else b""
            digest = hashlib.sha256(content).hexdigest()
            if len(content) != 8 * specification.samples or digest != specification.ids_sha256:
                raise damaged_store_error(folder, f"{spec.IDS} is missing, or does not match its size or sha256")
            ids = np.frombuffer(content, "<i8").astype(np.int64)
            self._order = np.argsort(ids, kind="stable")
            self._ids = ids[self._order]

    @classmethod
    @checked
    def open(cls, folder: str | Path) -> TeacherStore:
        """Open the store in a folder. The presence and size of its files are checked; records are read later.

        Raises:
            StoreError: there is no store, it is partial, or its files have other sizes than its specification states.
        """
        folder = Path(folder)
        stored = Specification.read(folder)
        for file in stored.files(folder):
            if not file.path.is_file():
                count, present = stored.views * stored.ranges, len(list(folder.glob("view-*.bin")))
                raise StoreError(
                    f"The store {folder} is partial.",
                    f"{count - present} of {count} ranges are missing, the first is {file}.",
                    "Build it again with the same arguments; existing ranges are kept.",
                )
            if file.path.is_symlink():
                raise damaged_store_error(folder, f"{file.path.name} is a link")
            if (found := file.path.stat().st_size) != file.size_bytes:
                raise damaged_store_error(folder, f"{file.path.name} has {found} bytes, expected {file.size_bytes}")
        return cls(folder, stored)

    @checked
    def read(
        self, ids: NDArray[Any] | Sequence[int], view: View = 0, seeds: NDArray[np.uint64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return the stored outputs of samples in the order of the ids, as arrays by field with the samples on axis 0.

        Args:
            ids: ids of the samples, shape (N,).
            view: number of the view. Ignored without a transform, since all views are then equal.
            seeds: augmentation seeds of the samples, shape (N,), to compare with the stored seeds; by default derived
                from the store's seed. Ignored without a transform.

        Raises:
            DataError: a sample or view is not in the store, or the teacher's sample was augmented with another seed.
            StoreError: the records belong to other samples, so the store is damaged.
        """
        ids, view = np.asarray(ids), self._checked_view(view)
        rows = self._rows(ids)
        order = np.argsort(rows)
        records = self._records(view, rows[order])
        from_store = seeds is None or not self.specification.augmented
        expected = sample_seeds(self.specification.seed, view, ids) if from_store else np.asarray(seeds)
        if len(expected) != len(ids):
            raise ShapeError(f"There are {len(ids)} ids and {len(expected)} seeds.")
        differs = records[SEED] != expected.astype(np.uint32)[order]
        if differs.any():
            sample = ids[order[differs].min()]
            if from_store:
                problem = f"the record of sample {sample} in view {view} has the seed of another sample"
                raise damaged_store_error(self.folder, problem)
            raise DataError(
                f"Sample {sample} was augmented differently for the teacher.",
                f"View {view} of the store was augmented with the seed {self.specification.seed}.",
                "Train with the seed and the views of the store, or build a store with those of the training.",
            )
        places = np.argsort(order)
        return {name: records[name][places] for name in self._names}

    def _checked_view(self, view: int) -> int:
        views = self.specification.views
        if not self.specification.augmented:
            return 0
        if view < views:
            return view
        raise DataError(
            f"View {view} is not in the store {self.folder}, which has the views 0 to {views - 1}.",
            fix=f"Pass the data as ArrayData(..., views={views}).",
        )

    def _rows(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Return the row of each sample: its index in the data from which the store was built."""
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(
                f"The ids have shape {ids.shape} and type {ids.dtype}.", "Integers with one axis are needed."
            )
        if self._ids is None:
            unknown, rows = (ids < 0) | (ids >= self.specification.samples), ids
        else:
            places = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
            unknown, rows = self._ids[places] != ids, self._order[places]
        if unknown.any():
            raise DataError(
                f"Sample {ids[unknown][0]} is not in the store {self.folder}.",
                f"The store has {self.specification.samples:,} samples.",
                "Pass the data from which the store was built.",
            )
        return rows.astype(np.int64, copy=False)

    def _records(self, view: int, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the records of sorted rows of a view; the file of each range is accessed once."""
        numbers, offsets = np.divmod(rows, self.specification.range_size)
        edges = [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), len(rows)]
        records = np.empty(len(rows), self.record_type)
        for first, end in itertools.pairwise(edges):
            key = view, int(numbers[first])
            if key not in self._maps:
                if len(self._maps) >= MAX_MAPPED:
                    self._maps.pop(next(iter(self._maps)))
                self._maps[key], _ = self._map(self.specification.file(self.folder, *key))
            # mode="raise", the default, would copy `out`
            np.take(self._maps[key], offsets[first:end], out=records[first:end], mode="clip")
        return records

    def _map(self, file: RangeFile) -> tuple[NDArray[Any], bytes]:
        """Return the records of a file, mapped, and their sha256."""
        try:
            mapped = np.memmap(file.path, np.uint8, "r", shape=(file.size_bytes,))
        except (OSError, ValueError) as error:
            raise damaged_store_error(self.folder, f"{file.path.name} cannot be read: {error}") from error
        content = mapped.view(np.ndarray)  # indexing an np.memmap object takes longer than reading the records
        return content[: -spec.DIGEST_BYTES].view(self.record_type), content[-spec.DIGEST_BYTES :].tobytes()

    @checked
    def require(
        self,
        *,
        teacher: Model | None = None,
        data: ArrayData | None = None,
        temperature: float | None = None,
        seed: Seed | None = None,
    ) -> None:
        """Check that the store was built with the given teacher, data, transform of the data, temperature and seed.

        Args:
            teacher: a model whose weights must equal those of the store's teacher.
            data: data whose inputs, ids and transform are compared, and also the views and the seed if they are set.
            temperature: temperature of the log-probabilities; only compared if the store keeps them (`TopK`).
            seed: seed of the augmentation; only compared if there is a transform.

        Raises:
            StoreError: the store is stale; the message names the differences.
        """
        stored, expected = self.specification, dict[str, Any]()
        if teacher is not None:
            expected["teacher_sha256"] = framework_of(teacher).inference.fingerprint(teacher)
        if data is not None:
            expected |= {"data_sha256": spec.data_hash(data), "transform": spec.description(data.augment)}
            expected |= spec.view_options(data)
        if temperature is not None and stored.k:
            expected["temperature"] = float(temperature)
        if seed is not None and stored.augmented and expected.get("seed") in (None, stored.seed):
            expected["seed"] = seed
        stored.check_same(self.folder, expected)

    @checked
    def verify_once(self, view: View) -> None:
        """Verify the sha256 of a view on the first call for this view; later calls return at once.

        Raises:
            DataError: the view is not in the store.
            StoreError: the sha256 of a range differs.
        """
        view = self._checked_view(view)
        if view not in self._verified:
            self.verify([view])
            self._verified.add(view)

    @checked
    def verify(self, views: Sequence[View] | None = None) -> None:
        """Compare every range of some views, by default of all, with its sha256.

        Raises:
            StoreError: a sha256 differs; the message names the views and samples.
        """
        changed = []
        views = None if views is None else [self._checked_view(view) for view in views]
        for file in self.specification.files(self.folder, views):
            records, digest = self._map(file)
            if self.specification.digest(file, records) != digest:
                changed.append(f"{file.path.name} ({file})")
        if changed:
            listed = figures.listed(changed, MAX_LISTED, "; ")
            raise damaged_store_error(self.folder, f"The contents of these files do not match their sha256: {listed}")

    @checked
    def check(
        self,
        teacher: Model,
        data: ArrayData,
        *,
        samples: Count = 256,
        outputs: OutputFunction | None = None,
        batch_size: Count = 256,
    ) -> StoreCheck:
        """Compare stored outputs with current outputs of the teacher, for samples evenly spread over all views.

        Args:
            teacher, data, outputs: the arguments of `build_store` with which the store was built.
            samples: number of pairs of sample and view to compare, at most all.
            batch_size: number of samples in a batch of the teacher.

        Raises:
            UsageError: `samples` is not positive.
            StoreError: the teacher's outputs have other names or shapes, or the data has other views or another seed.
        """
        runner, stored = TeacherRunner(teacher, data, outputs, batch_size), self.specification
        stored.check_same(self.folder, spec.view_options(data))
        pairs = stored.views * data.samples
        chosen = np.unique(np.linspace(0, pairs - 1, min(samples, pairs)).round().astype(np.int64))
        largest = {name: 0.0 for name in self._names if name != "indices"}
        agreed: list[bool] = []
        for view in range(stored.views):
            indices = chosen[chosen // data.samples == view] % data.samples
            for batch in (indices[start : start + batch_size] for start in range(0, len(indices), batch_size)):
                found, current = self.read(data.sample_ids[batch], view), runner(batch, stored.seed, view)
                stored.check_same(self.folder, record.shapes_of(current))
                values = record.values_of(stored.keep, current, stored.temperature, found.get("indices"))
                for name, before in largest.items():
                    value = values[name].astype(np.float64)
                    difference = np.abs(found[name] - value) / np.maximum(1, np.abs(value))
                    largest[name] = max(before, float(difference.max(initial=0.0)))
                if LOGITS in current:
                    top_1 = found["indices"][..., 0] if "indices" in found else found["scores"].argmax(-1)
                    agreed.extend((current[LOGITS].argmax(-1) == top_1).ravel().tolist())
        return StoreCheck(len(chosen), largest, float(np.mean(agreed)) if agreed else None)
