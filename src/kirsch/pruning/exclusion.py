"""Notes on what the options `exclude` and `keep_outputs` of a plan cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch import figures
from kirsch.graph.cost_names import WORDS
from kirsch.pruning.selection import removable_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.graph.cost import Cost
    from kirsch.graph.graph import Graph
    from kirsch.pruning.obstacles import Least
    from kirsch.pruning.options import PlanOptions

LAYERS = 3
"""Number of layers that a note names."""

INSTEAD = {
    "exclude": "keep_outputs in place of exclude keeps all outputs of the layers, but lets the layers lose inputs. ",
    "keep_outputs": "",
}
OUTPUTS = "The outputs of the model are always kept and need no exclusion."


def exclusion_notes(graph: Graph, options: PlanOptions, least: Callable[[PlanOptions], Least]) -> list[str]:
    """Return a note for each of the options `exclude` and `keep_outputs` that is used.

    Args:
        graph: graph of the model.
        options: options of the plan.
        least: takes options, and returns the least cost that plans with these options reach.
    """
    notes = []
    for option in ("exclude", "keep_outputs"):
        patterns = getattr(options, option)
        without = options.changed(**{option: ()})
        if patterns and len(removable_groups(graph, options)) == len(removable_groups(graph, without)):
            notes.append(f"{option}={list(patterns)} has no effect: these units are kept anyway. {OUTPUTS}")
        elif patterns:
            cost = _cost_of(graph, least(options), least(without))
            notes.append(f"{option}={list(patterns)} {cost}. {INSTEAD[option]}{OUTPUTS}")
    return notes


def _cost_of(graph: Graph, least: Least, otherwise: Least) -> str:
    """Return a clause with the layers that an exclusion keeps, and the least cost with and without the exclusion."""
    costs, smaller = graph.prices.by_owner(least.keep), graph.prices.by_owner(otherwise.keep)
    losses = {owner: [old - new for old, new in zip(costs[owner], smaller[owner], strict=True)] for owner in costs}
    by_macs = sorted((owner for owner in losses if any(losses[owner])), key=lambda owner: losses[owner][::-1])[::-1]
    if not by_macs:
        return "does not change the least cost that can be reached"
    return f"keeps units of the layers {_listed(by_macs)}: {_remaining(graph, least.cost, otherwise.cost)}"


def excluded_blocks_note(graph: Graph, exclude: Sequence[str], removable: Sequence[str]) -> str:
    """Return a note on the residual blocks that `exclude` keeps, and on their cost.

    Args:
        graph: graph of the model.
        exclude: the patterns of the option.
        removable: paths of the blocks that are not excluded.
    """
    kept, every_unit = [path for path in graph.blocks if path not in removable], graph.keep({})
    costs = (graph.prices.price(every_unit, paths) for paths in (removable, graph.blocks))
    return f"exclude={list(exclude)} keeps the blocks {_listed(kept)}: {_remaining(graph, *costs)}."


def _listed(names: Sequence[str]) -> str:
    """Return the first names of layers or blocks, and the number of the others."""
    return figures.listed([f"`{name or 'the model itself'}`" for name in names], LAYERS)


def _remaining(graph: Graph, least: Cost, otherwise: Cost) -> str:
    """Return a clause with the least cost with and without an exclusion, as fractions of the original."""
    words = {name: WORDS[name] for name in ("macs", "parameters") if getattr(graph.cost, name)}
    least_shares, shares = (
        {word: getattr(cost, name) / getattr(graph.cost, name) for name, word in words.items()}
        for cost in (least, otherwise)
    )
    remain = " and ".join(f"{share:.1%} of the {word}" for word, share in least_shares.items())
    instead = " and ".join(f"{share:.1%}" for share in shares.values())
    return f"at least {remain} remain, instead of {instead}"
