"""Groups that the options of a plan allow to change, and how many of their units may be removed."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kirsch.errors import UnknownNameError
from kirsch.graph.kinds import UNROUNDED_KINDS
from kirsch.pruning.notes import ALIGNED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.options import PlanOptions


class Exclusion(NamedTuple):
    """The option and the pattern that keep all units of a group.

    Args:
        option: "exclude" or "keep_outputs".
        pattern: the first pattern of the option that applies.
    """

    option: str
    pattern: str


def removable_groups(graph: Graph, options: PlanOptions) -> list[Group]:
    """Return the groups that may lose units, in the order of the graph.

    Raises:
        UnknownNameError: a name to exclude is unknown.
    """
    weights, unchanged = options.kind_weights, exclusions(graph, options)
    return [group for group in graph.groups if weights[group.kind] > 0 and group.name not in unchanged]


def tied_groups(groups: Sequence[Group], options: PlanOptions) -> list[list[int]]:
    """Return lists of indices of groups; the groups of a list must lose the same number of units.

    With `uniform`, these are the groups of the same kind and size; otherwise, each list has one group.
    """
    classes: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        classes.setdefault((group.kind, group.size) if options.uniform else index, []).append(index)
    return list(classes.values())


def finest(options: PlanOptions) -> int:
    """Return how many times the multiples that round_to="auto" chooses may be halved to come closer to the goal."""
    return 0 if isinstance(options.round_to, int) else 2


def multiple(group: Group, options: PlanOptions, fineness: int) -> int:
    """Return the multiple to which the number of kept units of a group is rounded.

    With round_to="auto", multiples above `ALIGNED` are halved up to `fineness` times, but not below `ALIGNED`.
    """
    if isinstance(options.round_to, int):
        return options.round_to
    if isinstance(options.round_to, Mapping) and group.kind in options.round_to:
        return options.round_to[group.kind]
    if group.kind in UNROUNDED_KINDS:
        return 1
    coarse = next((multiple for multiple, least in ((16, 32), (8, 16), (4, 8)) if group.size >= least), 1)
    return max(coarse >> fineness, min(coarse, ALIGNED))


def exclusions(graph: Graph, options: PlanOptions) -> dict[str, Exclusion]:
    """Return the exclusion that keeps all units of a group, by group name; `exclude` precedes `keep_outputs`.

    Raises:
        UnknownNameError: a pattern matches no layer, parameter or group.
    """
    found: dict[str, Exclusion] = {}
    for pattern in options.exclude:
        for name in _with_parameters(graph, pattern):
            found.setdefault(name, Exclusion("exclude", pattern))
    for pattern in options.keep_outputs:
        for name in _with_outputs(graph, pattern):
            found.setdefault(name, Exclusion("keep_outputs", pattern))
    return found


def _with_parameters(graph: Graph, pattern: str) -> list[str]:
    """Return the groups with a parameter that the pattern names, or that is tied to such a parameter."""
    names = {name for name in graph.tensors if matches(name, pattern)}
    names = names or {name for group in graph.groups if group.name == pattern for name, _ in group.footprint}
    if not names:
        layers = {name.rpartition(".")[0] for name in graph.tensors} - {""}
        known = layers | {group.name for group in graph.groups}
        raise UnknownNameError("layer", pattern, known, argument="exclude")
    tied = {id(graph.tensors[name]) for name in names}
    return [g.name for g in graph.groups if any(id(graph.tensors[name]) in tied for name, _ in g.footprint)]


def _with_outputs(graph: Graph, pattern: str) -> list[str]:
    """Return the groups with a unit in the output of a module that the pattern names."""
    outputs = graph.module_outputs()
    named = [output for path, output in outputs.items() if fnmatch.fnmatchcase(path, pattern)]
    if not named:
        raise UnknownNameError("layer", pattern, outputs, argument="keep_outputs")
    kept = np.zeros(len(graph.coupling.frozen), bool)
    for labels in (axis for output in named for tensor in output for axis in tensor.axes if axis is not None):
        kept[graph.coupling.component[labels]] = True
    return [group.name for group in graph.groups if kept[group.components].any()]


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches the path of a parameter or block, or of one of its parent modules."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
