"""Lines that show a graph as a tree, and a plan as bars."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kirsch.cli.terminal import Line, Piece
from kirsch.graph.inputs import tensors
from kirsch import figures

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.graph.plan import Plan, Removal

LAYERS = 3
"""Number of tied layers that are named."""

BLOCKERS = 12
"""Number of blockers that are shown; JSON has all of them."""

BLOCKS = 6
"""Number of residual blocks that are named; JSON has all of them."""

BAR = 24
"""Width of a bar in characters."""


@dataclass(frozen=True)
class GroupCost:
    """Cost of all units of a group.

    Args:
        group: the group.
        parameters, macs: cost that the model would lose without the units of the group.
    """

    group: Group
    parameters: int
    macs: int

    @property
    def tied_layers(self) -> tuple[str, ...]:
        """Layers of the group other than the layer that gives the group its name."""
        first = self.group.name.partition("#")[0]
        return tuple(layer or "the model itself" for layer in self.group.layers if layer != first)

    def to_dict(self) -> dict[str, Any]:
        """Return the group and its cost as JSON values."""
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


def group_costs(graph: Graph) -> list[GroupCost]:
    """Return the cost of each group of a graph. Groups share costs, so the sum exceeds the cost of the model."""
    total, costs = graph.cost, []
    for group in graph.groups:
        without = graph.prices.price(graph.keep({group.name: tuple(range(group.size))}))
        costs.append(GroupCost(group, total.parameters - without.parameters, total.macs - without.macs))
    return costs


@dataclass
class Node:
    """A module of the tree.

    Args:
        label: component of the module path, or several components joined by dots.
        group_cost: the group of this name, if there is one.
        children: label → node.
    """

    label: str
    group_cost: GroupCost | None = None
    children: dict[str, Node] = field(default_factory=dict)


def trace_lines(graph: Graph, costs: Sequence[GroupCost]) -> list[Line]:
    """Return the lines on a traced model: cost, groups as a tree of module paths, blocks and blockers."""
    cost = graph.cost
    shapes = ", ".join("×".join(str(size) for size in spec.shape) for spec in tensors(graph.inputs)) or "as given"
    lines = [
        [
            Piece(graph.model_name, "strong"),
            Piece(f"   {figures.count(cost.parameters)} parameters   {figures.count(cost.macs)} MACs   input {shapes}"),
        ],
        [],
    ]
    if costs:
        lines += [*_tree(costs), []]
    else:
        lines += [[Piece("no groups", "warning"), Piece("  no unit of this model can be removed")], []]
    return [*lines, *_blocks(graph), *_blockers(graph)]


def _blocks(graph: Graph) -> list[Line]:
    """Return the lines on residual blocks that can be removed."""
    if not graph.blocks:
        return []
    shown = ", ".join(graph.blocks[:BLOCKS])
    more = f" and {len(graph.blocks) - BLOCKS} more" if len(graph.blocks) > BLOCKS else ""
    return [[Piece(f"residual blocks that can be removed: {shown}{more}")], []]


def _tree(costs: Sequence[GroupCost]) -> list[Line]:
    root = Node("")
    for cost in costs:
        node = root
        for label in cost.group.name.split("."):
            node = node.children.setdefault(label, Node(label))
        node.group_cost = cost
    nodes = list(_walk(root))
    label_width = max(len(prefix) + len(node.label) for prefix, node in nodes)
    kind_width = max(len(cost.group.kind) for cost in costs) + 1
    lines = []
    for prefix, node in nodes:
        line = [Piece(prefix, "faint"), Piece(node.label)]
        if node.group_cost is not None:
            group = node.group_cost.group
            parameters, macs = (
                f"{figures.count(number):>6}" for number in (node.group_cost.parameters, node.group_cost.macs)
            )
            gap = " " * (label_width - len(prefix) - len(node.label))
            units = f"{group.size:>5} {_plural(group.kind):<{kind_width}}"
            line.append(Piece(f"{gap}   {units}   {parameters} parameters   {macs} MACs"))
            line.append(Piece(_tied_layers_text(node.group_cost.tied_layers), "faint"))
        lines.append(line)
    return lines


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
    if not layers:
        return ""
    more = f" + {len(layers) - LAYERS} more" if len(layers) > LAYERS else ""
    return f"   with {', '.join(layers[:LAYERS])}{more}"


def _blockers(graph: Graph) -> list[Line]:
    blockers = graph.blockers
    if not blockers:
        return [[Piece("no blockers", "good"), Piece("  only inputs and outputs are frozen")]]
    shown = blockers[:BLOCKERS]
    widths = [max(len(text) for text in texts) for texts in zip(*((b.where, b.reason) for b in shown), strict=True)]
    lines = [
        [
            Piece("blockers", "warning"),
            Piece("  reasons why parameters cannot be removed, with their share of all parameters"),
        ]
    ]
    for blocker in shown:
        head = f"{figures.percent(blocker.share):>8}  {blocker.where:<{widths[0]}}  {blocker.reason:<{widths[1]}}"
        lines.append([Piece(head), Piece(f"  {blocker.operation}  {blocker.source}", "faint")])
    if len(blockers) > BLOCKERS:
        lines.append([Piece(f"{'':10}and {len(blockers) - BLOCKERS} more; --json lists all", "faint")])
    return lines


def plan_lines(plan: Plan) -> list[Line]:
    """Return the lines on a plan: a bar for each group, the cost before and after, and the notes.

    A plan without its graph, as one from JSON, shows only the groups that lose units.
    """
    removed = {removal.name: len(removal.removed) for removal in plan.groups}
    groups: Sequence[Group | Removal] = plan.graph.groups if plan.graph is not None else plan.groups
    name_width = max((len(group.name) for group in groups), default=0)
    lines: list[Line] = [[Piece(plan.model, "strong"), Piece(f"   {_method(plan)}")], []]
    for group in groups:
        count = removed.get(group.name, 0)
        kept = group.size - count
        filled = max(1, round(BAR * kept / group.size))
        change = f"−{figures.percent(count / group.size)}" if count else "kept"
        lines.append(
            [
                Piece(f"{group.name:<{name_width}}  "),
                Piece("█" * filled),
                Piece("░" * (BAR - filled), "faint"),
                Piece(f"  {group.size:>5} → {kept:<5}  {change:>8}", "" if count else "faint"),
            ]
        )
    lines += [[Piece(f"{name}  "), Piece("removed")] for name in plan.without]
    return [*lines, [], *cost_lines(plan), *notes(plan.notes)]


def cost_lines(plan: Plan) -> list[Line]:
    """Return the lines on the cost before and after, with the remaining share and the goal."""
    goals = {"parameters": plan.goal.get("parameters"), "macs": plan.goal.get("macs")}
    lines = []
    before, after = plan.before.to_dict(), plan.after.to_dict()
    for key, name in (("parameters", "parameters"), ("macs", "MACs"), ("activations", "activations")):
        share = figures.percent(after[key] / max(before[key], 1))
        text = f"{name:<13}{figures.count(before[key]):>6} → {figures.count(after[key]):<6}  {share:>7} of the original"
        limit = goals.get(key)
        line = [Piece(text)]
        if limit is not None:
            met = after[key] <= limit * before[key]
            verdict = f"   goal {'met' if met else 'missed'}: ≤ {100 * limit:g} %"
            line.append(Piece(verdict, "good" if met else "bad"))
        lines.append(line)
    return lines


def notes(texts: Iterable[str]) -> list[Line]:
    """Return a line for each note."""
    return [[Piece(f"{'note':<13}", "warning"), Piece(text)] for text in texts]


def _method(plan: Plan) -> str:
    """Return the options of a plan that decide most, as one line."""
    method = plan.method
    if not method:
        return ""
    norm = f" (L{method['norm']})" if method["importance"] == "magnitude" and "norm" in method else ""
    parts = [f"{method['importance']}{norm}{' of residual blocks' if plan.blocks else ''}"]
    if not plan.blocks:
        round_to = method.get("round_to", "auto")
        parts += [method["ranking"]] if "ranking" in method else []
        parts += ["round widths" if round_to == "auto" else f"widths in steps of {round_to}"]
        parts += ["uniform"] if method.get("uniform") else []
    for option, words in (("exclude", "without"), ("keep_outputs", "all outputs of")):
        parts += [f"{words} {', '.join(method[option])}"] if method.get(option) else []
    return ", ".join(parts)
