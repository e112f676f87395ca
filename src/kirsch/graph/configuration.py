"""Widths and depths of a model that numbers of its configuration state."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ConfiguredWidth:
    """Numbers of a configuration that change together, and the units that each step removes.

    After n steps, each number is its value minus n times its step, and each group has lost n times its number of units.

    Args:
        values: path of each number in the configuration → its value in the original.
        steps: path of each number → its decrease in one step.
        units: name of each group that loses units → number of units that it loses in one step.
        stated: numbers that the configuration of the original does not state, because they follow from the others,
            and that must be stated as soon as `values` change, such as a head dim that is hidden size ÷ heads.
        refused: how a model that is built with changed numbers differs from the pruned model; "" if it does not.
    """

    values: dict[str, float]
    steps: dict[str, float]
    units: dict[str, int]
    stated: dict[str, float] = field(default_factory=dict)
    refused: str = ""

    def joined(self, other: ConfiguredWidth) -> ConfiguredWidth:
        """Return the width whose steps are those of two widths without a common number or group, taken together."""
        return ConfiguredWidth(
            {**self.values, **other.values},
            {**self.steps, **other.steps},
            {**self.units, **other.units},
            {**self.stated, **other.stated},
        )

    def numbers(self, count: int) -> dict[str, float]:
        """Return the numbers after some steps."""
        return {path: value - count * self.steps[path] for path, value in self.values.items()} if count else {}


@dataclass(frozen=True)
class ConfiguredDepth:
    """A number of a configuration that counts the residual blocks of a list.

    Args:
        path: path of the number.
        value: its value in the original.
        elements: paths of all elements of the list.
        blocks: those that can be removed.
        types: type of each element, such as one with full attention. The configuration states the types of the first
            elements of a shorter list as those of the first elements of the original list.
    """

    path: str
    value: int
    elements: tuple[str, ...]
    blocks: tuple[str, ...]
    types: tuple[str, ...]

    def removals(self, importance: Callable[[str], float], removable: Collection[str]) -> list[tuple[str, ...]]:
        """Return for 0, 1, ... blocks those whose removal has the least sum of importances; fewer if types forbid it.

        Args:
            importance: function that returns the importance of a block.
            removable: the blocks that may be removed.
        """
        # least[kept]: the least importance with which `kept` of the elements so far have the types of the first ones
        least: dict[int, tuple[float, tuple[str, ...]]] = {0: (0.0, ())}
        for element, type_ in zip(self.elements, self.types, strict=True):
            following: dict[int, tuple[float, tuple[str, ...]]] = {}
            for kept, (total, removed) in least.items():
                options = [(kept, total + importance(element), (*removed, element))] if element in removable else []
                options += [(kept + 1, total, removed)] if self.types[kept] == type_ else []
                for number, cost, paths in options:
                    if number not in following or cost < following[number][0]:
                        following[number] = (cost, paths)
            least = following
        return [paths for _, (_, paths) in sorted(least.items(), reverse=True)]


@dataclass(frozen=True)
class Configurable:
    """Cuts that the configuration of a model can state. They are searched for when they are first read.

    Args:
        obstacle: why the configuration states no cut of this model, as a sentence; "" if a search is possible.
        find_widths: function that returns the widths, also those that cannot be used.
        find_depths: function that returns the numbers of layers.
        fits: takes numbers and the mask of kept components, and returns whether a model that is built with these
            numbers has the sizes of the pruned model.
        difference: takes numbers, the mask of kept components and removed blocks, and returns how the outputs of a
            model that is built with these numbers differ from those of the pruned model; "" if they are bit-identical.
    """

    obstacle: str
    find_widths: Callable[[], Sequence[ConfiguredWidth]]
    find_depths: Callable[[], Sequence[ConfiguredDepth]]
    fits: Callable[[dict[str, float], NDArray[np.bool_]], bool]
    difference: Callable[[dict[str, float], NDArray[np.bool_], Collection[str]], str]

    @cached_property
    def widths(self) -> tuple[ConfiguredWidth, ...]:
        """The widths, also those that cannot be used."""
        return () if self.obstacle else tuple(self.find_widths())

    @cached_property
    def depths(self) -> tuple[ConfiguredDepth, ...]:
        """The numbers of layers."""
        return () if self.obstacle else tuple(self.find_depths())
