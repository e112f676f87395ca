"""Modules whose forward is a `torch.fx` graph: their operations run one by one, and their numbers can change.

Such are `torch.fx.GraphModule`s, of `symbolic_trace`, `torch.export`, feature extractors and Kirsch's own `as_graph`,
and the modules of `torch.export.unflatten`. The code of a `GraphModule` is generated from its graph, so an integer in
it, such as a size of a view, is an argument of a node, and a cut writes it there.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from kirsch.graph.expression import Leaf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.export import ExportedProgram
    from torch.fx import Node

NUMBERS = "graph."
"""How the attribute of a leaf begins that is an integer argument of a node; the name of the node follows."""

HELD_SHAPES = ("val", "example_value", "tensor_meta")
"""What a node remembers of the shapes that it was traced with."""


def graph_in(module: nn.Module) -> fx.Graph | None:
    """The graph that a module runs as its forward; None for a module whose forward is written in Python."""
    own = vars(module)
    return next((own[name] for name in ("_graph", "graph") if isinstance(own.get(name), fx.Graph)), None)


def _graphs_in(module: nn.Module) -> list[fx.Graph]:
    """The graph that a module runs first, then those that it keeps for another mode."""
    found = [graph_in(module), *(value for value in vars(module).values() if isinstance(value, fx.Graph))]
    return list(dict.fromkeys(graph for graph in found if graph is not None))


def shell_of(model: nn.Module) -> nn.Module:
    """A plain module with the state of a `GraphModule`; any other module as it is.

    `torch.export` runs the graph of a `GraphModule` itself and never calls its forward.
    """
    if not isinstance(model, fx.GraphModule):
        return model
    shell = nn.Module()
    vars(shell).update(vars(model))
    shell.forward = interpreting(shell, inspect.signature(model.forward))
    return shell


def interpreting(module: nn.Module, signature: inspect.Signature) -> Callable[..., Any]:
    """A forward that runs the graph of a module node by node."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).args
        return fx.Interpreter(module, graph=graph_in(module)).run(*given)

    return forward


def plant(module: nn.Module, path: str, planted: Callable[[int, Leaf], int]) -> None:
    """Replace the integers in the graph of a copied module, and mark the operations that each of its nodes makes.

    Args:
        module: a copy, with a graph.
        path: of the module in the model.
        planted: integer, the leaf that stands for it → what takes its place.
    """
    graph = graph_in(module)
    for node in graph.nodes if graph is not None else ():
        node.meta = {"custom": {"kirsch_node": (path, node.name)}}  # the operations that a node makes inherit this
        if node.op.startswith("call"):
            leaves = (Leaf(path, NUMBERS + node.name, place) for place in range(len(_numbers(node))))
            _replace(node, lambda value, leaves=leaves: planted(value, next(leaves)))  # type: ignore[misc]
    if isinstance(module, fx.GraphModule):
        module.forward = interpreting(module, inspect.signature(module.forward))


def _numbers(node: Node) -> list[int]:
    found: list[int] = []
    _replaced((node.args, node.kwargs), lambda value: found.append(value) or value)  # type: ignore[func-returns-value]
    return found


def _replace(node: Node, new: Callable[[int], int]) -> None:
    node.args, node.kwargs = _replaced((node.args, node.kwargs), new)


def _replaced(value: Any, new: Callable[[int], int]) -> Any:
    """A nested argument with each of its integers replaced, in a fixed order."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return new(value)
    if isinstance(value, slice):
        return slice(*(_replaced(part, new) for part in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: _replaced(part, new) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        parts = [_replaced(part, new) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def put_number(module: nn.Module, leaf: Leaf, value: int) -> None:
    """Give an integer argument of a node its new value, in the graphs for inference and for training."""
    name = leaf.attribute.removeprefix(NUMBERS)
    named = [next((node for node in graph.nodes if node.name == name), None) for graph in _graphs_in(module)]
    old = [_numbers(node) for node in named if node is not None]
    for node in named:
        if node is not None and _numbers(node) == old[0]:
            places = iter(range(len(old[0])))
            _replace(node, lambda held, places=places: value if next(places) == leaf.index else held)  # type: ignore[misc]


def renew(module: nn.Module) -> None:
    """Generate the code of a changed graph anew, and drop the shapes that it was traced with."""
    for graph in _graphs_in(module):
        for node in graph.nodes:
            for key in HELD_SHAPES:
                node.meta.pop(key, None)
    if isinstance(module, fx.GraphModule):
        module.recompile()


@dataclass(frozen=True)
class Part:
    """Nodes of a graph between an entry and an exit.

    Args:
        path: of the module whose graph it is.
        entry, exit: names of the nodes; the entry lies outside.
        nodes: names of the nodes of the part.
    """

    path: str
    entry: str
    exit: str
    nodes: frozenset[str]


def part_in(model: nn.Module, region: list[Node], entry: Node, exit_: Node) -> Part | None:
    """The part of a graph that made some operations of a traced program; None if that is not plain."""
    made_by = [_made_by(node) for node in region]
    paths = {made[0] for made in made_by if made is not None}
    end = _made_by(exit_)
    if None in made_by or len(paths) != 1 or end is None:
        return None
    (path,) = paths
    graph = graph_in(model.get_submodule(path))
    names = frozenset(made[1] for made in made_by if made is not None)
    nodes = {node.name: node for node in (graph.nodes if graph is not None else ())}
    given = {source for name in names for source in nodes[name].all_input_nodes if source.name not in names}
    start = _made_by(entry)
    first = start[1] if start is not None and start[0] == path else ""
    if not first:  # an input of the graph
        taken = [node.name for node in given if node.op == "placeholder"]
        first = taken[0] if len(taken) == 1 else ""
    out = nodes[end[1]]
    computing = {made[1] for node in exit_.graph.nodes if (made := _made_by(node)) is not None and made[0] == path}
    inner = {nodes[name] for name in names}
    for node in graph.nodes if graph is not None else ():  # sizes and places of tuples that the part reads itself
        if node.name not in computing and (inner - {out}).intersection(node.all_input_nodes):
            inner.add(node)
    leave = [node for node in inner if any(_reads(user, computing) and user not in inner for user in node.users)]
    if first not in {node.name for node in given} or leave != [out]:
        return None
    return Part(path, first, out.name, frozenset(node.name for node in inner))


def _reads(node: Node, computing: set[str]) -> bool:
    """Whether a node uses the values that it is given, and not only their sizes."""
    return node.op == "output" or node.name in computing


def _made_by(node: Node) -> tuple[str, str] | None:
    """Path of the module and name of the node in its graph that made an operation of a traced program."""
    found: tuple[str, str] | None = (node.meta.get("custom") or {}).get("kirsch_node")
    return found


@contextlib.contextmanager
def tapped(module: nn.Module, taps: Mapping[Part, Callable[[Any, Any], Any]]) -> Iterator[None]:
    """Run a module with a graph node by node, and give each tap the entry and the exit of its part.

    What a tap returns takes the place of the exit, unless it is None.
    """
    graph, signature, own = graph_in(module), inspect.signature(module.forward), vars(module).get("forward")
    ends = {part.exit: (part.entry, tap) for part, tap in taps.items()}
    entries = {part.entry for part in taps}

    class Tapped(fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            out = super().run_node(n)
            if n.name in ends:
                entry, tap = ends[n.name]
                new = tap(kept[entry], out)
                out = out if new is None else new
            if n.name in entries:
                kept[n.name] = out
            return out

    kept: dict[str, Any] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        return Tapped(module, graph=graph).run(*signature.bind(*args, **kwargs).args)

    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def without(module: nn.Module, parts: Sequence[Part]) -> None:
    """Take parts out of the graphs of a module: what reads their exits reads their entries."""
    for graph in _graphs_in(module):
        place = {node.name: number for number, node in enumerate(graph.nodes)}
        nodes = {node.name: node for node in graph.nodes}
        here = [part for part in parts if part.entry in nodes and part.exit in nodes]
        for part in sorted(here, key=lambda part: -place[part.exit]):  # the entry of one may be the exit of another
            nodes[part.exit].replace_all_uses_with(nodes[part.entry])
            for node in reversed(graph.nodes):
                if not node.users and (node.name in part.nodes or node.op == "get_attr"):
                    graph.erase_node(node)
    renew(module)


def owned(program: ExportedProgram, slots: dict[str, str]) -> None:
    """Note for each operation that a node of a graph made the module that it belongs to.

    A graph calls no containers. An operation that reads parameters belongs to the module that has them; any other lies
    beside the module of that source which was computed last, in the same container.
    """
    place = {node: number for number, node in enumerate(program.graph.nodes)}
    paths = [path.rpartition(".")[0].split(".") for path in slots.values()]
    containers = {".".join(parts[:end]) for parts in paths for end in range(1, len(parts))}
    owner: dict[Node, str] = {}
    beside: dict[Node, str] = {}
    for node in program.graph.nodes:
        made_by = _made_by(node)
        if made_by is None:
            continue
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        inner = str(stack[-1][0]) if stack else ""
        read = [slots[source.name].rpartition(".")[0] for source in node.all_input_nodes if source.name in slots]
        last = max((s for s in node.all_input_nodes if s in owner), key=place.__getitem__, default=None)
        if inner not in ("", made_by[0]) or read:
            owner[node] = inner if inner not in ("", made_by[0]) else read[0]
            beside[node] = owner[node] if owner[node] in containers else owner[node].rpartition(".")[0]
        else:
            source = None if last is None else _made_by(last)
            if last is None or source is None:
                near = made_by[0]
            elif source[0] == made_by[0]:
                near = beside[last]
            else:  # the graph of a module that this one calls
                near = source[0].rpartition(".")[0]
            owner[node] = beside[node] = near if near.startswith(made_by[0]) else made_by[0]
        parts = owner[node].split(".") if owner[node] else []
        stacked = ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]
        node.meta["nn_module_stack"] = {path: (path, "") for path in stacked}
