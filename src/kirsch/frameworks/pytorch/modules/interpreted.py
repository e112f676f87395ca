"""Modules whose `forward` is a `torch.fx` graph: run them node by node, and change the integers in their nodes.

`torch.fx.GraphModule`s come from `symbolic_trace`, `torch.export`, feature extractors and `as_graph` of Kirsch; the
modules of `torch.export.unflatten` have a graph, too. The code of a `GraphModule` is generated from its graph. An
integer in the graph, such as a size of a view, is an argument of a node, and a cut updates this argument.
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
"""Prefix of `Leaf.attribute` for an integer argument of a node; the name of the node follows."""

TRACED_SHAPES = ("val", "example_value", "tensor_meta")
"""Keys of `node.meta` with the shapes of the trace."""


def graph_in(module: nn.Module) -> fx.Graph | None:
    """Return the graph that a module runs as its `forward`; None if `forward` is Python code."""
    attributes = vars(module)
    return next((attributes[name] for name in ("_graph", "graph") if isinstance(attributes.get(name), fx.Graph)), None)


def _graphs_in(module: nn.Module) -> list[fx.Graph]:
    """Return the graph that a module runs, followed by graphs that it stores for another mode."""
    graphs = [graph_in(module), *(value for value in vars(module).values() if isinstance(value, fx.Graph))]
    return list(dict.fromkeys(graph for graph in graphs if graph is not None))


def plain_module_of(model: nn.Module) -> nn.Module:
    """Return a plain module with the state of a `GraphModule`, and any other module unchanged.

    `torch.export` runs the graph of a `GraphModule` directly and would not call the replaced `forward`.
    """
    if not isinstance(model, fx.GraphModule):
        return model
    shell = nn.Module()
    vars(shell).update(vars(model))
    shell.forward = interpreting(shell, inspect.signature(model.forward))
    return shell


def interpreting(module: nn.Module, signature: inspect.Signature) -> Callable[..., Any]:
    """Return a `forward` function that runs the graph of a module node by node."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return fx.Interpreter(module, graph=graph_in(module)).run(*signature.bind(*args, **kwargs).args)

    return forward


def replace_integers(module: nn.Module, path: str, replacement: Callable[[int, Leaf], int]) -> None:
    """Replace the integers in the graph of a copied module, and mark its nodes by path and name.

    Args:
        module: the copy.
        path: path of the module in the model.
        replacement: function of an integer and its leaf that returns the replacement.
    """
    graph = graph_in(module)
    for node in graph.nodes if graph is not None else ():
        node.meta = {"custom": {"kirsch_node": (path, node.name)}}  # traced operations of the node inherit this
        if node.op.startswith("call"):
            leaves = (Leaf(path, NUMBERS + node.name, place) for place in range(len(_numbers(node))))
            _replace(node, lambda value, leaves=leaves: replacement(value, next(leaves)))  # type: ignore[misc]
    if isinstance(module, fx.GraphModule):
        module.forward = interpreting(module, inspect.signature(module.forward))


def _numbers(node: Node) -> list[int]:
    numbers: list[int] = []
    _replaced((node.args, node.kwargs), lambda value: numbers.append(value) or value)  # type: ignore[func-returns-value]
    return numbers


def _replace(node: Node, new: Callable[[int], int]) -> None:
    node.args, node.kwargs = _replaced((node.args, node.kwargs), new)


def _replaced(value: Any, new: Callable[[int], int]) -> Any:
    """Return a nested argument with each integer replaced, in a fixed order."""
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


def set_integer(module: nn.Module, leaf: Leaf, value: int) -> None:
    """Set an integer argument of a node, in the graphs for inference and for training."""
    name = leaf.attribute.removeprefix(NUMBERS)
    nodes = [node for graph in _graphs_in(module) for node in graph.nodes if node.name == name]
    old = [_numbers(node) for node in nodes]
    for node in nodes:
        if _numbers(node) == old[0]:
            indices = iter(range(len(old[0])))
            _replace(node, lambda number, indices=indices: value if next(indices) == leaf.index else number)  # type: ignore[misc]


def refresh_graphs(module: nn.Module) -> None:
    """Regenerate the code of changed graphs, and delete the shapes of their trace."""
    for graph in _graphs_in(module):
        for node in graph.nodes:
            for key in TRACED_SHAPES:
                node.meta.pop(key, None)
    if isinstance(module, fx.GraphModule):
        module.recompile()


@dataclass(frozen=True)
class Part:
    """Nodes of a graph between an entry and an exit.

    Args:
        path: path of the module with the graph.
        entry: name of the node before the part.
        exit: name of the last node of the part.
        nodes: names of the nodes of the part.
    """

    path: str
    entry: str
    exit: str
    nodes: frozenset[str]


def part_in(model: nn.Module, region: list[Node], entry: Node, exit_: Node) -> Part | None:
    """Return the part of a module's graph that corresponds to some operations of the traced program.

    None if the operations come from more than one module, or the part has more than one exit.

    Args:
        model: the traced model.
        region: operations of the traced program.
        entry, exit_: the operation before the region, and the last operation of the region.
    """
    origins = [_origin(node) for node in region]
    paths = {origin[0] for origin in origins if origin is not None}
    end = _origin(exit_)
    if None in origins or len(paths) != 1 or end is None:
        return None
    (path,) = paths
    graph = graph_in(model.get_submodule(path))
    names = frozenset(origin[1] for origin in origins if origin is not None)
    nodes = {node.name: node for node in (graph.nodes if graph is not None else ())}
    inputs = {source for name in names for source in nodes[name].all_input_nodes if source.name not in names}
    start = _origin(entry)
    entry_name = start[1] if start is not None and start[0] == path else ""
    if not entry_name:  # the entry is an input of the graph
        placeholders = [node.name for node in inputs if node.op == "placeholder"]
        entry_name = placeholders[0] if len(placeholders) == 1 else ""
    out = nodes[end[1]]
    traced = {o[1] for node in exit_.graph.nodes if (o := _origin(node)) is not None and o[0] == path}
    inner = {nodes[name] for name in names}
    for node in graph.nodes if graph is not None else ():  # sizes and tuple items of the part, which are not traced
        if node.name not in traced and (inner - {out}).intersection(node.all_input_nodes):
            inner.add(node)
    exits = [node for node in inner if any(_uses_values(user, traced) and user not in inner for user in node.users)]
    if entry_name not in {node.name for node in inputs} or exits != [out]:
        return None
    return Part(path, entry_name, out.name, frozenset(node.name for node in inner))


def _uses_values(node: Node, traced: set[str]) -> bool:
    """Return whether a node uses the values of its inputs, and not only their sizes."""
    return node.op == "output" or node.name in traced


def _origin(node: Node) -> tuple[str, str] | None:
    """Return the path of the module and the name of its graph node from which a traced operation comes."""
    origin: tuple[str, str] | None = (node.meta.get("custom") or {}).get("kirsch_node")
    return origin


@contextlib.contextmanager
def tapped(module: nn.Module, taps: Mapping[Part, Callable[[Any, Any], Any]]) -> Iterator[None]:
    """Within the `with` block, run the graph of a module node by node, and call a function for each part.

    The arguments of the function are the values of the entry and the exit of the part. The result of the function
    replaces the value of the exit, unless it is None.
    """
    graph, signature, forward_before = graph_in(module), inspect.signature(module.forward), vars(module).get("forward")
    ends = {part.exit: (part.entry, tap) for part, tap in taps.items()}
    entries = {part.entry for part in taps}

    class Tapped(fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            out = super().run_node(n)
            if n.name in ends:
                entry, tap = ends[n.name]
                replacement = tap(entry_values[entry], out)
                out = out if replacement is None else replacement
            if n.name in entries:
                entry_values[n.name] = out
            return out

    entry_values: dict[str, Any] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        return Tapped(module, graph=graph).run(*signature.bind(*args, **kwargs).args)

    module.forward = forward
    try:
        yield
    finally:
        if forward_before is None:
            del module.forward
        else:
            module.forward = forward_before


def remove_parts(module: nn.Module, parts: Sequence[Part]) -> None:
    """Remove parts from the graphs of a module. The users of an exit use the entry instead."""
    for graph in _graphs_in(module):
        position = {node.name: number for number, node in enumerate(graph.nodes)}
        nodes = {node.name: node for node in graph.nodes}
        in_graph = [part for part in parts if part.entry in nodes and part.exit in nodes]
        # The last part is removed first, because its entry may be the exit of an earlier part.
        for part in sorted(in_graph, key=lambda part: -position[part.exit]):
            nodes[part.exit].replace_all_uses_with(nodes[part.entry])
            for node in reversed(graph.nodes):
                if not node.users and (node.name in part.nodes or node.op == "get_attr"):
                    graph.erase_node(node)
    refresh_graphs(module)


def assign_modules(program: ExportedProgram, slots: dict[str, str]) -> None:
    """Set `nn_module_stack` of operations from a `torch.fx` graph, which calls layers without their containers.

    An operation that reads parameters is assigned to the module with these parameters. Any other operation is assigned
    to the container of its latest input.
    """
    position = {node: number for number, node in enumerate(program.graph.nodes)}
    paths = [path.rpartition(".")[0].split(".") for path in slots.values()]
    containers = {".".join(parts[:end]) for parts in paths for end in range(1, len(parts))}
    owner: dict[Node, str] = {}
    container: dict[Node, str] = {}
    for node in program.graph.nodes:
        origin = _origin(node)
        if origin is None:
            continue
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        inner = str(stack[-1][0]) if stack else ""
        read = [slots[source.name].rpartition(".")[0] for source in node.all_input_nodes if source.name in slots]
        latest = max((s for s in node.all_input_nodes if s in owner), key=position.__getitem__, default=None)
        if inner not in ("", origin[0]) or read:
            owner[node] = inner if inner not in ("", origin[0]) else read[0]
            container[node] = owner[node] if owner[node] in containers else owner[node].rpartition(".")[0]
        else:
            source = None if latest is None else _origin(latest)
            if latest is None or source is None:
                nearest = origin[0]
            elif source[0] == origin[0]:
                nearest = container[latest]
            else:  # the latest input comes from another graph, that of a module which this graph calls
                nearest = source[0].rpartition(".")[0]
            owner[node] = container[node] = nearest if nearest.startswith(origin[0]) else origin[0]
        parts = owner[node].split(".") if owner[node] else []
        stacked = ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]
        node.meta["nn_module_stack"] = {path: (path, "") for path in stacked}
