"""The methods of distillation that there are, and one of them in full."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from kirsch.cli.terminal import Line, Piece
from kirsch.distillation.catalog import losses, page, presets
from kirsch.distillation.losses import LOSSES
from kirsch.distillation.presets import PRESETS
from kirsch.errors import UnknownNameError

if TYPE_CHECKING:
    from kirsch.cli.terminal import Terminal


def methods(name: str, terminal: Terminal, *, markdown: bool) -> int:
    """Show all presets and losses, or what is written of those of one name.

    Raises:
        UnknownNameError: there is neither a preset nor a loss of this name.
    """
    found = {"presets": presets(), "losses": losses()}
    if markdown:
        terminal.result([[Piece(line)] for line in page().splitlines()], {"markdown": page(), **found})
        return 0
    if name:
        _show(name, found, terminal)
        return 0
    lines: list[Line] = [
        [Piece("presets", "strong"), Piece("   objective: NAME in a recipe, Objective.preset", "faint")]
    ]
    for one in found["presets"]:
        lines += [[Piece(f"  {one['name']:<20}{one['charged']}")], [Piece(f"  {'':<20}{one['what']}", "faint")]]
    lines += [[], [Piece("losses", "strong"), Piece("   of terms; kirsch methods NAME shows one in full", "faint")]]
    lines += [[Piece(f"  {one['name']:<20}{one['takes']:<11}"), Piece(one["what"], "faint")] for one in found["losses"]]
    terminal.result(lines, found)
    return 0


def _show(name: str, found: dict[str, list[dict[str, Any]]], terminal: Terminal) -> None:
    """Whatever has this name: a preset, a loss, or both."""
    lines: list[Line] = []
    for kind, registry in (("presets", PRESETS), ("losses", LOSSES)):
        for one in (one for one in found[kind] if one["name"] == name):
            lines += [[]] * bool(lines)
            what = one["charged"] if kind == "presets" else f"takes {one['takes']}"
            lines += [[Piece(f"{'preset' if kind == 'presets' else 'loss'} {name}", "strong"), Piece(f"   {what}")], []]
            lines += [[Piece(line)] for line in (inspect.getdoc(registry[name]) or "").splitlines()]
    if not lines:
        raise UnknownNameError("preset or loss", name, {one["name"] for kind in found.values() for one in kind})
    terminal.result(lines, {kind: [one for one in some if one["name"] == name] for kind, some in found.items()})
