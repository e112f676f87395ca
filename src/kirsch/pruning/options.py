"""Options of a plan, and the groups that they allow to change."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import UnknownNameError, UsageError
from kirsch.graph.group import KINDS
from kirsch.pruning.notes import ALIGNED, UNROUNDED_KINDS

if TYPE_CHECKING:
    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group


@dataclass(frozen=True)
class Options:
    """Options of a plan; see `kirsch.plan`."""

    importance: str = "magnitude"
    ranking: str = "global"
    round_to: int | str | Mapping[str, int] = "auto"
    exclude: Sequence[str] = ()
    kinds: Sequence[str] | Mapping[str, float] | None = None
    uniform: bool = False
    norm: int = 2
    min_keep: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Check the values of the options.

        Raises:
            UnknownNameError: round_to names an unknown kind.
            UsageError: min_keep is out of range.
        """
        for kind in self.round_to if isinstance(self.round_to, Mapping) else ():
            if kind not in KINDS:
                raise UnknownNameError("kind of unit for `round_to`", kind, KINDS)
        if not 0 < self.min_keep <= 1:
            raise UsageError(
                f"`min_keep`, the fraction of each group that is always kept, is {self.min_keep}.",
                fix="Give a number above 0 and up to 1, such as min_keep=0.1.",
            )

    @property
    def kind_weights(self) -> dict[str, float]:
        """Weight of each kind of unit: importances are divided by the weight, 0 keeps all units.

        Raises:
            UnknownNameError: kinds names an unknown kind.
            UsageError: a weight is below 0, or infinite.
        """
        kinds = self.kinds
        named = [kinds] if isinstance(kinds, str) else kinds if kinds is not None else ()
        for kind in named:
            if kind not in KINDS:
                raise UnknownNameError("kind of unit for `kinds`", kind, KINDS)
        if isinstance(kinds, Mapping):
            wrong = {kind: number for kind, number in kinds.items() if not 0 <= number < np.inf}
            if wrong:
                raise UsageError(f"kinds has {wrong}.", "A number of at least 0 is needed for each kind.")
            return {kind: float(kinds.get(kind, 1)) for kind in KINDS}
        return {kind: float(kinds is None or kind in named) for kind in KINDS}

    def groups(self, graph: Graph) -> list[Group]:
        """Return the groups that may lose units, in the order of the graph.

        Raises:
            UnknownNameError: a name to exclude is unknown.
        """
        weights, unchanged = self.kind_weights, excluded(graph, self.exclude)
        return [group for group in graph.groups if weights[group.kind] > 0 and group.name not in unchanged]

    def tied_groups(self, groups: Sequence[Group]) -> list[list[int]]:
        """Return the indices of groups that lose the same number of units, one list for each number."""
        classes: dict[object, list[int]] = {}
        for index, group in enumerate(groups):
            classes.setdefault((group.kind, group.size) if self.uniform else index, []).append(index)
        return list(classes.values())

    @property
    def finest(self) -> int:
        """Number of times that "auto" may be halved."""
        return 0 if isinstance(self.round_to, int) else 2

    def multiple(self, group: Group, fineness: int) -> int:
        """Return the number that divides the kept units of a group, with "auto" halved `fineness` times."""
        if isinstance(self.round_to, int):
            return self.round_to
        if isinstance(self.round_to, Mapping) and group.kind in self.round_to:
            return self.round_to[group.kind]
        if group.kind in UNROUNDED_KINDS:
            return 1
        coarse = next((multiple for multiple, least in ((16, 32), (8, 16), (4, 8)) if group.size >= least), 1)
        return max(coarse >> fineness, min(coarse, ALIGNED))

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values, for the method of a plan."""
        return {
            "importance": self.importance,
            "norm": self.norm,
            "ranking": self.ranking,
            "round_to": dict(self.round_to) if isinstance(self.round_to, Mapping) else self.round_to,
            "exclude": list(self.exclude),
            "kinds": {kind: number for kind, number in self.kind_weights.items() if number != 1},
            "uniform": self.uniform,
            "min_keep": self.min_keep,
            "seed": self.seed,
        }


def excluded(graph: Graph, exclude: Sequence[str]) -> dict[str, str]:
    """Return the first pattern that excludes each group, by group name.

    A group is excluded if one of its parameters is excluded, or shares its values with one that is.

    Raises:
        UnknownNameError: a pattern matches no layer, parameter or group.
    """
    pattern_of: dict[str, str] = {}
    for pattern in exclude:
        names = {name for name in graph.tensors if matches(name, pattern)}
        names = names or {name for group in graph.groups if group.name == pattern for name, _ in group.footprint}
        if not names:
            layers = {name.rpartition(".")[0] for name in graph.tensors} - {""}
            raise UnknownNameError("layer to `exclude` named", pattern, layers | {group.name for group in graph.groups})
        tied = {id(graph.tensors[name]) for name in names}
        for group in graph.groups:
            if any(id(graph.tensors[name]) in tied for name, _ in group.footprint):
                pattern_of.setdefault(group.name, pattern)
    return pattern_of


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches the path of a parameter or block, or of one of its parent modules."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
