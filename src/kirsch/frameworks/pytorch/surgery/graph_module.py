"""The traced program as a module of its own, with the integers of its operations rewritten after a cut."""

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
    """A module that runs the traced operations with what is kept.

    It takes what the model takes. One tensor is put out as such, several as a tuple, or as a dict where they have
    names. Statistics of batches and dropout are those of inference, also in training mode.

    Raises:
        ModelError: an input of the model is not a tensor.
    """
    traced: Traced = graph.traced
    if not all(isinstance(value, torch.Tensor) for value in (*traced.args, *traced.options.values())):
        raise ModelError(
            f"The {graph.model_name} cannot be given as a graph.",
            "Its inputs are nested, or not all tensors.",
            "Trace it without as_graph, or a part that takes tensors.",
        )
    root = cut(model, graph, keep, constants=False)
    numbers: dict[str, dict[tuple[str, int | None], int]] = {}
    for leaf, value in graph.constants(keep).items():
        numbers.setdefault(leaf.module, {})[leaf.attribute, leaf.index] = value
    new, made = fx.Graph(), dict[fx.Node, Any]()
    signature = traced.program.graph_signature
    names = iter([*(f"input_{place}" for place in range(len(traced.args))), *traced.options])
    for node in traced.program.graph.nodes:
        if node.op == "placeholder" and node.name in traced.slots:
            made[node] = new.get_attr(traced.slots[node.name]) if node.users else None
        elif node.op == "placeholder" and node.name in signature.inputs_to_lifted_tensor_constants:
            name = f"constant_{node.name}"
            root.register_buffer(name, traced.program.constants[signature.inputs_to_lifted_tensor_constants[node.name]])
            made[node] = new.get_attr(name)
        elif node.op == "placeholder":
            made[node] = new.placeholder(next(names))
        elif node.op == "call_function" and _name(node) not in ASSERTIONS:
            args, options = _arguments(node, numbers.get(node.name, {}), traced)
            # What is kept, or another kernel, may lie in memory otherwise than what was traced.
            target: Any = torch.ops.aten.reshape.default if _name(node) in VIEWS else node.target
            made[node] = new.call_function(target, *map_arg((args, options), made.__getitem__))
    given: Any = next(iter(reversed(traced.program.graph.nodes))).args[0]
    found = {name: made[given[place]] for place, name in traced.outputs.items()}
    plain = list(found) == [str(place) for place in range(len(found))]
    new.output(found if not plain else next(iter(found.values())) if len(found) == 1 else tuple(found.values()))
    new.eliminate_dead_code()
    module = fx.GraphModule(root, new, class_name=graph.model_name)
    modes = {path: part.training for path, part in model.named_modules(remove_duplicate=False)}
    set_modes((part, modes[path]) for path, part in module.named_modules())
    return module


def _name(node: Node) -> str:
    return name_of(node).removeprefix("aten.")


def _arguments(node: Node, numbers: dict[tuple[str, int | None], int], traced: Traced) -> tuple[Any, Any]:
    """The arguments of an operation with new integers. A view leaves its first size open that no units sit on."""

    def put(value: Any, at: str, place: int | None = None) -> Any:
        if isinstance(value, (list, tuple)) and place is None:
            return type(value)(put(item, at, number) for number, item in enumerate(value))
        return numbers.get((at, place), value)

    args = [put(value, str(place)) for place, value in enumerate(node.args)]
    if _name(node) in VIEWS and -1 not in args[1]:
        axes = traced.states[node].axes
        free = next((place for place, axis in enumerate(axes) if axis is None), None)
        args[1] = [-1 if place == free else size for place, size in enumerate(args[1])]
    return tuple(args), {key: put(value, key) for key, value in node.kwargs.items()}
