"""Search for the numbers in a configuration that build a model of given sizes.

The search does not depend on a library or on names. It changes one number at a time, builds the model on the meta
device and compares the sizes. The numbers then follow from the sizes that changed.
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
from torch.overrides import TorchFunctionMode

from kirsch.errors import error_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    Sizes = Mapping[tuple[str, int], int]  # axis of a parameter or buffer → its size
    Numbers = dict[str, float]  # path in a configuration, "vision_config.hidden_size" or "conv_dim.0" → its value

MOST_BUILDS = 500
"""Largest number of builds in one search. Building a model of 7 billion parameters on the meta device takes 20 ms."""
INSTEAD_OF_NONE = 8, 12
"""Trial values for a number that is None or missing, which often means a default such as four times the width."""


def has_configuration(model: nn.Module) -> bool:
    """Return whether a model has a configuration like the models of the transformers library."""
    config = getattr(model, "config", None)
    return hasattr(config, "to_dict") and hasattr(config, "from_dict") and hasattr(model, "save_pretrained")


def numbers(owner: Any, path: str = "") -> dict[str, float | None]:
    """Return the numbers above 1, which may be sizes, and None values, by path.

    Lists and inner configurations are searched, too.
    """
    if owner is None or (type(owner) in (int, float) and 1 < owner < float("inf")):
        return {path: owner}
    if isinstance(owner, (list, tuple)):
        items: dict[Any, Any] = dict(enumerate(owner))
    else:
        items = vars(owner) if hasattr(owner, "to_dict") else {}
    inner = [(f"{path}.{key}" if path else str(key), item) for key, item in items.items() if str(key)[0] != "_"]
    return {inner_path: number for key, item in inner for inner_path, number in numbers(item, key).items()}


def integer_attributes(model: nn.Module) -> dict[str, set[float]]:
    """Return the integers above 1 in the attributes of a model's modules, by name of the attribute."""
    integers: dict[str, set[float]] = {}
    for module in model.modules():
        if not type(module).__module__.startswith("torch."):
            for name, value in vars(module).items():
                if type(value) is int and value > 1 and not name.startswith("_"):
                    integers.setdefault(name, set()).add(value)
    return integers


def with_numbers(config: Any, changes: Mapping[str, float], layers: AbstractSet[str] = frozenset()) -> Any:
    """Return a copy of a configuration with other numbers, after conversion to a dict and back.

    If one of the numbers `layers` decreases, lists of words that had as many entries are cut to the new number, such as
    the types of all layers.

    Raises:
        Exception: the configuration does not allow the numbers.
    """
    new = copy.deepcopy(config)
    for path, number in changes.items():
        if path in layers:
            for owner, name in _lists_of_words(new, path, number):
                setattr(owner, name, getattr(owner, name)[: int(number)])
        _set(new, path.split("."), number)
    converted = type(config).from_dict(new.to_dict())
    _copy_private(new, converted)
    return converted


def _set(owner: Any, path: Sequence[str], number: float) -> Any:
    """Return the owner with a number set at a path of attributes and list indices."""
    if not path:
        return number
    if isinstance(owner, (list, tuple)):
        index = int(path[0])
        return type(owner)([*owner[:index], _set(owner[index], path[1:], number), *owner[index + 1 :]])
    setattr(owner, path[0], _set(getattr(owner, path[0], None), path[1:], number))
    return owner


def _lists_of_words(owner: Any, path: str, number: float) -> list[tuple[Any, str]]:
    """Return the lists of words beside a number that decreases, as owner and attribute, whose length is the number."""
    *outer, last = path.split(".")
    for name in outer:
        owner = owner[int(name)] if isinstance(owner, (list, tuple)) else getattr(owner, name, None)
    present = getattr(owner, last, None) if hasattr(owner, "to_dict") else None
    if type(present) is not int or type(number) is not int or number >= present:
        return []
    lists = [(name, value) for name, value in vars(owner).items() if isinstance(value, list) and len(value) == present]
    return [(owner, name) for name, value in lists if all(isinstance(word, str) for word in value)]


def _counts_layers(model: nn.Module, path: str, number: float) -> bool:
    """Return whether lists of words have an entry for each of the layers that a number counts.

    Another number, such as that of the heads, may have the same value. The number counts layers if a model that is
    built with a lower number and shorter lists lacks tensors, and has no others.
    """
    if not _lists_of_words(model.config, path, number):
        return False
    try:
        fewer = build(model, {path: number}, "meta", layers={path})
        return fewer.state_dict().keys() < build(model, {}, "meta").state_dict().keys()
    except Exception:  # noqa: BLE001 - the code of the model can raise any exception if numbers do not fit
        return False


def _copy_private(old: Any, new: Any) -> None:
    """Copy private attributes, which `to_dict` omits, such as the selected attention implementation."""
    for name, value in vars(old).items():
        if name.startswith("_"):
            setattr(new, name, value)
        elif hasattr(value, "to_dict"):
            _copy_private(value, getattr(new, name))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress logs and warnings, and restore the random state, for builds that are only trials."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


RANDOM = frozenset(["normal_", "uniform_", "kaiming_uniform_"])
"""Initializations that take most of the time in which a model is built, in torch.nn.init and in transformers."""


class _WithoutRandomValues(TorchFunctionMode):
    """Leave tensors uninitialized that would be filled with random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if getattr(func, "__name__", "") in RANDOM and "init" in str(getattr(func, "__module__", "")):
            return args[0] if args else options["tensor"]
        return func(*args, **options)


def build(
    model: nn.Module,
    changes: Mapping[str, float],
    device: str | torch.device,
    *,
    config: Any = None,
    layers: AbstractSet[str] | None = None,
) -> nn.Module:
    """Return a new model of the same class from its configuration, or another one, with other numbers.

    Its parameters are not initialized; those of another model must be loaded before it is run.

    `layers` are the numbers that count layers, see `with_numbers`; None: those that `_counts_layers` finds.

    Raises:
        Exception: the model cannot be built from these numbers.
    """
    if layers is None:
        layers = {path for path, number in changes.items() if _counts_layers(model, path, number)}
    before = torch.get_default_dtype()
    with quiet(), torch.device(device), _WithoutRandomValues():
        torch.set_default_dtype(next((p.dtype for p in model.parameters() if p.is_floating_point()), before))
        try:
            base = model.config if config is None else config
            new: nn.Module = type(model)(with_numbers(base, changes, layers))
        finally:
            torch.set_default_dtype(before)
    return new


def sizes(model: nn.Module) -> Sizes:
    """Return the size of each axis of each parameter and buffer."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {(name, axis): size for name, value in named for axis, size in enumerate(value.shape)}


def _different(found: Sizes, target: Sizes) -> list[tuple[str, int]]:
    return [axis for axis, size in target.items() if found.get(axis) != size]


def _list_indices(names: AbstractSet[str]) -> dict[str, set[str]]:
    """Return path of a module list → indices of its elements in the names of tensors."""
    indices: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for position, part in enumerate(parts):
            if part.isdecimal():
                indices.setdefault(".".join(parts[:position]), set()).add(part)
    return indices


@dataclass(frozen=True)
class SizeNumber:
    """A number of a configuration that determines sizes.

    Args:
        path: path of the number in the configuration.
        value: current value.
        trial: another value with which the model was built as a trial.
        affected: axis → its size with the trial value.
    """

    path: str
    value: float
    trial: float
    affected: Sizes

    def candidates(self, axis: tuple[str, int], start: int, current: int, target: int) -> Iterator[float]:
        """Yield values that may give an axis its target size, for a proportional and for a linear dependence.

        Args:
            axis: an affected axis.
            start: size of the axis with the current configuration.
            current: size of the axis with the numbers chosen so far.
            target: size of the axis in the pruned model.
        """
        value, step = Fraction(self.value), Fraction(self.affected[axis] - start) / Fraction(self.trial - self.value)
        for guess in (value * target / max(current, 1), value + (target - start) / step):
            if type(self.value) is float:
                yield float(guess)
            elif guess.denominator == 1 and guess >= 1:
                yield int(guess)


class Search:
    """Search for the numbers with which the configuration builds a model of the sizes of a pruned model.

    The stored tensors must have the sizes of the pruned model. Buffers that the constructor fills are compared later,
    by the outputs of the built model.

    Args:
        model: the pruned model, with the configuration of the original.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.target = sizes(model)
        self.names = set(model.state_dict())
        self.stored = {axis: size for axis, size in self.target.items() if axis[0] in self.names}
        self.unreachable: list[tuple[str, int]] = []  # axes of a wrong size that only chosen numbers affect
        self._best = (MOST_BUILDS, 0)  # numbers of open numbers and of unreachable axes when `unreachable` was set
        self.rejections: list[str] = []  # exceptions of builds with all numbers chosen
        self.integers = integer_attributes(model)
        self._trials: dict[frozenset[tuple[str, float]], Sizes | Exception] = {}

    @property
    def exhausted(self) -> bool:
        """Whether the limit of builds is reached."""
        return len(self._trials) == MOST_BUILDS

    @property
    def obstacle(self) -> str:
        """Sentence that explains why no configuration was found."""
        if self.exhausted:
            return f"None was found in {MOST_BUILDS} trials."
        if self.rejections:
            return f"The model cannot be built with the numbers that give its sizes: {self.rejections[0]}"
        if not self.unreachable:
            self.trial({})
            why = self._trials[frozenset()]
            if isinstance(why, Exception):
                return f"The model cannot be built from its configuration: {error_text(why)}"
            return "Its configuration builds a model with other parameter names."
        name, axis = self.unreachable[0]
        return (
            "Layers of one kind have different sizes, or a size follows from another one: "
            f"no number gives axis {axis} of {name} the size {self.target[name, axis]}."
        )

    @property
    def misfit(self) -> str:
        """Sentence on the first difference between the model and a model built from its configuration; "" if none."""
        found = self.trial({})
        if found is None:
            error = self._trials[frozenset()]
            why = error_text(error) if isinstance(error, Exception) else ""
            return f"It cannot be built from its configuration: {why}"
        for name, axis in _different(found, self.stored)[:1]:
            size = found.get((name, axis))
            builds = f"it with size {size}" if size is not None else "no such tensor"
            return f"Axis {axis} of {name} has size {self.target[name, axis]}; its configuration builds {builds}."
        return ""

    def solutions(self) -> list[Numbers]:
        """Return the changes of each configuration that builds the stored tensors.

        Solutions with the fewest differences in other buffers come first.
        """
        counts = self._layer_counts()
        start = None if counts is None else self.trial(counts)
        if counts is None or start is None:
            return []
        implied = {**counts, **self.implied(start, counts)}
        solutions = self._solutions(self._relevant(start, implied), implied, start)
        minimal = [self._without_implied(changes, implied.keys() - counts.keys()) for changes in solutions]
        return sorted(minimal, key=lambda changes: len(_different(self.trial(changes) or {}, self.target)))

    def _without_implied(self, changes: Numbers, implied: AbstractSet[str]) -> Numbers:
        """Return the changes without implied numbers that are not needed."""
        for path in implied:
            fewer = {other: number for other, number in changes.items() if other != path}
            if self.fits(fewer):
                return self._without_implied(fewer, implied - {path})
        return changes

    def fits(self, changes: Numbers) -> bool:
        """Return whether these numbers build the stored tensors."""
        found = self.trial(changes)
        return found is not None and not _different(found, self.stored)

    def trial(self, changes: Numbers) -> Sizes | None:
        """Return the sizes that these numbers build; None if the build fails or the limit is reached."""
        key = frozenset(changes.items())
        if key not in self._trials:
            if self.exhausted:
                return None
            try:
                self._trials[key] = sizes(build(self.model, changes, "meta"))
            except Exception as error:  # noqa: BLE001 - the code of the model can raise any exception if numbers do not fit
                self._trials[key] = error
        found = self._trials[key]
        return None if isinstance(found, Exception) else found

    def _layer_counts(self) -> Numbers | None:
        """Return the changed numbers of layers after blocks were dropped; None if no numbers give the stored names."""
        extra = self._extra_names({})
        dropped = {len(indices) for indices in _list_indices(extra or set()).values()}
        counts: Numbers = {}
        for path, value in numbers(self.model.config).items():
            if not isinstance(value, int):
                continue
            for count in sorted(dropped) if extra else ():
                remaining = self._extra_names({**counts, path: value - count}) if value > count else None
                if remaining is not None and len(remaining) < len(extra or ()):
                    counts[path], extra = value - count, remaining
                    break
        return None if extra is None or extra else counts

    def _extra_names(self, changes: Numbers) -> set[str] | None:
        """Return names of built tensors that are not stored; None if the build fails or lacks a stored name."""
        try:
            names = set(build(self.model, changes, "meta").state_dict())
        except Exception:  # noqa: BLE001 - the code of the model can raise any exception if numbers do not fit
            return None
        return names - self.names if self.names <= names else None

    def implied(self, start: Sizes, counts: Numbers) -> Numbers:
        """Return the values that None and missing numbers of the configuration stand for."""
        unset = [path for path, value in numbers(self.model.config).items() if value is None]
        unset += [name for name in self.integers if not hasattr(self.model.config, name)]
        implied: Numbers = {}
        for path, trial in itertools.product(unset, INSTEAD_OF_NONE):
            found = self.trial({**counts, path: trial}) or start
            axis = next((axis for axis, size in found.items() if start.get(axis, size) != size), None)
            if axis is not None and path not in implied:
                number = Fraction(trial) * start[axis] / max(found[axis], 1)
                if number.denominator == 1 and self.trial({**counts, **implied, path: int(number)}) == start:
                    implied[path] = int(number)
        return implied

    def _relevant(self, start: Sizes, implied: Numbers) -> list[SizeNumber]:
        """Return the numbers that affect a cut axis, and those that share an affected axis with a returned number."""
        size_numbers = self._size_numbers(start, implied)
        axes = set(_different(start, self.stored))
        for _ in size_numbers:  # a chain of numbers with common axes is not longer than this list
            axes |= {axis for n in size_numbers if not axes.isdisjoint(n.affected) for axis in n.affected}
        return [number for number in size_numbers if not axes.isdisjoint(number.affected)]

    def _size_numbers(self, start: Sizes, implied: Numbers) -> list[SizeNumber]:
        """Return the numbers that affect an axis."""
        size_numbers = []
        stated = {path: value for path, value in numbers(self.model.config).items() if value is not None}
        for path, value in {**stated, **implied}.items():
            for trial in (value * 2, type(value)(value / 2)):
                found = self.trial({**implied, path: trial}) or start
                affected = {axis: size for axis, size in found.items() if start.get(axis, size) != size}
                if affected:
                    size_numbers.append(SizeNumber(path, value, trial, affected))
                    break
        return size_numbers

    def settable(self, within: AbstractSet[tuple[str, int]]) -> set[tuple[str, int]]:
        """Return the axes of parameters that some number of the configuration changes without changing forbidden axes.

        The model must not be pruned yet.

        Args:
            within: the axes of parameters that may change; all others are forbidden.
        """
        start = self.trial({})
        size_numbers = [] if start is None else self._size_numbers(start, self.implied(start, {}))
        parameters = dict(self.model.named_parameters())
        affected = [{axis for axis in number.affected if axis[0] in parameters} for number in size_numbers]
        return {axis for axes in affected if axes <= within for axis in axes}

    def _solutions(self, open_: list[SizeNumber], chosen: Numbers, start: Sizes) -> Iterator[Numbers]:
        """Yield the solutions that extend the chosen numbers with values of the open, not yet chosen, numbers.

        The search is depth first. A branch ends when an axis has another size than the target and no open number
        affects the axis.
        """
        if self.exhausted:
            return
        found = self.trial(chosen)
        different = [] if found is None else _different(found, self.stored)
        uses = Counter(axis for number in open_ for axis in number.affected)
        unreachable = [axis for axis in different if axis not in uses]
        if unreachable and (len(open_), len(unreachable)) < self._best:
            self.unreachable, self._best = unreachable, (len(open_), len(unreachable))
        if not open_ and found is not None and not unreachable:
            yield chosen
        elif not open_ and isinstance(error := self._trials.get(frozenset(chosen.items())), Exception):
            self.rejections.append(error_text(error.__cause__ or error))
        elif open_ and not unreachable:
            alone = [{axis for axis in number.affected if uses[axis] == 1} & self.stored.keys() for number in open_]
            hints = [self.integers.get(number.path.rpartition(".")[2], set()) - {number.value} for number in open_]
            # First the numbers that alone affect an axis, then those that an attribute of a module states.
            best = max(range(len(open_)), key=lambda i: (bool(alone[i]), bool(hints[i]), -len(open_[i].affected)))
            number, rest = open_[best], [*open_[:best], *open_[best + 1 :]]
            values = hints[best].union(
                *(
                    number.candidates(axis, start[axis], (found or start).get(axis, 0), self.target[axis])
                    for axis in (alone[best] or number.affected.keys()) & self.target.keys()
                )
            )
            for change in ({}, *({number.path: value} for value in sorted(values - {number.value}))):
                yield from self._solutions(rest, {**chosen, **change}, start)
