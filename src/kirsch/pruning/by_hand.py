"""Widths that the option `keep` of a plan sets by hand."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING

from kirsch import figures
from kirsch.errors import UsageError
from kirsch.pruning.selection import exclusions, unknown_layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.options import PlanOptions


def kept_units(graph: Graph, options: PlanOptions) -> dict[str, int]:
    """Return the number of units to keep in each group that `keep` names, by group name.

    A pattern names a group, or layers whose outputs are units of groups. Normalizations count only if the pattern names
    no other layers. A name without wildcards has precedence over a pattern.

    Raises:
        UnknownNameError: a name is neither a group nor a layer.
        UsageError: a pattern matches nothing, or only units that stay; two patterns contradict each other; a number is
            larger than a group; or `exclude`, `keep_outputs` or `kinds` keeps the units.
    """
    found: dict[str, tuple[str, int]] = {}  # group name → (pattern, number of units)
    of_group = {group.name: group for group in graph.groups}
    for pattern, amount in sorted((options.keep or {}).items(), key=lambda item: _has_wildcard(item[0]), reverse=True):
        for name in _groups(graph, pattern, options, amount):
            number = _number(of_group[name], pattern, amount)
            earlier = found.get(name)
            if earlier is not None and earlier[1] != number and _has_wildcard(earlier[0]) == _has_wildcard(pattern):
                raise UsageError(
                    f"`keep` contradicts itself for {name!r}.",
                    f"{earlier[0]!r} keeps {figures.counted(earlier[1], 'unit')}, {pattern!r} keeps {number}.",
                    f"Name the group itself: keep={{{name!r}: {number}}}.",
                )
            found[name] = pattern, number
    _check_exclusions(graph, options, {name: pair for name, pair in found.items() if pair[1] < of_group[name].size})
    return {name: number for name, (_, number) in found.items()}


def _has_wildcard(pattern: str) -> bool:
    return bool(set(pattern) & set("*?["))


def _groups(graph: Graph, pattern: str, options: PlanOptions, amount: float) -> list[str]:
    """Return the names of the groups that a pattern names."""
    named = [group.name for group in graph.groups if group.name == pattern.removesuffix("#1")]
    if named and "#" in pattern:
        return named
    owners = {name.rpartition(".")[0] for name in graph.parameters}
    paths = [path for path in sorted(owners) if fnmatch.fnmatchcase(path, pattern)]
    if not paths and named:  # a parameter of the model itself
        return named
    if not paths:
        raise unknown_layer(pattern, {*owners, *(group.name for group in graph.groups)} - {""}, "keep")
    weights = options.kind_weights
    groups = [group for group in graph.groups if weights[group.kind] > 0]
    produced = {path: _produced_by(graph, path, groups, least_axes=2) for path in paths}
    if not any(produced.values()):  # a pattern that names normalizations alone
        produced = {path: _produced_by(graph, path, groups, least_axes=1) for path in paths}
    for path, of_layer in produced.items():
        _check_unambiguous(path, of_layer, amount)
    found = list(dict.fromkeys(group.name for groups in produced.values() for group in groups))
    if not found and amount != 1.0:
        raise UsageError(
            f"`keep` names {pattern!r}, and none of its outputs can be removed.",
            "They are outputs of the model, frozen, or of a kind that `kinds` leaves out.",
            f"Remove {pattern!r} from `keep`; graph.explain({paths[0]!r}) shows the reason.",
        )
    return found


def _check_unambiguous(layer: str, groups: Sequence[Group], amount: float) -> None:
    """Raise a UsageError if a number or fraction of the outputs of a layer can mean several plans.

    A fraction of outputs that are several groups of one kind is a fraction of each of them.
    """
    kinds = {group.kind for group in groups}
    if len(kinds) <= 1 and (isinstance(amount, float) or len(groups) <= 1):
        return
    numbered = [group.name if "#" in group.name else f"{group.name}#1" for group in groups]
    listed = ", ".join(f"{name!r} ({group.kind})" for name, group in zip(numbered, groups, strict=True))
    several, other = "groups of units", "give a fraction, which applies to each of them"
    if len(kinds) > 1:
        several, other = "kinds of units", "give `kinds`, so that one kind remains"
    raise UsageError(
        f"`keep` names {layer!r}, whose outputs have several {several}.",
        f"They are the groups {listed}.",
        f"Name one of these groups, or {other}.",
    )


def _produced_by(graph: Graph, path: str, groups: Sequence[Group], least_axes: int) -> list[Group]:
    """Return the groups whose units are outputs of a layer, by its parameters with at least some number of axes."""
    found = []
    for group in groups:
        reading = set(graph.input_axes(group)) - set(graph.axes_with(group, "embedded"))
        for name, axis in group.footprint:
            own = name in graph.parameters and name.rpartition(".")[0] == path
            if own and (name, axis) not in reading and len(graph.tensors[name].shape) >= least_axes:
                found.append(group)
                break
    return found


def _number(group: Group, pattern: str, amount: float) -> int:
    """Return the number of units of a group to keep, from a number of units (int) or a fraction (float)."""
    if isinstance(amount, float):
        return max(1, round(amount * group.size))
    if amount > group.size:
        raise UsageError(
            f"`keep` sets {pattern!r} to {amount} units, and {group.name!r} has {group.size}.",
            fix=f"Give at most {group.size}, or a fraction, such as 0.5.",
        )
    return amount


def _check_exclusions(graph: Graph, options: PlanOptions, kept: dict[str, tuple[str, int]]) -> None:
    """Raise a UsageError if another option keeps all units of a group that `keep` makes smaller."""
    weights, unchanged = options.kind_weights, exclusions(graph, options)
    for group in (group for group in graph.groups if group.name in kept):
        pattern = kept[group.name][0]
        if group.name in unchanged:
            option, patterns = unchanged[group.name]
            if option == "kinds":
                raise UsageError(
                    f"`keep` removes units of {group.name!r} ({pattern!r}), the rank of an adapter.",
                    "The ranks of adapters are kept unless `kinds` names them.",
                    f"Name the kind of these units: kinds={{{group.kind!r}: 1}}.",
                )
            other = f"{option}={list(patterns)}"
        elif weights[group.kind] == 0:
            other = f"`kinds`, without {group.kind!r},"
        else:
            continue
        raise UsageError(
            f"`keep` removes units of {group.name!r} ({pattern!r}), and {other} keeps them.",
            fix="Remove one of the two.",
        )


def tied_number(groups: Sequence[Group], kept: dict[str, int]) -> int | None:
    """Return the number of units that `keep` sets for groups of one size that `uniform` ties; None if it sets none.

    Raises:
        UsageError: `keep` sets different numbers.
    """
    numbers = {kept.get(group.name) for group in groups}
    if len(numbers) > 1:
        names = ", ".join(repr(group.name) for group in groups)
        raise UsageError(
            f"`keep` does not set the same width for {names}, and uniform=True keeps them equal.",
            fix="Give the same number for all of them, or remove `uniform`.",
        )
    return numbers.pop()
