"""The verb on a store of teacher outputs: build, finish, check, verify, info."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch.cli.networks import RANDOM, model_of, origin_of
from kirsch.cli.terminal import Line, Piece
from kirsch.distillation.store import Dense, TeacherStore, TopK, build, finish
from kirsch.errors import StoreError, UnknownNameError, UsageError
from kirsch.failures import during
from kirsch.frameworks.determinism import require_deterministic
from kirsch.recipes.tasks.data import load_data
from kirsch.recipes.yaml import scalar
from kirsch.report import figures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.cli.terminal import Terminal
    from kirsch.frameworks.data import ArrayData

ACTIONS = ("build", "check", "finish", "info", "verify")


@dataclass(frozen=True)
class Asked:
    """The teacher and the data that were named on the command line.

    Args:
        model, weights: as for the verbs on a model.
        data: a source as in a recipe.
        options: of the source, each "key=value".
        seed: of the data and of the augmentation.
        batch_size: samples that the teacher is run on at a time.
    """

    model: str
    weights: str
    data: str
    options: Sequence[str]
    seed: int
    batch_size: int

    def load(self) -> tuple[Any, ArrayData]:
        """Both."""
        for name, value in (("--model", self.model), ("--data", self.data)):
            if not value:
                raise UsageError(f"{name} is missing.", "The teacher is run on the data.", "See kirsch store --help.")
        options = {}
        for text in self.options:
            key, equals, value = text.partition("=")
            if not equals or not key:
                raise UsageError(f"--option {text!r} is no option.", "Its form is key=value.", "Write train=45000.")
            options[key] = scalar(value, f"--option {key}")
        data = load_data(self.data, options, seed=self.seed, base=Path())
        teacher, batches = model_of(self.model, self.weights, seed=self.seed), data.batches(self.batch_size)
        require_deterministic(teacher, (data.train.inputs[:1],))
        return teacher, batches

    def said(self) -> Line:
        """Where the teacher's weights come from."""
        tone = "doubt" if self.model.startswith("timm:") and self.weights == RANDOM else ""
        origin = origin_of(self.model, self.weights, self.seed).removeprefix("the weights are ")
        more = "; --weights pretrained or FILE gives others." if tone else ""
        return [Piece(f"{'weights':<13}", tone), Piece(origin + more)]


@dataclass(frozen=True)
class Building:
    """How a store is built, as the command line says it.

    Args:
        keep: "dense", or how many classes.
        views, temperature: see `store.build`.
        part: "i/n" with 1 <= i <= n; "" builds all and finishes.
    """

    keep: str
    views: int
    temperature: float
    part: str

    def options(self) -> dict[str, Any]:
        """As `store.build` takes them."""
        if self.keep != "dense" and not re.fullmatch("[0-9]{1,9}", self.keep):
            raise UsageError(f"--keep is {self.keep!r}.", fix="Give a number of classes, or dense.")
        share = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", self.part or "1/1")
        if share is None or not 1 <= int(share[1]) <= int(share[2]):
            raise UsageError(f"--part is {self.part!r}.", "Its form is i/n, from 1/n to n/n.", "Write --part 1/4.")
        return {
            "keep": Dense() if self.keep == "dense" else TopK(int(self.keep)),
            "views": self.views,
            "temperature": self.temperature,
            "ranges": (int(share[1]) - 1, int(share[2])),
        }


def act(action: str, folder: Path, asked: Asked, building: Building, samples: int, terminal: Terminal) -> int:
    """Do what was asked. Gives the exit code."""
    if action not in ACTIONS:
        raise UnknownNameError("action", action, ACTIONS)
    if action == "build":
        return _build(folder, asked, building, terminal)
    store = finish(folder) if action == "finish" else TeacherStore.open(folder)
    if action == "check":
        return _check(store, asked, samples, terminal)
    if action == "verify":
        store.verify()
        count = store.manifest.views * store.manifest.ranges
        said: list[Line] = [[Piece(f"{'sound':<13}", "good"), Piece(f"{count} ranges have the sha256 of the manifest")]]
        terminal.result(said, {"store": str(folder), "sound": True, "ranges": count})
        return 0
    _tell(store, terminal)
    return 0


def _build(folder: Path, asked: Asked, building: Building, terminal: Terminal) -> int:
    options = building.options()
    teacher, data = asked.load()

    def event(told: dict[str, Any]) -> None:
        terminal.progress([Piece(f"{'range':<13}{told['done']} of {told['of']}")])

    terminal.progress(asked.said())
    lower = f"Lower --batch-size, which is {asked.batch_size}."
    with during("while the teacher ran", lower):
        store = build(folder, teacher, data, seed=asked.seed, event=event, batch_size=asked.batch_size, **options)
    if store is not None:
        _tell(store, terminal)
        return 0
    next_ = f"kirsch store finish {folder}"
    said: list[Line] = [[Piece(f"{'built':<13}part {building.part}")], [Piece(f"{'next':<13}{next_}, when all are")]]
    terminal.result(said, {"store": str(folder), "part": building.part, "next": next_})
    return 0


def _tell(store: TeacherStore, terminal: Terminal) -> None:
    manifest = store.manifest
    size = manifest.views * manifest.samples * manifest.record_bytes
    kept = ", ".join(field.name for field in manifest.fields if field.name != "seed")
    lines: list[Line] = [
        [Piece(f"{'store':<13}{store.folder}")],
        [Piece(f"{'records':<13}{manifest.samples:,} samples, views {manifest.views}: {kept}")],
        [Piece(f"{'size':<13}{manifest.record_bytes} bytes a record, {figures.bytes_(size)}")],
        [Piece(f"{'teacher':<13}sha256 {manifest.teacher_sha256}")],
    ]
    content = manifest.model_dump(mode="json", exclude={"sha256"})
    terminal.result(lines, {"store": str(store.folder), "bytes": size} | content)


def _check(store: TeacherStore, asked: Asked, samples: int, terminal: Terminal) -> int:
    """Hold hashes, files and outputs against what is there now.

    Raises:
        StoreError: the store is stale or damaged, or the teacher puts out something else now.
        UsageError: the store is of what a callable puts out.
    """
    if store.manifest.outputs_sha256 is not None:
        raise UsageError(
            f"The store {store.folder} was built with outputs=..., a callable that a command line cannot name.",
            fix="Check it in Python: TeacherStore.open(folder).check(teacher, data, outputs=...).",
        )
    teacher, data = asked.load()
    store.require(teacher=teacher, data=data)
    store.verify()
    found = store.check(teacher, data, samples=samples, batch_size=asked.batch_size)
    worst = max(found.differences, key=lambda name: found.differences[name])
    said = f"{found.samples} looks, at most {found.differences[worst]:.1e} apart ({worst})"
    if not found.agrees:
        raise StoreError(
            f"The store {store.folder} and the teacher do not agree.",
            f"Of {said}.",
            "The teacher's code may have changed beside its weights; build the store again.",
        )
    top = "" if found.top1_agreement is None else f", the same class first in {found.top1_agreement:.1%}"
    content = {"store": str(store.folder), "samples": found.samples, "differences": found.differences}
    terminal.result(
        [[Piece(f"{'agrees':<13}", "good"), Piece(said + top)]], content | {"top1_agreement": found.top1_agreement}
    )
    return 0
