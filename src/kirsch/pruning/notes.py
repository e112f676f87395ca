"""Notes on a plan that follow from the plan itself, and a plan whose figures and notes are those of what it removes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kirsch.graph.inputs import tensors
from kirsch.graph.plan import Goal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Plan

CLOSE = 0.01
"""How near below its goal a plan must land, as a fraction of the original."""

ALIGNED = 4
"""A width that this does not divide leaves the blocked layout of ONNX Runtime's convolutions.

Measured on x86: 63 channels take 1.6 times as long as 64, 7 times in a depthwise convolution.
"""

WHOLE = frozenset(["expert", "kv group", "head", "head in kv group", "conv group", "norm group", "block"])
"""Kinds whose number is that of whole parts, each of its own width; no runtime works on them in blocks."""


def renewed(plan: Plan, graph: Graph) -> Plan:
    """The plan with costs and notes computed anew from what it removes from a graph that it fits."""
    priced = plan.priced(graph)
    landing = landing_note(priced)
    fresh = [*missed_notes(priced), *([landing] if landing in plan.notes else []), *width_notes(priced)]
    return replace(priced, notes=tuple(fresh))


def changes(stated: Plan, counted: Plan) -> list[str]:
    """Return a note for each statement of a plan that differs from what was found when it was applied."""
    found = _cost_changes(stated, counted)
    if stated.model != counted.model:
        found.append(f"{stated.title} names the class {stated.model}; the model given is a {counted.model}.")
    if stated.configuration not in ({}, counted.configuration):
        result = (
            f"The model without the removed units has {_in_words(counted.configuration)}, which is used."
            if counted.configuration
            else "It does not describe the model without the removed units, and is not used."
        )
        found.append(f"{stated.title} states the configuration {_in_words(stated.configuration)}. {result}")
    return found


def _in_words(configuration: Mapping[str, float]) -> str:
    return ", ".join(f"{path}={number}" for path, number in configuration.items())


def _cost_changes(stated: Plan, counted: Plan) -> list[str]:
    if stated.before != counted.before:
        shapes = ", ".join("×".join(map(str, spec.shape)) for spec in tensors(counted.inputs))
        on = f"inputs of shape {shapes}" if shapes else "the inputs given"
        return [f"{stated.title} was made for other inputs; its costs are counted anew on {on}."]
    if stated.after == counted.after:
        return []
    was, now = stated.after, counted.after
    said = (
        f"{stated.title} was edited after it was made: it stated {was.parameters:,} parameters and {was.macs:,} MACs."
    )
    return [f"{said} What it removes leaves {now.parameters:,} and {now.macs:,}."]


def missed_notes(plan: Plan) -> list[str]:
    """Each limit of the goal that the plan misses, as a note."""
    if not plan.goal:
        return []
    reached = Goal(**plan.goal).fractions(plan.after, plan.before)
    return [
        f"The goal is missed: {name} are {value:.1%} of the original, and {limit:.1%} is asked for. Remove more units, "
        "or make a new plan."
        for name, (value, limit) in reached.items()
        if value > limit
    ]


def landing_note(plan: Plan) -> str:
    """Why a plan that was chosen for its goal lands far below it; empty where it lands near."""
    if not plan.goal or "round_to" not in plan.method:
        return ""
    reached = Goal(**plan.goal).fractions(plan.after, plan.before)
    name, (value, limit) = min(reached.items(), key=lambda item: item[1][1] - item[1][0])
    if limit - value <= CLOSE:
        return ""
    multiple = plan.method["round_to"]
    single = multiple == 1 or (multiple == "auto" and {removal.kind for removal in plan.groups} <= WHOLE)
    why = "A single unit of its groups costs that much." if single else f"round_to={multiple!r} rounds the widths."
    better = ([] if single else ["a smaller round_to"]) + (["uniform=False"] if plan.method.get("uniform") else [])
    fix = f" It may land nearer with {' or '.join(better)}." if better else ""
    return f"{name} land at {value:.1%}, {100 * (limit - value):.1f} points below the goal of {limit:.1%}. {why}{fix}"


def width_notes(plan: Plan) -> list[str]:
    """The widths that a plan leaves and that run slowly on some runtimes, as one note."""
    odd = [
        f"{removal.name} ({removal.size - len(removal.removed)})"
        for removal in plan.groups
        if removal.removed and removal.kind not in WHOLE and (removal.size - len(removal.removed)) % ALIGNED
    ]
    if not odd:
        return []
    more = f", and {len(odd) - 3} more" if len(odd) > 3 else ""  # noqa: PLR2004 - three are shown
    return [f"Widths that {ALIGNED} does not divide run slowly on some runtimes: {', '.join(odd[:3])}{more}."]
