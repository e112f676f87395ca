"""A graph as a tree, a plan as bars."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kirsch.cli.terminal import Line, Piece
from kirsch.graph.inputs import tensors
from kirsch.report import figures

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.graph.plan import Plan

LAYERS = 3
"""Layers that go along are named up to this number."""

BLOCKERS = 12
"""Blockers are shown up to this number; JSON has them all."""

BLOCKS = 6
"""Residual blocks are named up to this number; JSON has them all."""

BAR = 24
"""Characters of a bar."""


@dataclass(frozen=True)
class Hanging:
    """What hangs on a group: what the model would lose with all of its units.

    Args:
        group: the units.
        parameters, macs: that would go.
    """

    group: Group
    parameters: int
    macs: int

    @property
    def others(self) -> tuple[str, ...]:
        """The layers that go along with the one that the group is named after."""
        own = self.group.name.partition("#")[0]
        return tuple(layer or "the model itself" for layer in self.group.layers if layer != own)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        group = self.group
        return {
            "name": group.name,
            "kind": group.kind,
            "units": group.size,
            "parameters": self.parameters,
            "macs": self.macs,
            "layers": list(group.layers),
            "footprint": [[name, axis] for name, axis in group.footprint],
        }


def hanging(graph: Graph) -> list[Hanging]:
    """What hangs on each group of a graph. Groups share costs, so the sum is more than the model."""
    whole, out = graph.cost, []
    for group in graph.groups:
        without = graph.prices.price(graph.keep({group.name: tuple(range(group.size))}))
        out.append(Hanging(group, whole.parameters - without.parameters, whole.macs - without.macs))
    return out


@dataclass
class Node:
    """A module of the tree.

    Args:
        label: what stands between the points of its path.
        found: the group of that name, if there is one.
        below: label → node.
    """

    label: str
    found: Hanging | None = None
    below: dict[str, Node] = field(default_factory=dict)


def trace_lines(graph: Graph, found: Sequence[Hanging]) -> list[Line]:
    """A traced model: what it costs, its groups as a tree by module path, and what blocks the rest."""
    cost = graph.cost
    shapes = ", ".join("×".join(str(size) for size in spec.shape) for spec in tensors(graph.inputs)) or "as given"
    lines = [
        [
            Piece(graph.model_name, "strong"),
            Piece(f"   {figures.count(cost.parameters)} parameters   {figures.count(cost.macs)} MACs   input {shapes}"),
        ],
        [],
    ]
    if found:
        lines += [*_tree(found), []]
    else:
        lines += [[Piece("no groups", "doubt"), Piece("  nothing of this model may go")], []]
    return [*lines, *_blocks(graph), *_blockers(graph)]


def _blocks(graph: Graph) -> list[Line]:
    """What may be left out as a whole."""
    if not graph.blocks:
        return []
    shown = ", ".join(graph.blocks[:BLOCKS])
    more = f" and {len(graph.blocks) - BLOCKS} more" if len(graph.blocks) > BLOCKS else ""
    return [[Piece(f"residual blocks that may be left out: {shown}{more}")], []]


def _tree(found: Sequence[Hanging]) -> list[Line]:
    root = Node("")
    for hangs in found:
        node = root
        for label in hangs.group.name.split("."):
            node = node.below.setdefault(label, Node(label))
        node.found = hangs
    drawn = list(_walk(root))
    reach = max(len(stem) + len(node.label) for stem, node in drawn)
    kinds = max(len(hangs.group.kind) for hangs in found) + 1
    lines = []
    for stem, node in drawn:
        line = [Piece(stem, "faint"), Piece(node.label)]
        if node.found is not None:
            group, costs = node.found.group, (node.found.parameters, node.found.macs)
            parameters, macs = (f"{figures.count(cost):>6}" for cost in costs)
            gap = " " * (reach - len(stem) - len(node.label))
            units = f"{group.size:>5} {_plural(group.kind):<{kinds}}"
            line.append(Piece(f"{gap}   {units}   {parameters} parameters   {macs} MACs"))
            line.append(Piece(_along(node.found.others), "faint"))
        lines.append(line)
    return lines


def _walk(node: Node, stem: str = "", *, top: bool = True) -> Iterable[tuple[str, Node]]:
    """(what is drawn before the label, node) of all nodes below one, from above."""
    children = [_joined(child) for child in node.below.values()]
    for child in children:
        last = child is children[-1]
        yield "" if top else stem + ("└─ " if last else "├─ "), child
        yield from _walk(child, "" if top else stem + ("   " if last else "│  "), top=False)


def _joined(node: Node) -> Node:
    """A node, joined with the only one below it as long as there is just one and no group of its own."""
    while node.found is None and len(node.below) == 1:
        (child,) = node.below.values()
        node = Node(f"{node.label}.{child.label}", child.found, child.below)
    return node


def _plural(kind: str) -> str:
    first, space, rest = kind.partition(" in ")
    return f"{first}s{space}{rest}"


def _along(layers: Sequence[str]) -> str:
    if not layers:
        return ""
    more = f" + {len(layers) - LAYERS} more" if len(layers) > LAYERS else ""
    return f"   with {', '.join(layers[:LAYERS])}{more}"


def _blockers(graph: Graph) -> list[Line]:
    blockers = graph.blockers
    if not blockers:
        return [[Piece("no blockers", "good"), Piece("  only inputs and outputs hold anything")]]
    shown = blockers[:BLOCKERS]
    widths = [max(len(text) for text in texts) for texts in zip(*((b.where, b.reason) for b in shown), strict=True)]
    lines = [
        [Piece("blockers", "doubt"), Piece("  what keeps parameters from going, by the share of them that it holds")]
    ]
    for blocker in shown:
        head = f"{figures.percent(blocker.share):>8}  {blocker.where:<{widths[0]}}  {blocker.reason:<{widths[1]}}"
        lines.append([Piece(head), Piece(f"  {blocker.operation}  {blocker.source}", "faint")])
    if len(blockers) > BLOCKERS:
        lines.append([Piece(f"{'':10}and {len(blockers) - BLOCKERS} more; --json lists them all", "faint")])
    return lines


def plan_lines(plan: Plan, graph: Graph) -> list[Line]:
    """A plan: a bar for each group of the graph, the cost before and after, and the plan's notes."""
    going = {removal.name: len(removal.removed) for removal in plan.groups}
    reach = max((len(group.name) for group in graph.groups), default=0)
    lines: list[Line] = [[Piece(plan.model, "strong"), Piece(f"   {_method(plan)}")], []]
    for group in graph.groups:
        gone = going.get(group.name, 0)
        kept = group.size - gone
        filled = max(1, round(BAR * kept / group.size))
        change = f"−{figures.percent(gone / group.size)}" if gone else "kept"
        lines.append(
            [
                Piece(f"{group.name:<{reach}}  "),
                Piece("█" * filled),
                Piece("░" * (BAR - filled), "faint"),
                Piece(f"  {group.size:>5} → {kept:<5}  {change:>8}", "" if gone else "faint"),
            ]
        )
    lines += [[Piece(f"{name}  "), Piece("left out")] for name in plan.without]
    return [*lines, [], *cost_lines(plan), *notes(plan.notes)]


def cost_lines(plan: Plan) -> list[Line]:
    """Cost before and after, with the share that is left and the share that was asked for."""
    wanted = {"parameters": plan.goal.get("params"), "macs": plan.goal.get("macs")}
    lines = []
    before, after = plan.before.to_dict(), plan.after.to_dict()
    for key, name in (("parameters", "parameters"), ("macs", "MACs"), ("activations", "activations")):
        share = figures.percent(after[key] / max(before[key], 1))
        text = f"{name:<13}{figures.count(before[key]):>6} → {figures.count(after[key]):<6}  {share:>7} of the original"
        limit = wanted.get(key)
        line = [Piece(text)]
        if limit is not None:
            met = after[key] <= limit * before[key]
            said = f"   goal {'met' if met else 'missed'}: ≤ {100 * limit:g} %"
            line.append(Piece(said, "good" if met else "bad"))
        lines.append(line)
    return lines


def notes(texts: Iterable[str]) -> list[Line]:
    """A line for each note."""
    return [[Piece(f"{'note':<13}", "doubt"), Piece(text)] for text in texts]


def _method(plan: Plan) -> str:
    method = plan.method
    if not method:
        return ""
    importance = (
        f"{method['importance']} (L{method['norm']})" if method["importance"] == "magnitude" else method["importance"]
    )
    excluded = f", without {', '.join(method['exclude'])}" if method.get("exclude") else ""
    if "round_to" not in method:
        return f"{importance} of residual blocks{excluded}"
    widths = "round widths" if method["round_to"] == "auto" else f"widths in steps of {method['round_to']}"
    alike = ", layers alike" if method.get("uniform") else ""
    return f"{importance}, {method['scope']}, {widths}{alike}{excluded}"
