"""Notes on what the options `exclude` and `keep_outputs` of a plan cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.pruning.selection import exclusions

if TYPE_CHECKING:
    from kirsch.graph.graph import Graph
    from kirsch.pruning.options import PlanOptions

LAYERS = 3
"""Number of layers that a note names."""

INSTEAD = {
    "exclude": "keep_outputs in place of exclude keeps only the outputs of the layers, and lets their inputs shrink. ",
    "keep_outputs": "",
}
OUTPUTS = "The outputs of the model are always kept, without an exclusion."


def exclusion_notes(graph: Graph, options: PlanOptions) -> list[str]:
    """Return a note for each of the options `exclude` and `keep_outputs` that is used."""
    weights, notes = options.kind_weights, []
    found = exclusions(graph, options)
    kinds = {group.name: group.kind for group in graph.groups}
    for option, patterns in (("exclude", options.exclude), ("keep_outputs", options.keep_outputs)):
        kept = [name for name, why in found.items() if why.option == option and weights[kinds[name]] > 0]
        if kept:
            notes.append(f"{option}={list(patterns)} {_cost_of(graph, kept)}. {INSTEAD[option]}{OUTPUTS}")
        elif patterns and not any(why.option == option for why in found.values()):
            notes.append(f"{option}={list(patterns)} has no effect: no unit of these layers could go. {OUTPUTS}")
    return notes


def _cost_of(graph: Graph, names: list[str]) -> str:
    """Return a clause with the share of the cost of groups whose units are all kept, and their layers."""
    everything = {group.name: tuple(range(group.size)) for group in graph.groups}
    keep, without = graph.keep({}), graph.keep({name: everything[name] for name in names})
    full, less = graph.prices.by_owner(keep), graph.prices.by_owner(without)
    index, word = (1, "MACs") if graph.cost.macs else (0, "parameters")
    losses = {owner: full[owner][index] - less[owner][index] for owner in full}
    largest = sorted((owner for owner in losses if losses[owner] > 0), key=lambda owner: -losses[owner])
    total = sum(costs[index] for costs in full.values())
    more = f" and {len(largest) - LAYERS} more" if len(largest) > LAYERS else ""
    shown = ", ".join(f"`{owner or 'the model itself'}`" for owner in largest[:LAYERS])
    share = sum(losses.values()) / max(total, 1)
    return f"keeps units that hold {share:.1%} of the {word}, in the layers {shown}{more}"
