"""A finished store: records by sample and view, and what it takes to trust them."""

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
from kirsch.distillation.store import specification as spec
from kirsch.distillation.store.description import description
from kirsch.distillation.store.record import RESERVED, SEED, values
from kirsch.distillation.store.running import Outputs, Runner
from kirsch.distillation.store.specification import Manifest, Specification, view_file
from kirsch.errors import DataError, ShapeError, StoreError
from kirsch.frameworks.annotations import Model
from kirsch.frameworks.augment import sample_seeds
from kirsch.frameworks.data import ArrayData
from kirsch.frameworks.port import framework_of

TOLERANCE = 2.0**-9
"""Four times the rounding of 16 bits: the teacher's own sums differ a little with the size of the batch."""
MOST_NAMED = 4

View = Annotated[int, Between(0, 2**53)]


@dataclass(frozen=True)
class Check:
    """How far a store is from what the teacher puts out now.

    Args:
        samples: how many were compared.
        differences: the largest by field: absolute where the live value is below 1, a share of it above.
        top1_agreement: share of samples, or positions, whose most likely class is the stored one; None without logits.
    """

    samples: int
    differences: dict[str, float]
    top1_agreement: float | None

    @property
    def agrees(self) -> bool:
        """Whether no difference is above 2⁻⁹, four times the rounding of 16 bits."""
        return all(difference <= TOLERANCE for difference in self.differences.values())


class TeacherStore:
    """What a teacher put out for each view of each sample, mapped from disk.

    Args:
        folder: where it lies.
        manifest: what it holds and was built from.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.record_bytes = manifest.record_bytes
        self._maps: dict[int, NDArray[Any]] = {}
        self._sound: set[int] = set()
        self._order: NDArray[Any] | None = None
        if manifest.ids_sha256 is not None:
            ids = self._read_ids(manifest.ids_sha256)
            self._order = np.argsort(ids, kind="stable")
            self._sorted = ids[self._order]

    made_by: ClassVar[str] = "kirsch.distillation.store.TeacherStore.open(folder)"

    @classmethod
    @checked
    def open(cls, folder: str | Path) -> TeacherStore:
        """The store in a folder; its files are looked for, and not read yet.

        Raises:
            StoreError: there is none, it is partial, or its files do not fit its manifest.
        """
        folder = Path(folder)
        if not (folder / spec.MANIFEST).is_file():
            if not (folder / spec.BUILDING).is_file():
                raise StoreError(f"{folder} holds no store.", fix="Build one: kirsch.distillation.store.build.")
            stored = spec.read(folder / spec.BUILDING, Specification)
            raise spec.partial(folder, stored, spec.missing_ranges(folder, stored))
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
        """The records of some samples, in the order asked: arrays by field, the first axis that of the samples.

        Args:
            ids: of the samples, shape (N,).
            view: which look of them; without a transform there is one, which stands for all.
            seeds: of their augmentation, shape (N,), to be held against the stored ones; those of the store's own seed
                if left out. Without a transform there is nothing to hold.

        Raises:
            DataError: a sample or view is not in the store, or was augmented otherwise when the teacher saw it.
            StoreError: the records are not those of the samples: the store is damaged.
        """
        ids = np.asarray(ids)
        view = self._view(view)
        records = np.take(self._map(view), self._places(ids))  # a third of the time that an index takes
        own = seeds is None or not self.manifest.augmented
        wanted = sample_seeds(self.manifest.seed, view, ids) if own else np.asarray(seeds)
        if len(wanted) != len(ids):
            raise ShapeError(f"There are {len(ids)} ids and {len(wanted)} seeds.")
        wrong = records[SEED] != wanted.astype(np.uint32)
        if wrong.any():
            raise self._other_seed(ids[wrong][0], view, own=own)
        return {name: np.ascontiguousarray(records[name]) for name in self._names if name != SEED}

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.manifest.fields)

    def _other_seed(self, sample: int, view: int, *, own: bool) -> Exception:
        if own:
            return _damaged(self.folder, f"the record of sample {sample} in view {view} has the seed of another")
        return DataError(
            f"Sample {sample} was augmented otherwise when the teacher saw it.",
            f"The store's view {view} is that of the seed {self.manifest.seed}.",
            "Train with this seed and these views, or build a store for those of the training.",
        )

    def _view(self, view: int) -> int:
        if not self.manifest.augmented:
            return 0
        if not 0 <= view < self.manifest.views:
            raise DataError(
                f"The store {self.folder} has the views 0 to {self.manifest.views - 1}; view {view} is asked for.",
                fix=f"Give the data as ArrayData(..., views={self.manifest.views}).",
            )
        return view

    def _map(self, view: int) -> NDArray[Any]:
        """The records of a view, mapped when they are first asked for."""
        if view not in self._maps:
            path, kind = view_file(self.folder, view), self.manifest.record_type
            try:
                mapped = np.memmap(path, kind, "r", shape=(self.manifest.samples,))
            except (OSError, ValueError) as error:
                raise _damaged(self.folder, f"{path.name} cannot be read: {error}") from error
            self._maps[view] = mapped.view(np.ndarray)  # indexing the subclass costs more than the reading
        return self._maps[view]

    def _places(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Where the samples lie in the files."""
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"The ids have shape {ids.shape} and type {ids.dtype}.", "Whole numbers are needed.")
        if self._order is None:
            wrong, places = (ids < 0) | (ids >= self.manifest.samples), ids
        else:
            at = np.searchsorted(self._sorted, ids)
            at[at == len(self._sorted)] = 0
            wrong, places = self._sorted[at] != ids, self._order[at]
        if wrong.any():
            raise DataError(
                f"Sample {ids[wrong][0]} is not in the store {self.folder}.",
                f"It holds {self.manifest.samples:,} samples.",
                "Give the data that it was built from.",
            )
        return places

    @checked
    def require(
        self,
        *,
        teacher: Model | None = None,
        data: ArrayData | None = None,
        temperature: float | None = None,
        seed: Seed | None = None,
    ) -> None:
        """Make sure that the store is that of a teacher, of data and its transform, of a temperature and a seed.

        Args:
            teacher: a model whose weights must be those of the store's teacher.
            data: inputs, ids, transform and, where they are said, views and seed.
            temperature: of log-probabilities; scores and features know none.
            seed: of the augmentation; without a transform it does not matter.

        Raises:
            StoreError: it is stale; says what differs.
        """
        asked: dict[str, Any] = {}
        if teacher is not None:
            asked["teacher_sha256"] = framework_of(teacher).fingerprint(teacher)
        if data is not None:
            asked["data_sha256"] = spec.data_hash(data)
            asked["transform_sha256"] = spec.text_hash(description(data.augment))
            asked |= self._looks(data)
        if temperature is not None and self.manifest.keep == "top-k":
            asked["temperature"] = float(temperature)
        if seed is not None and self.manifest.augmented and asked.get("seed") in (None, self.manifest.seed):
            asked["seed"] = seed
        self._require(asked)

    def _looks(self, data: ArrayData) -> dict[str, Any]:
        """What data with a transform says of views and seed."""
        said = {"views": data.views, "seed": data.seed} if data.augment is not None else {}
        return {name: value for name, value in said.items() if value is not None}

    def _require(self, asked: dict[str, Any]) -> None:
        found = spec.differences(self.manifest, asked)
        if found:
            raise StoreError(
                f"The store {self.folder} is stale.",
                f"It was built with another value of {'; '.join(found)}.",
                "Give what it was built with, or build it again in another folder.",
            )

    @checked
    def trust(self, view: View) -> None:
        """Hold a view against its sha256 when training first asks for it; what has been held is not held again.

        Raises:
            DataError: there is no such view.
            StoreError: a range differs.
        """
        view = self._view(view)
        if view not in self._sound:
            self.verify([view])
            self._sound.add(view)

    @checked
    def verify(self, views: Sequence[View] | None = None) -> None:
        """Hold every range of some views, of all if left out, against its sha256.

        Raises:
            StoreError: some differ; names their views and samples.
        """
        wrong = []
        for view in range(self.manifest.views) if views is None else map(self._view, views):
            path = view_file(self.folder, view)
            found = spec.other_ranges(path, self.manifest, self.manifest.sha256[view])
            wrong += [f"{path.name} (samples {first} to {end - 1})" for first, end in found]
        if wrong:
            more = f", and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
            places = ", ".join(wrong[:MOST_NAMED]) + more
            raise _damaged(self.folder, f"{places} does not have the sha256 of the manifest")

    @checked
    def check(
        self,
        teacher: Model,
        data: ArrayData,
        *,
        samples: Count = 256,
        outputs: Outputs | None = None,
        batch_size: Count = 256,
    ) -> Check:
        """Hold stored against live outputs, for samples evenly spread over all views.

        Args:
            teacher, data, outputs: as they were given to `build`.
            samples: how many looks of samples to compare, at most all there are.
            batch_size: samples that the teacher is run on at a time.

        Raises:
            UsageError: no samples are asked for.
            StoreError: the teacher puts out other arrays than the store holds, or the data shows other looks.
        """
        self._require(self._looks(data))
        runner, stored = Runner(teacher, data, outputs, batch_size), self.manifest
        looks = stored.views * data.samples
        chosen = np.unique(np.linspace(0, looks - 1, min(samples, looks)).round().astype(np.int64))
        worst, agreed = (
            dict.fromkeys((name for name in self._names if name not in (SEED, "indices")), 0.0),
            list[bool](),
        )
        for view in range(stored.views):
            places = chosen[chosen // data.samples == view] % data.samples
            for part in (places[at : at + batch_size] for at in range(0, len(places), batch_size)):
                record = self.read(data.sample_ids[part], view)
                live = runner(part, stored.seed, view)
                self._check_shapes(live)
                found = values(stored.kept, live, stored.temperature, record.get("indices"))
                for name in worst:
                    now = found[name].astype(np.float64)
                    apart = np.abs(record[name] - now) / np.maximum(1, np.abs(now))
                    worst[name] = max(worst[name], float(apart.max(initial=0.0)))
                if stored.keep is not None:
                    first = record["indices"][..., 0] if stored.keep == "top-k" else record["scores"].argmax(-1)
                    agreed.extend((live["logits"].argmax(-1) == first).ravel().tolist())
        return Check(len(chosen), worst, float(np.mean(agreed)) if agreed else None)

    def _check_shapes(self, live: dict[str, NDArray[Any]]) -> None:
        """Raise a StoreError if the live outputs are not of the kind that the store was built from."""
        classes = live["logits"].shape[-1] if "logits" in live else None
        features = {name: array.shape[1:] for name, array in live.items() if name != "logits"}
        known = {f.name: f.shape for f in self.manifest.fields if f.name not in RESERVED}
        if classes != self.manifest.classes or known != features:
            raise StoreError(
                f"The teacher puts out other arrays than the store {self.folder} holds.",
                f"Classes: stored {self.manifest.classes}, live {classes}; features: stored {_listed(known)}, live "
                f"{_listed(features)}.",
                "Give teacher and outputs as they were given to build: store.check(teacher, data, outputs=...).",
            )


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    """Features by name, with their shapes for one sample."""
    return ", ".join(f"{name!r} of shape {shape}" for name, shape in shapes.items()) or "none"


def _check_file(folder: Path, path: Path, size: int) -> None:
    """Raise a StoreError if a file is not there, leads out of the folder, or has another size."""
    if not path.is_file():
        raise _damaged(folder, f"{path.name} is missing")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise _damaged(folder, f"{path.name} leads out of the folder")
    if path.stat().st_size != size:
        raise _damaged(folder, f"{path.name} has {path.stat().st_size} bytes; the manifest speaks of {size}")


def _damaged(folder: Path, what: str) -> StoreError:
    return StoreError(f"The store {folder} is damaged.", f"{what}.", "Build it again in another folder.")
