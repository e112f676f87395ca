"""Build a `torch.fx.GraphModule` from the traced program, with the sizes in its operations updated to the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.analysis.program import ASSERTIONS, name_of
from kirsch.frameworks.pytorch.modules.modes import set_modes
from kirsch.frameworks.pytorch.surgery.cut import cut

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn
    from torch.fx import Node

    from kirsch.frameworks.pytorch.analysis.traced import Traced
    from kirsch.graph.graph import Graph

VIEWS = frozenset(["view", "reshape", "_unsafe_view"])


def graph_module(model: nn.Module, graph: Graph, keep: NDArray[np.bool_]) -> fx.GraphModule:
    """Return a module that runs the traced operations on the kept units.

    The module takes the inputs of the model, and returns a single tensor, a tuple, or a dict if the outputs are named.
    Batch normalization and dropout act as in inference, also in training mode.

    Raises:
        ModelError: an input of the model is not a tensor.
    """
    traced: Traced = graph.traced
    if not all(isinstance(value, torch.Tensor) for value in (*traced.args, *traced.options.values())):
        raise ModelError(
            f"{graph.model_name} cannot be returned as a graph.",
            "Its inputs are nested, or some are not tensors.",
            "Trace the model without as_graph, or trace a part that takes only tensors.",
        )
    root = cut(model, graph, keep, constants=False)
    numbers: dict[str, dict[tuple[str, int | None], int]] = {}
    for leaf, value in graph.constants(keep).items():
        numbers.setdefault(leaf.module, {})[leaf.attribute, leaf.index] = value
    new, new_nodes = fx.Graph(), dict[fx.Node, Any]()
    signature = traced.program.graph_signature
    names = iter([*(f"input_{position}" for position in range(len(traced.args))), *traced.options])
    for node in traced.program.graph.nodes:
        if node.op == "placeholder" and node.name in traced.slots:
            new_nodes[node] = new.get_attr(traced.slots[node.name]) if node.users else None
        elif node.op == "placeholder" and node.name in signature.inputs_to_lifted_tensor_constants:
            name = f"constant_{node.name}"
            root.register_buffer(name, traced.program.constants[signature.inputs_to_lifted_tensor_constants[node.name]])
            new_nodes[node] = new.get_attr(name)
        elif node.op == "placeholder":
            new_nodes[node] = new.placeholder(next(names))
        elif node.op == "call_function" and _name(node) not in ASSERTIONS:
            args, options = _arguments(node, numbers.get(node.name, {}), traced)
            # The strides of cut tensors, or of results of another kernel, may differ from the traced strides. A view
            # would then fail.
            target: Any = torch.ops.aten.reshape.default if _name(node) in VIEWS else node.target
            new_nodes[node] = new.call_function(target, *map_arg((args, options), new_nodes.__getitem__))
    traced_outputs: Any = next(iter(reversed(traced.program.graph.nodes))).args[0]
    outputs = {name: new_nodes[traced_outputs[position]] for position, name in traced.outputs.items()}
    if list(outputs) != [str(position) for position in range(len(outputs))]:
        new.output(outputs)
    else:
        new.output(next(iter(outputs.values())) if len(outputs) == 1 else tuple(outputs.values()))
    new.eliminate_dead_code()
    module = fx.GraphModule(root, new, class_name=graph.model_name)
    modes = {path: part.training for path, part in model.named_modules(remove_duplicate=False)}
    set_modes((part, modes[path]) for path, part in module.named_modules())
    return module


def _name(node: Node) -> str:
    return name_of(node).removeprefix("aten.")


def _arguments(node: Node, numbers: dict[tuple[str, int | None], int], traced: Traced) -> tuple[Any, Any]:
    """Return the arguments of an operation with updated integers.

    In a view, the size of the first axis without units is replaced by -1, so that other batch sizes work.
    """

    def updated(value: Any, argument: str, index: int | None = None) -> Any:
        if isinstance(value, (list, tuple)) and index is None:
            return type(value)(updated(item, argument, number) for number, item in enumerate(value))
        return numbers.get((argument, index), value)

    args = [updated(value, str(position)) for position, value in enumerate(node.args)]
    if _name(node) in VIEWS and -1 not in args[1]:
        axes = traced.states[node].axes
        free = next((axis for axis, labels in enumerate(axes) if labels is None), None)
        args[1] = [-1 if axis == free else size for axis, size in enumerate(args[1])]
    return tuple(args), {key: updated(value, key) for key, value in node.kwargs.items()}
