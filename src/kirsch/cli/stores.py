"""The subcommand `kirsch store`: the actions build, check, verify and info on a store of teacher outputs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kirsch import figures
from kirsch.cli.networks import RANDOM, model_of, origin_of
from kirsch.data.sources import load_data
from kirsch.distillation.store import Dense, TeacherStore, TopK, build_store
from kirsch.errors import StoreError, UnknownNameError, UsageError
from kirsch.failures import during
from kirsch.frameworks.determinism import require_deterministic
from kirsch.recipes.yaml import scalar
from kirsch.tables import Line, Piece

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.cli.terminal import Terminal
    from kirsch.data.batches import ArrayData

ACTIONS = ("build", "check", "info", "verify")


@dataclass(frozen=True)
class TeacherArguments:
    """Teacher and data from the command line.

    Args:
        model: reference to the teacher, such as "file.py:callable".
        weights: "random", "pretrained" or a safetensors file; see `load_model`.
        data: name or reference of a data source, as in `data.source` of a recipe.
        options: options of the data source, each "key=value".
        seed: seed of random weights, of the data and of the augmentation.
        batch_size: number of samples per forward pass of the teacher.
    """

    model: str
    weights: str
    data: str
    options: Sequence[str]
    seed: int
    batch_size: int

    def load(self) -> tuple[Any, ArrayData]:
        """Return teacher and data."""
        for name, value in (("--model", self.model), ("--data", self.data)):
            if not value:
                raise UsageError(f"{name} is missing.", "The teacher is run on the data.", "See kirsch store --help.")
        options = {}
        for text in self.options:
            key, equals, value = text.partition("=")
            if not equals or not key:
                raise UsageError(
                    f"--option {text!r} does not have the form key=value.", fix="An example is --option train=45000."
                )
            options[key] = scalar(value, f"--option {key}")
        data = load_data(self.data, options, seed=self.seed, base=Path())
        if data.is_stream:
            raise UsageError(
                f"The training part of {data.name} is a loader.",
                "A store finds each sample by its number in an array.",
                "The data source must return a data set whose training part is kirsch.Split(inputs, labels).",
            )
        teacher, batches = model_of(self.model, self.weights, seed=self.seed), data.batches(self.batch_size)
        require_deterministic(teacher, data.first_inputs(1)[0])
        return teacher, batches

    def weights_line(self) -> Line:
        """Return a line on the origin of the teacher's weights."""
        tone = "warning" if self.model.startswith("timm:") and self.weights == RANDOM else ""
        origin = origin_of(self.model, self.weights, self.seed).removeprefix("the weights are ")
        more = "; use --weights pretrained or FILE for trained weights." if tone else ""
        return [Piece(f"{'weights':<13}", tone), Piece(origin + more)]


@dataclass(frozen=True)
class BuildOptions:
    """Options to build a store, from the command line.

    Args:
        keep: "dense" for all classes, or the number of most likely classes to store.
        views, temperature: see `build_store`.
        part: "i/n" builds part i of n, 1 <= i <= n; "" builds the whole store.
    """

    keep: str
    views: int
    temperature: float
    part: str

    def options(self) -> dict[str, Any]:
        """Return the arguments of `build_store`."""
        if self.keep != "dense" and not re.fullmatch("[0-9]{1,9}", self.keep):
            raise UsageError(
                f"--keep {self.keep!r} is not a number of classes.", fix="Write --keep 10, or --keep dense."
            )
        share = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", self.part or "1/1")
        if share is None or not 1 <= int(share[1]) <= int(share[2]):
            raise UsageError(
                f"--part {self.part!r} does not have the form i/n, from 1/n to n/n.", fix="An example is --part 1/4."
            )
        return {
            "keep": Dense() if self.keep == "dense" else TopK(int(self.keep)),
            "views": self.views,
            "temperature": self.temperature,
            "ranges": (int(share[1]) - 1, int(share[2])),
        }


def run_action(
    action: str, folder: Path, source: TeacherArguments, build_options: BuildOptions, samples: int, terminal: Terminal
) -> int:
    """Run an action of the subcommand, and return the exit code."""
    if action not in ACTIONS:
        raise UnknownNameError("action", action, ACTIONS)
    if action == "build":
        return _build(folder, source, build_options, terminal)
    store = TeacherStore.open(folder)
    if action == "check":
        return _check(store, source, samples, terminal)
    if action == "verify":
        store.verify()
        count = store.specification.views * store.specification.ranges
        lines: list[Line] = [
            [
                Piece(f"{'sound':<13}", "good"),
                Piece(f"{figures.counted(count, 'data file')} checked, all hashes are correct"),
            ]
        ]
        terminal.result(lines, {"store": str(folder), "sound": True, "ranges": count})
        return 0
    _show_info(store, terminal)
    return 0


def _build(folder: Path, source: TeacherArguments, build_options: BuildOptions, terminal: Terminal) -> int:
    options = build_options.options()
    teacher, data = source.load()

    def event(content: dict[str, Any]) -> None:
        terminal.progress([Piece(f"{'range':<13}{content['done']} of {content['of']}")])

    terminal.progress(source.weights_line())
    memory_fix = f"Lower --batch-size, which is {source.batch_size}."
    with during("while the teacher ran", memory_fix):
        store = build_store(
            folder, teacher, data, seed=source.seed, event=event, batch_size=source.batch_size, **options
        )
    if store is not None:
        _show_info(store, terminal)
        return 0
    lines: list[Line] = [[Piece(f"{'built':<13}part {build_options.part}; the store needs the other parts, too")]]
    terminal.result(lines, {"store": str(folder), "part": build_options.part})
    return 0


def _show_info(store: TeacherStore, terminal: Terminal) -> None:
    stored = store.specification
    size = stored.views * stored.samples * store.record_bytes
    fields = ", ".join(name for name, _, _ in stored.fields if name != "seed")
    lines: list[Line] = [
        [Piece(f"{'store':<13}{store.folder}")],
        [Piece(f"{'records':<13}{stored.samples:,} samples, views {stored.views}: {fields}")],
        [Piece(f"{'size':<13}{store.record_bytes} bytes per record, {figures.bytes_(size)}")],
        [Piece(f"{'teacher':<13}sha256 {stored.teacher_sha256}")],
    ]
    terminal.result(lines, {"store": str(store.folder), "bytes": size} | stored.model_dump(mode="json"))


def _check(store: TeacherStore, source: TeacherArguments, samples: int, terminal: Terminal) -> int:
    """Compare a store with its hashes and with the current outputs of the teacher.

    Raises:
        StoreError: the store is damaged or was built for another teacher or other data, or its outputs differ from
            the teacher's.
        UsageError: the store was built with `outputs=`, a callable that the command line cannot name.
    """
    if store.specification.outputs is not None:
        raise UsageError(
            f"The store {store.folder} was built with outputs=..., a callable that the command line cannot name.",
            fix="Check it in Python: TeacherStore.open(folder).check(teacher, data, outputs=...).",
        )
    teacher, data = source.load()
    store.require(teacher=teacher, data=data)
    store.verify()
    comparison = store.check(teacher, data, samples=samples, batch_size=source.batch_size)
    worst = max(comparison.differences, key=lambda name: comparison.differences[name])
    text = f"{comparison.samples} views, largest difference {comparison.differences[worst]:.1e} ({worst})"
    if not comparison.agrees:
        raise StoreError(
            f"The store {store.folder} and the teacher do not agree.",
            f"Compared: {text}.",
            "The teacher's code may have changed; build the store again.",
        )
    top = "" if comparison.top1_agreement is None else f", the same top class in {comparison.top1_agreement:.1%}"
    content = {"store": str(store.folder), "samples": comparison.samples, "differences": comparison.differences}
    terminal.result(
        [[Piece(f"{'agrees':<13}", "good"), Piece(text + top)]], content | {"top1_agreement": comparison.top1_agreement}
    )
    return 0
