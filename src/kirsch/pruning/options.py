"""The options of a plan: what they may be, and which groups of a model they let go."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import UnknownNameError, UsageError
from kirsch.graph.group import KINDS
from kirsch.pruning.notes import ALIGNED, WHOLE

if TYPE_CHECKING:
    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group


@dataclass(frozen=True)
class Options:
    """How a plan is chosen; see `kirsch.plan`."""

    importance: str = "magnitude"
    scope: str = "global"
    round_to: int | str | Mapping[str, int] = "auto"
    exclude: Sequence[str] = ()
    granularity: Sequence[str] | Mapping[str, float] | None = None
    uniform: bool = False
    norm: int = 2
    min_keep: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Make sure that each option has a value that it may have.

        Raises:
            UnknownNameError: round_to names a kind that does not exist.
            UsageError: min_keep is out of range.
        """
        for kind in self.round_to if isinstance(self.round_to, Mapping) else ():
            if kind not in KINDS:
                raise UnknownNameError("kind of unit for `round_to`", kind, KINDS)
        if not 0 < self.min_keep <= 1:
            raise UsageError(
                f"`min_keep` is {self.min_keep}; it is the fraction of each group that always stays.",
                fix="Give a number above 0 and up to 1, such as min_keep=0.1.",
            )

    @property
    def ease(self) -> dict[str, float]:
        """Kind of unit → how readily it goes, 0 for not at all.

        Raises:
            UnknownNameError: granularity names a kind that does not exist.
            UsageError: it has a number below 0 or infinity.
        """
        given = self.granularity
        named = [given] if isinstance(given, str) else given if given is not None else ()
        for kind in named:
            if kind not in KINDS:
                raise UnknownNameError("kind of unit for `granularity`", kind, KINDS)
        if isinstance(given, Mapping):
            wrong = {kind: number for kind, number in given.items() if not 0 <= number < np.inf}
            if wrong:
                raise UsageError(f"granularity has {wrong}.", "A number of at least 0 is needed for each kind.")
            return {kind: float(given.get(kind, 1)) for kind in KINDS}
        return {kind: float(given is None or kind in named) for kind in KINDS}

    def groups(self, graph: Graph) -> list[Group]:
        """The groups that may lose units, in the order of the graph.

        Raises:
            UnknownNameError: nothing of a name to exclude exists.
        """
        ease, untouched = self.ease, excluded(graph, self.exclude)
        return [group for group in graph.groups if ease[group.kind] > 0 and group.name not in untouched]

    def together(self, groups: Sequence[Group]) -> list[list[int]]:
        """Places of the groups that lose the same number of units."""
        classes: dict[object, list[int]] = {}
        for place, group in enumerate(groups):
            classes.setdefault((group.kind, group.size) if self.uniform else place, []).append(place)
        return list(classes.values())

    @property
    def finest(self) -> int:
        """How many times "auto" may be halved."""
        return 0 if isinstance(self.round_to, int) else 2

    def multiple(self, group: Group, fineness: int) -> int:
        """What the number of units that stay in a group is a multiple of, with "auto" halved so many times."""
        if isinstance(self.round_to, int):
            return self.round_to
        if isinstance(self.round_to, Mapping) and group.kind in self.round_to:
            return self.round_to[group.kind]
        if group.kind in WHOLE:
            return 1
        coarse = next((multiple for multiple, least in ((16, 32), (8, 16), (4, 8)) if group.size >= least), 1)
        return max(coarse >> fineness, min(coarse, ALIGNED))

    def to_dict(self) -> dict[str, Any]:
        """As JSON, the method of a plan."""
        return {
            "importance": self.importance,
            "norm": self.norm,
            "scope": self.scope,
            "round_to": dict(self.round_to) if isinstance(self.round_to, Mapping) else self.round_to,
            "exclude": list(self.exclude),
            "granularity": {kind: number for kind, number in self.ease.items() if number != 1},
            "uniform": self.uniform,
            "min_keep": self.min_keep,
            "seed": self.seed,
        }


def excluded(graph: Graph, exclude: Sequence[str]) -> dict[str, str]:
    """Name of each group that touches something excluded → the first pattern that excludes it.

    Raises:
        UnknownNameError: nothing of that name exists.
    """
    found: dict[str, str] = {}
    for pattern in exclude:
        names = {name for name in graph.tensors if matches(name, pattern)}
        names = names or {name for group in graph.groups if group.name == pattern for name, _ in group.footprint}
        if not names:
            layers = {name.rpartition(".")[0] for name in graph.tensors} - {""}
            raise UnknownNameError("layer to `exclude` named", pattern, layers | {group.name for group in graph.groups})
        tied = {id(graph.tensors[name]) for name in names}
        for group in graph.groups:
            if any(id(graph.tensors[name]) in tied for name, _ in group.footprint):
                found.setdefault(group.name, pattern)
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter or block is meant by a path, one of its parent modules, or a glob over either."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
