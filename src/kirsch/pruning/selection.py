"""Groups that the options of a plan allow to change, and how many of their units may be removed."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kirsch.errors import UnknownNameError, UsageError, listing
from kirsch.graph.kinds import UNROUNDED_KINDS
from kirsch.pruning.notes import ALIGNED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.options import PlanOptions


class Exclusion(NamedTuple):
    """The option and the patterns that keep all units of a group.

    Args:
        option: "exclude", "keep_outputs", or "kinds" for the ranks of adapters, which `kinds` does not name.
        patterns: the patterns of the option that apply; empty for "kinds".
    """

    option: str
    patterns: tuple[str, ...]


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


def ranked_together(
    graph: Graph, groups: Mapping[int, Sequence[Group]], options: PlanOptions
) -> list[list[int]] | None:
    """Return lists of indices of candidates, for rankings that remove the same fraction of each list; else None.

    Args:
        graph: graph of the model.
        groups: index of each candidate whose width is not given → its tied groups.
        options: options of the plan.
    """
    if options.ranking == "local":
        return [[index] for index in groups]
    if options.ranking != "isomorphic":
        return None
    classes: dict[object, list[int]] = {}
    for index, tied in groups.items():
        classes.setdefault(tuple(sorted({_structure(graph, group) for group in tied})), []).append(index)
    return list(classes.values())


def _structure(graph: Graph, group: Group) -> tuple[str, tuple[tuple[object, ...], ...]]:
    """Return the kind of a group, and the number of axes, the axis and the roles of each parameter axis in it.

    Groups with equal results occur in layers of the same types; sizes may differ. That these layers are connected in
    the same way is not compared.
    """
    roles = {mark: set(graph.axes_with(group, mark)) for mark in graph.facts.marks}
    axes = [
        (len(graph.tensors[name].shape), axis, *sorted(mark for mark, keys in roles.items() if (name, axis) in keys))
        for name, axis in group.footprint
    ]
    return group.kind, tuple(sorted(axes))


def max_halvings(options: PlanOptions) -> int:
    """Return how many times the multiples that round_to="auto" chooses may be halved to come closer to the goal."""
    return 0 if isinstance(options.round_to, int) else 2


def width_multiple(group: Group, options: PlanOptions, fineness: int) -> int:
    """Return the multiple to which the number of kept units of a group is rounded.

    With round_to="auto", multiples above `ALIGNED` are halved up to `fineness` times, but not below `ALIGNED`.
    """
    if isinstance(options.round_to, int):
        return options.round_to
    if isinstance(options.round_to, Mapping) and group.kind in options.round_to:
        return options.round_to[group.kind]
    if group.kind in UNROUNDED_KINDS:
        return 1
    coarse = next((multiple for multiple, least in ((16, 128), (8, 16), (4, 8)) if group.size >= least), 1)
    return max(coarse >> fineness, min(coarse, ALIGNED))


def exclusions(graph: Graph, options: PlanOptions) -> dict[str, Exclusion]:
    """Return the exclusion that keeps all units of a group, by group name; `exclude` precedes `keep_outputs`.

    The units that only adapters have, such as the rank of LoRA, are kept unless `kinds` names their kind: the user has
    chosen this rank, and the adapter is small.

    Raises:
        UsageError: a pattern matches no layer, parameter or group.
    """
    excluded = {pattern: _with_parameters(graph, pattern) for pattern in options.exclude}
    kept = {pattern: _with_outputs(graph, pattern) for pattern in options.keep_outputs}
    found: dict[str, Exclusion] = {}
    for option, groups in (("exclude", excluded), ("keep_outputs", kept)):
        for name in {name for names in groups.values() for name in names} - set(found):
            found[name] = Exclusion(option, tuple(pattern for pattern, names in groups.items() if name in names))
    for group in graph.groups if graph.adapters else ():
        if group.kind not in (options.kinds or ()) and graph.adapters.issuperset(name for name, _ in group.footprint):
            found.setdefault(group.name, Exclusion("kinds", ()))
    return found


def named_parameters(graph: Graph, pattern: str) -> set[str]:
    """Return the parameters and buffers that a pattern of `exclude` names; may be empty."""
    return {name for name in graph.tensors if matches(name, pattern)}


def unknown_layer(pattern: str, known: Iterable[str], option: str) -> UnknownNameError | UsageError:
    """Return the error for a pattern of `exclude` or `keep_outputs` that matches nothing."""
    if set(pattern) & set("*?["):
        return UsageError(
            f"The pattern {pattern!r} in `{option}` matches no layer of the model.",
            listing(sorted(known)),
            "Correct the pattern, or leave it out.",
        )
    return UnknownNameError("layer", pattern, known, argument=option)


def _with_parameters(graph: Graph, pattern: str) -> list[str]:
    """Return the groups with a parameter that the pattern names, or that is tied to such a parameter."""
    names = named_parameters(graph, pattern)
    names = names or {name for group in graph.groups if group.name == pattern for name, _ in group.footprint}
    if not names:
        layers = {name.rpartition(".")[0] for name in graph.tensors} - {""}
        known = layers | {group.name for group in graph.groups}
        raise unknown_layer(pattern, known, "exclude")
    tied = {id(graph.tensors[name]) for name in names}
    return [g.name for g in graph.groups if any(id(graph.tensors[name]) in tied for name, _ in g.footprint)]


def _with_outputs(graph: Graph, pattern: str) -> list[str]:
    """Return the groups with a unit in the output of a module that the pattern names."""
    outputs = graph.module_outputs()
    named = [output for path, output in outputs.items() if fnmatch.fnmatchcase(path, pattern)]
    if not named:
        raise unknown_layer(pattern, outputs, "keep_outputs")
    kept = np.zeros(len(graph.coupling.frozen), bool)
    for labels in (axis for output in named for tensor in output for axis in tensor.axes if axis is not None):
        kept[graph.coupling.component[labels]] = True
    return [group.name for group in graph.groups if kept[group.components].any()]


def excludes_block(graph: Graph, options: PlanOptions, path: str) -> bool:
    """Return whether `exclude` or `keep_outputs` names a residual block, or a layer inside it."""
    patterns = (*options.exclude, *options.keep_outputs)
    inside = [name for name in graph.tensors if name.startswith(f"{path}.")]
    return any(matches(name, pattern) for name in (path, *inside) for pattern in patterns)


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches the path of a parameter or block, or of one of its parent modules."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
