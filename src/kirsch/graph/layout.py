"""Lines and tables that show a graph, a plan and its cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kirsch import figures
from kirsch.graph.cost_names import WORDS
from kirsch.tables import Cell, Line, Part, Piece, Table, notes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kirsch.graph.cost import Cost, GroupCost

LAYERS = 3
"""Number of tied layers that are named."""

BLOCKERS = 12
"""Number of blockers that are shown; JSON has all of them."""

BLOCKS = 6
"""Number of residual blocks that are named; JSON has all of them."""

OVERLAP = "A weight counts in the groups of both of its axes, so the groups add up to more than the model."

BAR = 24
"""Width of a bar in characters."""


class Reason(Protocol):
    """The parts of a `Blocker` that are shown."""

    @property
    def reason(self) -> str:
        """The reason in words."""

    @property
    def where(self) -> str:
        """Path of the module."""

    @property
    def source(self) -> str:
        """Line of the user's code."""

    @property
    def operation(self) -> str:
        """Name of the operation."""

    @property
    def share(self) -> float:
        """Fraction of the parameters that cannot be removed."""


@dataclass
class Node:
    """A module of the tree.

    Args:
        label: one name of the module path, or several names joined by dots.
        group_cost: the group with the name of this module, and its cost; None if there is no such group.
        children: label → node.
    """

    label: str
    group_cost: GroupCost | None = None
    children: dict[str, Node] = field(default_factory=dict)


def graph_parts(
    model: str,
    cost: Cost,
    shapes: Iterable[Sequence[int]],
    groups: Sequence[GroupCost],
    blocks: Sequence[str],
    blockers: Sequence[Reason],
) -> list[Part]:
    """Return a traced model: cost, groups as a tree of module paths, blocks and blockers.

    Args:
        model: class name of the model.
        cost: cost of the model.
        shapes: shapes of the example inputs.
        groups: the groups with their costs.
        blocks: paths of the residual blocks.
        blockers: reasons why parameters cannot be removed, the largest share first.
    """
    macs = f"{figures.count(cost.macs)} MACs for {inputs_text(shapes)}"
    size = f"   {figures.count(cost.parameters)} parameters   {macs}"
    parts: list[Part] = [[Piece(model, "strong"), Piece(size)], []]
    if groups:
        parts += [_tree(groups), []]
        if any(sum(getattr(group, name) for group in groups) > getattr(cost, name) for name in ("parameters", "macs")):
            parts += [[Piece(OVERLAP, "faint")], []]
    else:
        parts += [[Piece("no groups", "warning"), Piece("  no unit of this model can be removed")], []]
    if blocks:
        parts += [[Piece(f"residual blocks that can be removed: {figures.listed(blocks, BLOCKS)}")], []]
    return [*parts, *_blockers(blockers)]


def inputs_text(shapes: Iterable[Sequence[int]]) -> str:
    """Return the shapes of the example inputs, for which MACs and activations are counted, as text."""
    texts = ["×".join(map(str, shape)) for shape in shapes]
    return f"the input{'s' * (len(texts) > 1)} {', '.join(texts)}" if texts else "the example inputs"


def _tree(costs: Sequence[GroupCost]) -> Table:
    root = Node("")
    for cost in costs:
        node = root
        for part in cost.group.name.split("."):
            node = node.children.setdefault(part, Node(part))
        node.group_cost = cost
    rows: list[list[Cell]] = []
    for prefix, node in _walk(root):
        label: Cell = [Piece(prefix, "faint"), Piece(node.label)]
        if node.group_cost is None:
            rows.append([label])
            continue
        group = node.group_cost.group
        parameters, macs = (
            f"{figures.count(number):>6}" for number in (node.group_cost.parameters, node.group_cost.macs)
        )
        units = f"{group.size:>5} {_plural(group.kind)}"
        tied = Piece(_tied_layers_text(node.group_cost.tied_layers), "faint")
        rows.append([label, units, f"{parameters} parameters", f"{macs} MACs", tied])
    return Table(rows, gaps=(3,), first=0)


def _walk(node: Node, prefix: str = "", *, top: bool = True) -> Iterable[tuple[str, Node]]:
    """Yield (text before the label, node) of all nodes below a node, in the order of the lines."""
    children = [_joined(child) for child in node.children.values()]
    for child in children:
        last = child is children[-1]
        yield "" if top else prefix + ("└─ " if last else "├─ "), child
        yield from _walk(child, "" if top else prefix + ("   " if last else "│  "), top=False)


def _joined(node: Node) -> Node:
    """Return a node, joined with its child as long as it is not a group and has only one child."""
    while node.group_cost is None and len(node.children) == 1:
        (child,) = node.children.values()
        node = Node(f"{node.label}.{child.label}", child.group_cost, child.children)
    return node


def _plural(kind: str) -> str:
    first, space, rest = kind.partition(" in ")
    return f"{first}s{space}{rest}"


def _tied_layers_text(layers: Sequence[str]) -> str:
    return f"with {figures.listed(layers, LAYERS)}" if layers else ""


def _blockers(blockers: Sequence[Reason]) -> list[Part]:
    if not blockers:
        return [[Piece("no blockers", "good"), Piece("  only inputs and outputs are frozen")]]
    alike: dict[tuple[str, str, str], list[Reason]] = {}
    for blocker in blockers:
        alike.setdefault((blocker.reason, blocker.operation, blocker.source), []).append(blocker)
    shares = {key: sum(blocker.share for blocker in found) for key, found in alike.items()}
    largest = sorted(shares, key=lambda key: -shares[key])
    rows: list[list[Cell]] = [
        [
            f"{figures.percent(shares[key]):>8}",
            alike[key][0].where if len(alike[key]) == 1 else f"in {len(alike[key])} layers",
            key[0],
            Piece(f"{key[1]}  {key[2]}", "faint"),
        ]
        for key in largest[:BLOCKERS]
    ]
    title = "  reasons why parameters cannot be removed, with their share of all parameters"
    parts: list[Part] = [[Piece("blockers", "warning"), Piece(title)], Table(rows, gaps=(2,), first=0)]
    if len(largest) > BLOCKERS:
        more = f"{'':10}and {len(largest) - BLOCKERS} more; `blockers` of the graph and --json list all"
        parts.append([Piece(more, "faint")])
    return parts


def plan_parts(
    title: Line, sizes: Mapping[str, tuple[int, int]], blocks: Sequence[str], cost: Table, texts: Sequence[str]
) -> list[Part]:
    """Return a plan: a bar for each group, the removed blocks, the cost before and after, and the notes.

    Args:
        title: the first line.
        sizes: name of each group → (number of units, number of removed units). If blocks are removed, groups that
            keep all units are not shown: they may lie in a removed block.
        blocks: paths of the removed blocks.
        cost: the cost, as `cost_table` returns it.
        texts: the notes.
    """
    rows: list[list[Cell]] = []
    for name, (size, removed) in sizes.items():
        if blocks and not removed:
            continue
        kept = size - removed
        filled = max(1, round(BAR * kept / size))
        change = f"−{figures.percent(removed / size)}" if removed else "kept"
        bar = [Piece("█" * filled), Piece("░" * (BAR - filled), "faint")]
        rows.append([name, bar, f"{size:>5} → {kept:<5}", Piece(f"{change:>8}", "" if removed else "faint")])
    rows += [[path, "removed"] for path in blocks]
    return [title, [], Table(rows, gaps=(2,), first=0), [], cost, notes(texts)]


def cost_table(before: Cost, after: Cost, goal: Mapping[str, float], goal_of: Cost | None = None) -> Table:
    """Return the cost before and after, with the remaining share and the goal.

    Args:
        before, after: cost before and after.
        goal: limits of the cost.
        goal_of: cost that the limits are fractions of; None: the cost before.
    """
    rows: list[list[Cell]] = []
    old, new = before.to_dict(), after.to_dict()
    names = {"parameters": "parameters", "macs": "MACs", "activations": "activations"}
    for key, name in (names | {key: WORDS[key] for key in goal}).items():
        share = figures.percent(new[key] / max(old[key], 1))
        original = "original" if goal_of is None else "model before"
        row: list[Cell] = [
            name,
            f"{figures.count(old[key]):>6} → {figures.count(new[key]):<6}",
            f"{share:>7} of the {original}",
        ]
        if key in goal:
            reference = old[key] if goal_of is None else goal_of.to_dict()[key]
            met = new[key] <= goal[key] * reference
            verdict = f"goal {'met' if met else 'missed'}: ≤ {100 * goal[key]:g} %"
            verdict += "" if goal_of is None else f" of {figures.count(reference)}"
            row.append(Piece(verdict, "good" if met else "bad"))
        rows.append(row)
    return Table(rows, gaps=(1, 2, 3))


def method_text(method: Mapping[str, Any], *, of_blocks: bool) -> str:
    """Return the main options of a plan as one line.

    Args:
        method: the options, as a plan stores them; any of them may be missing.
        of_blocks: whether the plan removes blocks.
    """
    if not method:
        return ""
    importance, round_to = method.get("importance", ""), method.get("round_to", "auto")
    norm = f" (L{method['norm']})" if importance == "magnitude" and "norm" in method else ""
    parts = [f"{importance}{norm}{' of residual blocks' if of_blocks else ''}"]
    if not of_blocks:
        parts += [method["ranking"]] if "ranking" in method else []
        parts += ["round widths" if round_to == "auto" else f"widths in steps of {round_to}"]
        parts += ["uniform"] if method.get("uniform") else []
        parts += ["loadable"] if method.get("loadable") else []
    if method.get("keep"):
        parts += [f"by hand {', '.join(f'{layer}={amount}' for layer, amount in method['keep'].items())}"]
    parts += [f"drop at most {method['max_drop']:g}"] if method.get("max_drop") is not None else []
    for option, words in (("exclude", "without"), ("keep_outputs", "all outputs of")):
        parts += [f"{words} {', '.join(method[option])}"] if method.get(option) else []
    return ", ".join(parts)
