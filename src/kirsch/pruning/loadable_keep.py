"""Widths of a configuration that the option `keep` sets by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch import figures
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kirsch.graph.configuration import Configurable, ConfiguredWidth
    from kirsch.graph.group import Group


def kept_portions(width: ConfiguredWidth, groups: Mapping[str, Group], kept: Mapping[str, int]) -> int | None:
    """Return the number of portions that `keep` leaves of each group of a width; None if `keep` names none of them.

    Args:
        width: the width; its steps are the portions.
        groups: the groups, by name.
        kept: number of units that `keep` leaves, by name of the group.

    Raises:
        ValueError: no value of the width gives these numbers.
    """
    if kept.keys().isdisjoint(width.units):
        return None
    removed = {name: groups[name].size - kept.get(name, groups[name].size) for name in width.units}
    counts = {name: count / width.units[name] for name, count in removed.items()}
    count = min(counts.values())
    if len(set(counts.values())) > 1 or count != int(count):
        raise ValueError
    return min(groups[name].size // portion for name, portion in width.units.items()) - int(count)


def usable_widths(
    configurable: Configurable, groups: Mapping[str, Group], kept: Mapping[str, int]
) -> list[ConfiguredWidth]:
    """Return the widths of removable groups that have a value for the numbers of units which `keep` sets.

    Args:
        configurable: the cuts that the configuration can state.
        groups: the groups that may lose units, by name.
        kept: number of units that `keep` leaves, by name of the group.

    Raises:
        UsageError: no width states the units of a group that `keep` removes.
    """
    widths = [width for width in configurable.widths if width.units.keys() <= groups.keys()]
    usable = [width for width in widths if not width.refused and _has_value(width, groups, kept)]
    for name in _cut_by_hand(groups, kept):
        if not any(name in width.units for width in usable):
            raise _not_stated(name, [width for width in widths if name in width.units], kept[name])
    return usable


def usable_sets(
    sets: Sequence[list[ConfiguredWidth]], groups: Mapping[str, Group], kept: Mapping[str, int]
) -> list[list[ConfiguredWidth]]:
    """Return the sets of widths that state all units which `keep` removes.

    Args:
        sets: widths that can be changed together.
        groups: the groups that may lose units, by name.
        kept: number of units that `keep` leaves, by name of the group.

    Raises:
        UsageError: no set states them.
    """
    cut = set(_cut_by_hand(groups, kept))
    with_value = [[width for width in widths if _has_value(width, groups, kept)] for widths in sets]
    found = [widths for widths in with_value if cut <= {name for width in widths for name in width.units}]
    if not found:
        raise UsageError(
            "The configuration cannot state all widths in `keep` at once.",
            f"`keep` removes units of {figures.listed([repr(name) for name in sorted(cut)])}, whose numbers cannot be "
            "changed together with these options.",
            "Name fewer widths in `keep`, remove `uniform`, or remove `loadable` and save the pruned model with "
            "kirsch.save.",
        )
    return found


def _has_value(width: ConfiguredWidth, groups: Mapping[str, Group], kept: Mapping[str, int]) -> bool:
    """Return whether a value of a width gives the numbers of units that `keep` sets."""
    try:
        kept_portions(width, groups, kept)
    except ValueError:
        return False
    return True


def _cut_by_hand(groups: Mapping[str, Group], kept: Mapping[str, int]) -> list[str]:
    """Return the names of the groups that lose units by `keep`."""
    return [name for name, number in kept.items() if name in groups and number < groups[name].size]


def _not_stated(name: str, widths: Sequence[ConfiguredWidth], number: int) -> UsageError:
    """Return the error for a group whose units `keep` removes, and that is in some widths, which have no such value."""
    what = f"`keep` leaves {figures.counted(number, 'unit')} of {name!r}, which the configuration cannot state."
    instead = "remove `loadable`, and save the pruned model with kirsch.save."
    if not widths:
        return UsageError(what, "No number of the configuration sets this width.", f"Change `keep`, or {instead}")
    width = min(widths, key=lambda width: (bool(width.refused), len(width.units)))
    numbers = ", ".join(width.values)
    if width.refused:
        return UsageError(what, f"{numbers} cannot be used: {width.refused}", f"Change `keep`, or {instead}")
    others = [f"{number} of {other!r}" for other, number in width.units.items() if other != name]
    why = f"A step of {numbers} removes {figures.counted(width.units[name], 'unit')} of {name!r}"
    why += f", {figures.listed(others)}." if others else "."
    return UsageError(what, why, f"Set a width for all of them that is a value of {numbers}, or {instead}")
