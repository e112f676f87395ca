"""Reading and verifying a finished store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kirsch.annotations import Between, Count, Seed
from kirsch.arguments import checked
from kirsch.data.annotations import Model
from kirsch.data.augment import sample_seeds
from kirsch.data.batches import ArrayData
from kirsch.distillation.store import specification as spec
from kirsch.distillation.store.description import description
from kirsch.distillation.store.record import RESERVED, SEED, record_values
from kirsch.distillation.store.running import Outputs, TeacherRunner
from kirsch.distillation.store.specification import Manifest, Specification, view_file
from kirsch.errors import DataError, ShapeError, StoreError
from kirsch.frameworks.find import framework_of

TOLERANCE = 2.0**-9
"""Four times the rounding error of 16 bits, because the teacher's outputs depend slightly on the batch size."""
MAX_LISTED = 4

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


class TeacherStore:
    """Outputs of a teacher for each view of each sample, memory-mapped from disk.

    Args:
        folder: folder of the store.
        manifest: contents and origin of the store.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.record_bytes = manifest.record_bytes
        self._maps: dict[int, NDArray[Any]] = {}
        self._verified: set[int] = set()
        self._order: NDArray[Any] | None = None
        if manifest.ids_sha256 is not None:
            ids = self._read_ids(manifest.ids_sha256)
            self._order = np.argsort(ids, kind="stable")
            self._sorted = ids[self._order]

    made_by: ClassVar[str] = "kirsch.distillation.store.TeacherStore.open(folder)"

    @classmethod
    @checked
    def open(cls, folder: str | Path) -> TeacherStore:
        """Open the store in a folder. The presence and size of its files are checked; records are read later.

        Raises:
            StoreError: there is no store, it is partial, or its files do not match its manifest.
        """
        folder = Path(folder)
        if not (folder / spec.MANIFEST).is_file():
            if not (folder / spec.BUILDING).is_file():
                raise StoreError(
                    f"There is no store in {folder}.", fix="Build one with kirsch.distillation.store.build."
                )
            stored = spec.read(folder / spec.BUILDING, Specification)
            raise spec.partial_store_error(folder, stored, spec.missing_ranges(folder, stored))
        manifest = spec.read(folder / spec.MANIFEST, Manifest)
        size = manifest.samples * manifest.record_bytes
        for view in range(manifest.views):
            _check_file(folder, view_file(folder, view), size)
        if manifest.ids_sha256 is not None:
            _check_file(folder, folder / spec.IDS, 8 * manifest.samples)
        return cls(folder, manifest)

    def _read_ids(self, digest: str) -> NDArray[Any]:
        content = (self.folder / spec.IDS).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise _damaged(self.folder, f"{spec.IDS} does not have the sha256 of the manifest")
        return np.frombuffer(content, "<i8").astype(np.int64)

    @checked
    def read(
        self, ids: NDArray[Any] | Sequence[int], view: View = 0, seeds: NDArray[np.uint64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return the records of samples, in the order of the ids: arrays by field with the samples as first axis.

        Args:
            ids: ids of the samples, shape (N,).
            view: number of the view. Ignored without a transform, since all views are then equal.
            seeds: augmentation seeds of the samples, shape (N,), which are compared with the stored ones; by default
                those derived from the store's seed. Ignored without a transform.

        Raises:
            DataError: a sample or view is not in the store, or the teacher's sample was augmented with another seed.
            StoreError: the records belong to other samples, so the store is damaged.
        """
        ids = np.asarray(ids)
        view = self._checked_view(view)
        records = np.take(self._map(view), self._rows(ids))  # three times as fast as indexing
        from_store = seeds is None or not self.manifest.augmented
        expected = sample_seeds(self.manifest.seed, view, ids) if from_store else np.asarray(seeds)
        if len(expected) != len(ids):
            raise ShapeError(f"There are {len(ids)} ids and {len(expected)} seeds.")
        differs = records[SEED] != expected.astype(np.uint32)
        if differs.any():
            raise self._seed_error(ids[differs][0], view, from_store=from_store)
        return {name: np.ascontiguousarray(records[name]) for name in self._names if name != SEED}

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.manifest.fields)

    def _seed_error(self, sample: int, view: int, *, from_store: bool) -> Exception:
        if from_store:
            return _damaged(self.folder, f"the record of sample {sample} in view {view} has the seed of another sample")
        return DataError(
            f"Sample {sample} was augmented differently for the teacher.",
            f"View {view} of the store was augmented with the seed {self.manifest.seed}.",
            "Train with the seed and the views of the store, or build a store with those of the training.",
        )

    def _checked_view(self, view: int) -> int:
        if not self.manifest.augmented:
            return 0
        if not 0 <= view < self.manifest.views:
            raise DataError(
                f"View {view} is not in the store {self.folder}, which has the views 0 to {self.manifest.views - 1}.",
                fix=f"Pass the data as ArrayData(..., views={self.manifest.views}).",
            )
        return view

    def _map(self, view: int) -> NDArray[Any]:
        """Return the records of a view, which are mapped on first use."""
        if view not in self._maps:
            path, kind = view_file(self.folder, view), self.manifest.record_type
            try:
                mapped = np.memmap(path, kind, "r", shape=(self.manifest.samples,))
            except (OSError, ValueError) as error:
                raise _damaged(self.folder, f"{path.name} cannot be read: {error}") from error
            self._maps[view] = mapped.view(np.ndarray)  # indexing a memmap takes longer than reading
        return self._maps[view]

    def _rows(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Return the rows of the samples in the files."""
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(
                f"The ids have shape {ids.shape} and type {ids.dtype}.", "Integers with one axis are needed."
            )
        if self._order is None:
            unknown, rows = (ids < 0) | (ids >= self.manifest.samples), ids
        else:
            position = np.searchsorted(self._sorted, ids)
            position[position == len(self._sorted)] = 0
            unknown, rows = self._sorted[position] != ids, self._order[position]
        if unknown.any():
            raise DataError(
                f"Sample {ids[unknown][0]} is not in the store {self.folder}.",
                f"The store has {self.manifest.samples:,} samples.",
                "Pass the data from which the store was built.",
            )
        return rows

    @checked
    def require(
        self,
        *,
        teacher: Model | None = None,
        data: ArrayData | None = None,
        temperature: float | None = None,
        seed: Seed | None = None,
    ) -> None:
        """Check that the store was built from a teacher, data with its transform, a temperature and a seed.

        Args:
            teacher: a model whose weights must equal those of the store's teacher.
            data: its inputs, ids and transform are compared, and its views and seed if they are set.
            temperature: temperature of the log-probabilities; only compared if the store keeps them (`TopK`).
            seed: seed of the augmentation; only compared if there is a transform.

        Raises:
            StoreError: the store is stale; the message names the differences.
        """
        expected: dict[str, Any] = {}
        if teacher is not None:
            expected["teacher_sha256"] = framework_of(teacher).inference.fingerprint(teacher)
        if data is not None:
            expected["data_sha256"] = spec.data_hash(data)
            expected["transform_sha256"] = spec.text_hash(description(data.augment))
            expected |= self._view_options(data)
        if temperature is not None and self.manifest.keep == "top-k":
            expected["temperature"] = float(temperature)
        if seed is not None and self.manifest.augmented and expected.get("seed") in (None, self.manifest.seed):
            expected["seed"] = seed
        self._require_same(expected)

    def _view_options(self, data: ArrayData) -> dict[str, Any]:
        """Return the views and the seed of data with a transform, if they are set."""
        options = {"views": data.views, "seed": data.seed} if data.augment is not None else {}
        return {name: value for name, value in options.items() if value is not None}

    def _require_same(self, expected: dict[str, Any]) -> None:
        different = spec.differences(self.manifest, expected)
        if different:
            raise StoreError(
                f"The store {self.folder} is stale.",
                f"It was built with another value of {'; '.join(different)}.",
                "Pass the values it was built with, or build it again in another folder.",
            )

    @checked
    def verify_once(self, view: View) -> None:
        """Verify the sha256 of a view on the first call for it; later calls return at once.

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
        for view in range(self.manifest.views) if views is None else map(self._checked_view, views):
            path = view_file(self.folder, view)
            ranges = spec.changed_ranges(path, self.manifest, self.manifest.sha256[view])
            changed += [f"{path.name} (samples {first} to {end - 1})" for first, end in ranges]
        if changed:
            more = f", and {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
            listed = ", ".join(changed[:MAX_LISTED]) + more
            raise _damaged(self.folder, f"{listed} does not have the sha256 of the manifest")

    @checked
    def check(
        self,
        teacher: Model,
        data: ArrayData,
        *,
        samples: Count = 256,
        outputs: Outputs | None = None,
        batch_size: Count = 256,
    ) -> StoreCheck:
        """Compare stored outputs with current outputs of the teacher, for samples evenly spread over all views.

        Args:
            teacher, data, outputs: as passed to `build`.
            samples: number of pairs of sample and view to compare, at most all.
            batch_size: number of samples in a batch of the teacher.

        Raises:
            UsageError: `samples` is not positive.
            StoreError: the teacher's outputs have other names or shapes, or the data has other views or another seed.
        """
        self._require_same(self._view_options(data))
        runner, stored = TeacherRunner(teacher, data, outputs, batch_size), self.manifest
        pairs = stored.views * data.samples
        chosen = np.unique(np.linspace(0, pairs - 1, min(samples, pairs)).round().astype(np.int64))
        largest = dict.fromkeys((name for name in self._names if name not in (SEED, "indices")), 0.0)
        agreed: list[bool] = []
        for view in range(stored.views):
            indices = chosen[chosen // data.samples == view] % data.samples
            for batch in (indices[start : start + batch_size] for start in range(0, len(indices), batch_size)):
                record = self.read(data.sample_ids[batch], view)
                current = runner(batch, stored.seed, view)
                self._check_shapes(current)
                values = record_values(stored.kept, current, stored.temperature, record.get("indices"))
                for name in largest:
                    value = values[name].astype(np.float64)
                    difference = np.abs(record[name] - value) / np.maximum(1, np.abs(value))
                    largest[name] = max(largest[name], float(difference.max(initial=0.0)))
                if stored.keep is not None:
                    top_1 = record["indices"][..., 0] if stored.keep == "top-k" else record["scores"].argmax(-1)
                    agreed.extend((current["logits"].argmax(-1) == top_1).ravel().tolist())
        return StoreCheck(len(chosen), largest, float(np.mean(agreed)) if agreed else None)

    def _check_shapes(self, current: dict[str, NDArray[Any]]) -> None:
        """Raise a StoreError if the names or shapes of the outputs differ from those of the store."""
        classes = current["logits"].shape[-1] if "logits" in current else None
        features = {name: array.shape[1:] for name, array in current.items() if name != "logits"}
        stored = {f.name: f.shape for f in self.manifest.fields if f.name not in RESERVED}
        if classes != self.manifest.classes or stored != features:
            raise StoreError(
                f"The teacher's outputs have other names or shapes than those in the store {self.folder}.",
                f"Classes: stored {self.manifest.classes}, current {classes}; features: stored "
                f"{_format_shapes(stored)}, current {_format_shapes(features)}.",
                "Pass the same teacher and outputs as to build: store.check(teacher, data, outputs=...).",
            )


def _format_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name!r} of shape {shape}" for name, shape in shapes.items()) or "none"


def _check_file(folder: Path, path: Path, size: int) -> None:
    """Raise a StoreError if a file is missing, links to a file outside the folder, or has another size."""
    if not path.is_file():
        raise _damaged(folder, f"{path.name} is missing")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise _damaged(folder, f"{path.name} is a link to a file outside the folder")
    if path.stat().st_size != size:
        raise _damaged(folder, f"{path.name} has {path.stat().st_size} bytes; the manifest requires {size}")


def _damaged(folder: Path, problem: str) -> StoreError:
    return StoreError(f"The store {folder} is damaged.", f"{problem}.", "Build it again in another folder.")
