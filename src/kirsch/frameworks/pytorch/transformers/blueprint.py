"""The configuration of a model as its blueprint: what it builds with other numbers, and which ones build given sizes.

Nothing is known of a library or of names. What a number moves is seen by building the model on the meta device with
another one; what the numbers must be follows from the sizes that moved.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import warnings
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kirsch.errors import error_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    Sizes = Mapping[tuple[str, int], int]  # axis of a parameter or buffer → its size
    Numbers = dict[str, float]  # path in a configuration, "vision_config.hidden_size" or "conv_dim.0" → its value

MOST_BUILDS = 500
"""A seven-billion-parameter model of 32 layers is built on the meta device in 20 ms."""
INSTEAD_OF_NONE = 8, 12
"""Numbers to see what a value moves that is None or missing, which stands for "four times the width" and the like."""


def carried(model: nn.Module) -> bool:
    """Whether a model carries a configuration."""
    config = getattr(model, "config", None)
    return hasattr(config, "to_dict") and hasattr(config, "from_dict") and hasattr(model, "save_pretrained")


def numbers(owner: Any, path: str = "") -> dict[str, float | None]:
    """Numbers above 1, which may be sizes, and None, by their paths, also in lists and inner configurations."""
    if owner is None or (type(owner) in (int, float) and 1 < owner < float("inf")):
        return {path: owner}
    if isinstance(owner, (list, tuple)):
        items: dict[Any, Any] = dict(enumerate(owner))
    else:
        items = vars(owner) if hasattr(owner, "to_dict") else {}
    inner = [(f"{path}.{key}" if path else str(key), item) for key, item in items.items() if str(key)[0] != "_"]
    return {place: number for within, item in inner for place, number in numbers(item, within).items()}


def held(model: nn.Module) -> dict[str, set[float]]:
    """The integers that the modules of a model keep, by their names."""
    found: dict[str, set[float]] = {}
    for module in model.modules():
        if not type(module).__module__.startswith("torch."):
            for name, value in vars(module).items():
                if type(value) is int and value > 1 and not name.startswith("_"):
                    found.setdefault(name, set()).add(value)
    return found


def changed(config: Any, changes: Mapping[str, float]) -> Any:
    """A copy of a configuration with other numbers, as it is after it was written and read.

    Raises:
        Exception: whatever the configuration raises that does not allow them.
    """
    new = copy.deepcopy(config)
    for path, number in changes.items():
        _put(new, path.split("."), number)
    read = type(config).from_dict(new.to_dict())
    _keep_private(new, read)
    return read


def _put(owner: Any, way: Sequence[str], number: float) -> Any:
    """The owner with a number at the end of a way of attributes and places."""
    if not way:
        return number
    if isinstance(owner, (list, tuple)):
        at = int(way[0])
        return type(owner)([*owner[:at], _put(owner[at], way[1:], number), *owner[at + 1 :]])
    setattr(owner, way[0], _put(getattr(owner, way[0], None), way[1:], number))
    return owner


def _keep_private(old: Any, new: Any) -> None:
    """What is not written, such as which implementation of attention was asked for."""
    for name, value in vars(old).items():
        if name.startswith("_"):
            setattr(new, name, value)
        elif hasattr(value, "to_dict"):
            _keep_private(value, getattr(new, name))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the words and the random numbers of builds that are only trials."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def built(model: nn.Module, changes: Mapping[str, float], device: str | torch.device) -> nn.Module:
    """The model that the configuration builds with these numbers.

    Raises:
        Exception: whatever the model raises that cannot be built so.
    """
    before = torch.get_default_dtype()
    with quietly(), torch.device(device):
        torch.set_default_dtype(next((p.dtype for p in model.parameters() if p.is_floating_point()), before))
        try:
            new: nn.Module = type(model)(changed(model.config, changes))
        finally:
            torch.set_default_dtype(before)
    return new


def sizes(model: nn.Module) -> Sizes:
    """The size of each axis of each parameter and buffer."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {(name, axis): size for name, value in named for axis, size in enumerate(value.shape)}


def _wrong(found: Sizes, wanted: Sizes) -> list[tuple[str, int]]:
    return [axis for axis, size in wanted.items() if found.get(axis) != size]


def _numbered(names: AbstractSet[str]) -> dict[str, set[str]]:
    """Path of a list → the numbers of its elements that these names have."""
    found: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal():
                found.setdefault(".".join(parts[:place]), set()).add(part)
    return found


@dataclass(frozen=True)
class Lever:
    """A number of a configuration that sets sizes.

    Args:
        path: where it stands.
        value: today's.
        trial: another one.
        moved: axis → its size with the other number.
    """

    path: str
    value: float
    trial: float
    moved: Sizes

    def values(self, axis: tuple[str, int], start: int, now: int, wanted: int) -> Iterator[float]:
        """What it may be so that an axis has its wanted size, if that grows in proportion or in equal steps.

        Args:
            axis: one that it moves.
            start, now, wanted: its size in the beginning, with the other numbers that are chosen, and in the end.
        """
        value, step = Fraction(self.value), Fraction(self.moved[axis] - start) / Fraction(self.trial - self.value)
        for guess in (value * wanted / max(now, 1), value + (wanted - start) / step):
            if type(self.value) is float:
                yield float(guess)
            elif guess.denominator == 1 and guess >= 1:
                yield int(guess)


class Search:
    """The search for the numbers with which a configuration builds a model of the sizes of a given one.

    Stored tensors must have their sizes; buffers that the constructor fills are left to the verification.

    Args:
        model: the pruned model, with the configuration of the original.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.wanted = sizes(model)
        self.names = set(model.state_dict())
        self.stored = {axis: size for axis, size in self.wanted.items() if axis[0] in self.names}
        self.frozen: list[tuple[str, int]] = []  # the axes that nothing sets right once most numbers are chosen
        self._reached = (MOST_BUILDS, 0)  # how many numbers were still open there, how many axes wrong
        self.refusals: list[str] = []  # what was raised where all numbers were chosen
        self.held = held(model)
        self._known: dict[frozenset[tuple[str, float]], Sizes | Exception] = {}

    @property
    def spent(self) -> bool:
        """Whether as many models were built as may be."""
        return len(self._known) == MOST_BUILDS

    @property
    def obstacle(self) -> str:
        """What is in the way of a configuration, in words."""
        if self.spent:
            return f"None was found in {MOST_BUILDS} trials."
        if self.refusals:
            return f"The numbers that would are refused: {self.refusals[0]}"
        if not self.frozen:
            self.trial({})
            why = self._known[frozenset()]
            return f"Its own builds no such model: {error_text(why) if isinstance(why, Exception) else 'names differ.'}"
        name, axis = self.frozen[0]
        return (
            "Layers differ, or a size follows from another one: "
            f"no number gives axis {axis} of {name} its {self.wanted[name, axis]}."
        )

    @property
    def misfit(self) -> str:
        """In words, what the configuration as it is builds otherwise than the model stores; "" if nothing."""
        found = self.trial({})
        if found is None:
            error = self._known[frozenset()]
            return f"Its configuration does not build it: {error_text(error) if isinstance(error, Exception) else ''}"
        for name, axis in _wrong(found, self.stored)[:1]:
            size = found.get((name, axis))
            builds = f"with {size}" if size is not None else "not at all"
            return f"Axis {axis} of {name} has {self.wanted[name, axis]}; its configuration builds it {builds}."
        return ""

    def solutions(self) -> list[Numbers]:
        """The numbers that change, for each configuration that builds what is stored; those that build most first."""
        counts = self._counts()
        start = None if counts is None else self.trial(counts)
        if counts is None or start is None:
            return []
        implied = {**counts, **self._implied(start, counts)}
        every = self._solutions(self._levers(start, implied), implied, start)
        found = [self._fewest(changes, implied.keys() - counts.keys()) for changes in every]
        return sorted(found, key=lambda changes: len(_wrong(self.trial(changes) or {}, self.wanted)))

    def _fewest(self, changes: Numbers, implied: AbstractSet[str]) -> Numbers:
        """The changes without what goes without saying."""
        for path in implied:
            fewer = {other: number for other, number in changes.items() if other != path}
            if self.fits(fewer):
                return self._fewest(fewer, implied - {path})
        return changes

    def fits(self, changes: Numbers) -> bool:
        """Whether these numbers build what is stored."""
        found = self.trial(changes)
        return found is not None and not _wrong(found, self.stored)

    def builds(self, changes: Numbers) -> bool:
        """Whether these numbers build what is stored, and nothing else."""
        return self.fits(changes) and self._lacking(changes) == set()

    def trial(self, changes: Numbers) -> Sizes | None:
        """The sizes that these numbers build; None if they build nothing, or too much was built already."""
        key = frozenset(changes.items())
        if key not in self._known:
            if self.spent:
                return None
            try:
                self._known[key] = sizes(built(self.model, changes, "meta"))
            except Exception as error:  # noqa: BLE001 - whatever the model's own code raises where numbers do not fit
                self._known[key] = error
        found = self._known[key]
        return None if isinstance(found, Exception) else found

    def _counts(self) -> Numbers | None:
        """How many layers there are, where some were left out: the numbers that build what is stored, by its names."""
        lacking = self._lacking({})
        fewer = {len(places) for places in _numbered(lacking or set()).values()}
        counts: Numbers = {}
        for path, value in numbers(self.model.config).items():
            if not isinstance(value, int):
                continue
            for count in sorted(fewer) if lacking else ():
                rest = self._lacking({**counts, path: value - count}) if value > count else None
                if rest is not None and len(rest) < len(lacking or ()):
                    counts[path], lacking = value - count, rest
                    break
        return None if lacking is None or lacking else counts

    def _lacking(self, changes: Numbers) -> set[str] | None:
        """What these numbers build and the model does not store; None if they build nothing or less than it stores."""
        try:
            names = set(built(self.model, changes, "meta").state_dict())
        except Exception:  # noqa: BLE001 - whatever the model's own code raises where numbers do not fit
            return None
        return names - self.names if self.names <= names else None

    def _implied(self, start: Sizes, counts: Numbers) -> Numbers:
        """What stands for None, or for what is missing: the numbers that say what is built without them."""
        silent = [path for path, value in numbers(self.model.config).items() if value is None]
        silent += [name for name in self.held if not hasattr(self.model.config, name)]
        implied: Numbers = {}
        for path, trial in itertools.product(silent, INSTEAD_OF_NONE):
            found = self.trial({**counts, path: trial}) or start
            axis = next((axis for axis, size in found.items() if start.get(axis, size) != size), None)
            if axis is not None and path not in implied:
                number = Fraction(trial) * start[axis] / max(found[axis], 1)
                if number.denominator == 1 and self.trial({**counts, **implied, path: int(number)}) == start:
                    implied[path] = int(number)
        return implied

    def _levers(self, start: Sizes, implied: Numbers) -> list[Lever]:
        """The numbers that move an axis that is cut, and those that move what these move."""
        every = self._movers(start, implied)
        reached = set(_wrong(start, self.stored))
        for _ in every:  # no chain of levers is longer
            reached |= {axis for lever in every if not reached.isdisjoint(lever.moved) for axis in lever.moved}
        return [lever for lever in every if not reached.isdisjoint(lever.moved)]

    def _movers(self, start: Sizes, implied: Numbers) -> list[Lever]:
        """The numbers that move an axis."""
        every = []
        said_ = {path: value for path, value in numbers(self.model.config).items() if value is not None}
        for path, value in {**said_, **implied}.items():
            for trial in (value * 2, type(value)(value / 2)):
                found = self.trial({**implied, path: trial}) or start
                moved = {axis: size for axis, size in found.items() if start.get(axis, size) != size}
                if moved:
                    every.append(Lever(path, value, trial, moved))
                    break
        return every

    def settable(self, within: AbstractSet[tuple[str, int]]) -> set[tuple[str, int]]:
        """Return the axes of parameters that numbers of the configuration change without any effect on other axes.

        Args:
            within: the axes that may change. The model is one that is not pruned yet.
        """
        start = self.trial({})
        levers = [] if start is None else self._movers(start, self._implied(start, {}))
        parameters = dict(self.model.named_parameters())
        moved = [{axis for axis in lever.moved if axis[0] in parameters} for lever in levers]
        return {axis for axes in moved if axes <= within for axis in axes}

    def _solutions(self, levers: list[Lever], chosen: Numbers, start: Sizes) -> Iterator[Numbers]:
        """What is chosen together with what these levers may add; what no lever moves any more must be right."""
        if self.spent:
            return
        found = self.trial(chosen)
        wrong = [] if found is None else _wrong(found, self.stored)
        movers = Counter(axis for lever in levers for axis in lever.moved)
        frozen = [axis for axis in wrong if axis not in movers]
        if frozen and (len(levers), len(frozen)) < self._reached:
            self.frozen, self._reached = frozen, (len(levers), len(frozen))
        if not levers and found is not None and not frozen:
            yield chosen
        elif not levers and isinstance(error := self._known.get(frozenset(chosen.items())), Exception):
            self.refusals.append(error_text(error.__cause__ or error))
        elif levers and not frozen:
            alone = [{axis for axis in lever.moved if movers[axis] == 1} & self.stored.keys() for lever in levers]
            hints = [self.held.get(lever.path.rpartition(".")[2], set()) - {lever.value} for lever in levers]
            at = max(range(len(levers)), key=lambda at: (bool(alone[at]), bool(hints[at]), -len(levers[at].moved)))
            lever, rest = levers[at], [*levers[:at], *levers[at + 1 :]]
            values = hints[at].union(
                *(
                    lever.values(axis, start[axis], (found or start).get(axis, 0), self.wanted[axis])
                    for axis in (alone[at] or lever.moved.keys()) & self.wanted.keys()
                )
            )
            for more in ({}, *({lever.path: value} for value in sorted(values - {lever.value}))):
                yield from self._solutions(rest, {**chosen, **more}, start)
