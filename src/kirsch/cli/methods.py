"""The subcommand methods: presets and losses of distillation."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from kirsch.distillation.catalog import losses, page, presets
from kirsch.distillation.losses import LOSSES
from kirsch.distillation.presets import PRESETS
from kirsch.errors import UnknownNameError
from kirsch.tables import Line, Piece

if TYPE_CHECKING:
    from kirsch.cli.terminal import Terminal


def methods(name: str, terminal: Terminal, *, markdown: bool) -> int:
    """Show all presets and losses, or the documentation of one name.

    Raises:
        UnknownNameError: neither a preset nor a loss has this name.
    """
    catalog = {"presets": presets(), "losses": losses()}
    if markdown:
        terminal.result([[Piece(line)] for line in page().splitlines()], {"markdown": page(), **catalog})
        return 0
    if name:
        _show(name, catalog, terminal)
        return 0
    lines: list[Line] = [
        [Piece("presets", "strong"), Piece("   objective: NAME in a recipe, Objective.preset(NAME) in Python", "faint")]
    ]
    for preset in catalog["presets"]:
        lines += [
            [Piece(f"  {preset['name']:<20}{preset['formula']}")],
            [Piece(f"  {'':<20}{preset['what']}", "faint")],
        ]
    lines += [
        [],
        [
            Piece("losses", "strong"),
            Piece("   for the terms of an objective; kirsch methods NAME shows the full documentation", "faint"),
        ],
    ]
    lines += [
        [Piece(f"  {loss['name']:<20}{loss['takes']:<11}"), Piece(loss["what"], "faint")] for loss in catalog["losses"]
    ]
    terminal.result(lines, catalog)
    return 0


def _show(name: str, catalog: dict[str, list[dict[str, Any]]], terminal: Terminal) -> None:
    """Show the preset or the loss of this name, or both."""
    lines: list[Line] = []
    for kind, registry in (("presets", PRESETS), ("losses", LOSSES)):
        for entry in (entry for entry in catalog[kind] if entry["name"] == name):
            lines += [[]] * bool(lines)
            what = entry["formula"] if kind == "presets" else f"takes {entry['takes']}"
            lines += [[Piece(f"{'preset' if kind == 'presets' else 'loss'} {name}", "strong"), Piece(f"   {what}")], []]
            lines += [[Piece(line)] for line in (inspect.getdoc(registry[name]) or "").splitlines()]
    if not lines:
        raise UnknownNameError(
            "preset or loss", name, {entry["name"] for entries in catalog.values() for entry in entries}
        )
    terminal.result(
        lines, {kind: [entry for entry in entries if entry["name"] == name] for kind, entries in catalog.items()}
    )
