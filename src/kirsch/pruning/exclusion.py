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
    "exclude": "keep_outputs in place of exclude keeps all outputs of the layers, but lets the layers lose inputs. ",
    "keep_outputs": "",
}
OUTPUTS = "The outputs of the model are always kept and need no exclusion."


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
            notes.append(f"{option}={list(patterns)} has no effect: these units are kept anyway. {OUTPUTS}")
    return notes


def _cost_of(graph: Graph, names: list[str]) -> str:
    """Return a clause with the share of the cost of groups whose units are all kept, and their layers."""
    everything = {group.name: tuple(range(group.size)) for group in graph.groups}
    keep, without = graph.keep({}), graph.keep({name: everything[name] for name in names})
    full, less = graph.prices.by_owner(keep), graph.prices.by_owner(without)
    losses = {owner: [old - new for old, new in zip(costs, less[owner], strict=True)] for owner, costs in full.items()}
    parameters, macs = (sum(loss[index] for loss in losses.values()) for index in range(2))
    shares = [f"{macs / graph.cost.macs:.1%} of the MACs"] if graph.cost.macs else []
    shares.append(f"{parameters / max(graph.cost.parameters, 1):.1%} of the parameters")
    by_macs = sorted((owner for owner in losses if any(losses[owner])), key=lambda owner: losses[owner][::-1])[::-1]
    more = f" and {len(by_macs) - LAYERS} more" if len(by_macs) > LAYERS else ""
    shown = ", ".join(f"`{owner or 'the model itself'}`" for owner in by_macs[:LAYERS])
    return f"keeps units that hold {' and '.join(shares)}, in the layers {shown}{more}"
