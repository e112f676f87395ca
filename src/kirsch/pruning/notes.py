"""Notes on a plan, and the recomputation of its costs and notes from the units that it removes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kirsch import figures
from kirsch.graph.cost_names import WORDS
from kirsch.graph.facts import UNUSED
from kirsch.graph.inputs import tensors
from kirsch.graph.kinds import BLOCK, EXPERT, UNROUNDED_KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kirsch.graph.graph import Graph
    from kirsch.graph.plan import Plan
    from kirsch.pruning.options import PlanOptions

ON_OPTIONS = ("exclude=", "keep_outputs=", "kinds=", "max_drop=", "round_to=", "ranking=", "loadable=")
"""Beginnings of the notes on options, by which `with_recomputed_costs` recognizes and keeps them."""

CLOSE = 0.01
"""A plan that is below its goal by more than this fraction of the original cost gets a note."""

FAR = 0.1
"""A plan gets a note if it is below one limit of its goal by more than this fraction, because of another limit."""

ALIGNED = 4
"""ONNX Runtime cannot use its blocked layout of convolutions for widths that are not multiples of this number.

Measured on x86: 63 channels take 1.6 times as long as 64, and 7 times as long in a depthwise convolution.
"""


def with_recomputed_costs(plan: Plan, graph: Graph) -> Plan:
    """Return the plan with costs and notes recomputed from the units that it removes from the graph."""
    priced = plan.priced(graph)
    landing, met = landing_note(priced, graph), met_note(priced)
    on_options = [note for note in plan.notes if note.startswith(ON_OPTIONS)]
    notes = [*missed_notes(priced), *([met] if met else []), *([landing] if landing in plan.notes else [])]
    notes += [*width_notes(priced, graph), *unused_notes(priced, graph), *uncounted_notes(priced, graph), *on_options]
    return replace(priced, notes=tuple(notes))


def change_notes(stated: Plan, counted: Plan) -> list[str]:
    """Return a note for each value that a plan states and that differs from the value computed when it is applied."""
    notes = _cost_changes(stated, counted)
    if stated.model != counted.model:
        notes.append(f"{stated.title} names the class {stated.model}; the model given is a {counted.model}.")
    if stated.configuration not in ({}, counted.configuration):
        result = (
            f"The pruned model has {_configuration_text(counted.configuration)}, which is used."
            if counted.configuration
            else "This configuration does not describe the pruned model, and is not used."
        )
        notes.append(f"{stated.title} states the configuration {_configuration_text(stated.configuration)}. {result}")
    return notes


def _configuration_text(configuration: Mapping[str, float]) -> str:
    return ", ".join(f"{path}={number}" for path, number in configuration.items())


def _cost_changes(stated: Plan, counted: Plan) -> list[str]:
    if stated.before != counted.before:
        shapes = ", ".join("×".join(map(str, spec.shape)) for spec in tensors(counted.inputs))
        on = f"inputs of shape {shapes}" if shapes else "the inputs given"
        return [f"{stated.title} was made for other inputs; its costs are recomputed on {on}."]
    if stated.after == counted.after:
        return []
    old, new = stated.after, counted.after
    stated_cost = f"it states {old.parameters:,} parameters and {old.macs:,} MACs"
    new_cost = f"it leaves {new.parameters:,} parameters and {new.macs:,} MACs"
    return [f"{stated.title} was edited after it was made: {stated_cost}, and {new_cost}."]


def missed_notes(plan: Plan) -> list[str]:
    """Return a note for each limit of the goal that the plan misses."""
    if plan.limits is None:
        return []
    reached = plan.limits.fractions(plan.after, plan.before)
    return [
        f"The goal is missed: {WORDS[name]} are {value:.1%} of the original, above the goal of {limit:.1%}. Remove "
        "more units, or make a new plan."
        for name, (value, limit) in reached.items()
        if value > limit
    ]


def met_note(plan: Plan) -> str:
    """Return a note if the model has met the goal before the plan; empty otherwise."""
    if plan.limits is None or not plan.needs_nothing:
        return ""
    fractions = plan.limits.fractions(plan.before, plan.before)
    reached = [
        f"{WORDS[name]} are {value:.1%}, the goal is {limit:.1%} or less" for name, (value, limit) in fractions.items()
    ]
    return f"The goal is met before this plan, which removes nothing: {' and '.join(reached)}."


def landing_note(plan: Plan, graph: Graph) -> str:
    """Return a note with the reason why a plan is far below a limit of its goal; empty if it is close to all limits."""
    if plan.limits is None or not (plan.groups or plan.blocks) or "round_to" not in plan.method:
        return ""
    reached = plan.limits.fractions(plan.after, plan.before)
    below = {name: limit - value for name, (value, limit) in reached.items()}
    closest, farthest = min(below, key=lambda name: below[name]), max(below, key=lambda name: below[name])
    if below[closest] > CLOSE:
        return f"{_distance_text(closest, *reached[closest])}. {_landing_reason(plan, graph, closest)}"
    if below[farthest] > FAR:
        return f"{_distance_text(farthest, *reached[farthest])}, because of the goal on the {WORDS[closest]}."
    return ""


def _distance_text(name: str, value: float, limit: float) -> str:
    distance = f"{100 * (limit - value):.1f} points below the goal of {limit:.1%}"
    return f"{WORDS[name]} are {value:.1%} of the original, {distance}"


def _landing_reason(plan: Plan, graph: Graph, name: str) -> str:
    """Return why a plan is far below its goal, and the options that may come closer."""
    if plan.blocks and not plan.groups:
        return "Only whole blocks are removed, and the goal would be missed if one of them were kept."
    if plan.method.get("keep"):
        return "The widths in `keep` are fixed, and no unit of another layer can be restored without missing the goal."
    multiple = plan.method["round_to"]
    single = multiple == 1 or (multiple == "auto" and {removal.kind for removal in plan.groups} <= UNROUNDED_KINDS)
    why = _next_cost(plan, graph, name) if single else f"round_to={multiple!r} rounds the widths."
    better = ([] if single else ["a smaller round_to"]) + (["uniform=False"] if plan.method.get("uniform") else [])
    fix = f" The plan may come closer with {' or '.join(better)}." if better else ""
    return f"{why}{fix}"


def _next_cost(plan: Plan, graph: Graph, name: str) -> str:
    """Return the least cost of the plans with one unit more, and why no plan between them was chosen."""
    if plan.limits is None or not plan.groups or plan.method.get("uniform") or plan.method.get("loadable"):
        return "Restoring any unit misses the goal."
    removed = {removal.name: removal.removed for removal in plan.groups}
    without = [block.name for block in plan.blocks]
    costs = {
        group: plan.limits.fractions(
            graph.prices.price(graph.keep({**removed, group: units[:-1]}), without), plan.before
        )[name][0]
        for group, units in removed.items()
        if units
    }
    group = min(costs, key=lambda group: costs[group])
    return (
        f"With one unit more, they are at least {costs[group]:.1%} (`{group}`). Exchanging units between layers comes "
        "no closer, or removes far more important units."
    )


def width_notes(plan: Plan, graph: Graph) -> list[str]:
    """Return a note on the layers whose outputs get a width that runs slowly on some runtimes."""
    removed, keep = {removal.name for removal in plan.groups if removal.removed}, plan.keep(graph)
    widths: dict[str, int] = {}
    for group in (group for group in graph.groups if group.name in removed):
        inputs = set(graph.input_axes(group))
        for key in group.footprint:
            labels, shape = graph.axes[key], graph.tensors[key[0]].shape
            of_units = group.kind in UNROUNDED_KINDS and len(labels) == group.size  # such as experts, not channels
            if key not in inputs and len(shape) > 1 and not of_units:
                layer = key[0].rpartition(".")[0] or key[0]
                widths[layer] = int(keep[graph.coupling.component[labels]].sum())
    unaligned = [f"`{layer}` ({width})" for layer, width in widths.items() if width % ALIGNED]
    if not unaligned:
        return []
    names = figures.listed(unaligned)
    return [f"Output widths that are not multiples of {ALIGNED} run slowly on some runtimes: {names}."]


def absent_kind_notes(graph: Graph, options: PlanOptions) -> list[str]:
    """Return a note for each kind in the options `kinds` and `round_to` that no group of the model has.

    This is not an error, because a recipe may be used for several models.
    """
    return [
        f"{option}={kind!r} has no effect: {_absent_kind(graph, kind)}"
        for option in ("kinds", "round_to")
        if not isinstance(getattr(options, option), (int, str))
        for kind in getattr(options, option) or ()
        if kind not in {BLOCK, *(group.kind for group in graph.groups)}
    ]


def _absent_kind(graph: Graph, kind: str) -> str:
    """Return a sentence that the model has no units of a kind, with the kinds that it has."""
    kinds = ", ".join(sorted({group.kind for group in graph.groups}))
    hint = ' Experts can only be removed after kirsch.trace(..., softmax="kept").'
    needs_hint = kind == EXPERT and graph.tracing.softmax == "freeze"
    return f"{graph.model_name} has no units of this kind. Its kinds of units: {kinds}.{hint if needs_hint else ''}"


def unused_notes(plan: Plan, graph: Graph) -> list[str]:
    """Return a note on the layers that the traced forward pass does not use, if the plan removes units.

    A pruned traced program has no note, because it only contains the operations of the trace.
    """
    unused = [name for name in graph.parameters if any(freeze.reason == UNUSED for freeze in graph.frozen_by(name))]
    if not unused or graph.tracing.as_graph or not any(removal.removed for removal in plan.groups):
        return []
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in unused))
    names = figures.listed([f"`{layer}`" for layer in layers])
    note = (
        f"The traced forward pass does not use {names}, whose sizes are kept. Code that uses these layers, such "
        "as a branch for other inputs or another method, can fail on the pruned model, and is not verified. Exclude "
        "the layers whose outputs they read, or give example inputs that use them."
    )
    return [note]


def uncounted_notes(plan: Plan, graph: Graph) -> list[str]:
    """Return a note on the operations whose MACs are not in the cost, if the goal of the plan limits the MACs."""
    if "macs" not in plan.goal or not graph.facts.uncounted:
        return []
    operations = graph.facts.uncounted
    found = list(dict.fromkeys(f"`{op.name}` ({op.source or op.module or 'the model itself'})" for op in operations))
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""  # noqa: PLR2004 - three are shown
    note = (
        f"The MACs of {', '.join(found[:3])}{more} cannot be counted, and are 0 in the costs. The true cost can be "
        "higher and miss the goal on MACs. Set a goal on parameters, or measure the latency."
    )
    return [note]


def too_few_units(title: str, axis: tuple[str, int], least: int) -> str:
    """Return a sentence on a parameter axis that would lose too many units; see `Graph.too_small`."""
    name, dim = axis
    if least == 1:
        return f"{title} would leave no unit on axis {dim} of {name!r}."
    return f"{title} would leave fewer than {least} units on axis {dim} of {name!r}, and an operation needs {least}."
