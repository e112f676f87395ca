"""Inputs of the same layer in a model and in its pruned copy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kirsch.frameworks.pruned_models import LinearLayer
from kirsch.frameworks.pytorch.analysis.program import name_of
from kirsch.frameworks.pytorch.calibration.weight_inputs import SeenAll, observe
from kirsch.frameworks.pytorch.inference.outputs import named, selected_outputs
from kirsch.frameworks.pytorch.inference.predict import arguments_of, call_model, copied, inference, tensors
from kirsch.frameworks.pytorch.modules.submodule import part_of
from kirsch.frameworks.pytorch.modules.unsupported import check_values

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn
    from torch.fx import Node

    from kirsch.frameworks.pytorch.calibration.weight_inputs import Product
    from kirsch.graph.graph import Graph

    Choose = Callable[[str, int], NDArray[np.int64] | None]
    SeePair = Callable[[str, tuple[int, int], Any, Any], None]

MATRIX = 2
"""Number of axes of a matrix."""

MOST_NUMBERS = 2**24
"""Largest number of activations in one call of `see` for chosen outputs; in float32, 64 MB."""


def linear_layers(graph: Graph) -> dict[str, LinearLayer]:
    """Return the weights that exactly one operation reads, a linear layer or a convolution that is not transposed."""
    placeholders = [node for node in graph.traced.program.graph.nodes if node.name in graph.traced.slots]
    readers: dict[int, list[Node]] = {}  # tied tensors are one object, and may be several inputs of the program
    for node in placeholders:
        readers.setdefault(id(_tensor(graph, node)), []).extend(node.users)
    named: dict[int, str] = {}
    for name in graph.parameters:
        named.setdefault(id(graph.tensors[name]), name)
    found = {}
    for node in placeholders:
        weight, users = _tensor(graph, node), readers[id(_tensor(graph, node))]
        operands = _operands(users[0]) if len(users) == 1 else None
        if operands is None or operands[0] is not node or id(weight) not in named:
            continue
        bias = operands[1]
        has_own_bias = bias is not None and bias.name in graph.traced.slots
        has_own_bias = has_own_bias and len(readers[id(_tensor(graph, bias))]) == 1
        axis = 0 if name_of(users[0]) in ("aten.addmm", "aten.mm", "aten.matmul") else 1
        bias_name = named.get(id(_tensor(graph, bias))) if has_own_bias else None
        found[named[id(weight)]] = LinearLayer(axis, bias_name)
    return found


def _tensor(graph: Graph, node: Any) -> Any:
    return graph.tensors[graph.traced.slots[node.name]]


def _operands(node: Node) -> tuple[Any, Any] | None:
    """Return the weight and the bias of a linear layer or a convolution; None for other operations."""
    name, args, options = name_of(node), node.args, node.kwargs
    given: Any = dict(enumerate(args)) | options
    if name in ("aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d"):
        return args[1], given.get(2, given.get("bias"))
    if name == "aten.convolution" and not given[6]:
        return args[1], given[2]
    if name == "aten.addmm" and not options:
        return args[2], args[0]
    if name in ("aten.mm", "aten.matmul"):
        weight: Any = args[1]
        return (weight, None) if len(weight.meta["val"].shape) == MATRIX else None
    return None


def reading_order(graph: Graph, pruned: nn.Module, inputs: Any, names: Collection[str]) -> list[list[str]]:
    """Return the named weights in the order in which the pruned model multiplies them with activations.

    Consecutive weights that read the same activations, such as those of queries, keys and values, are in one list.
    """
    stages: list[list[str]] = []
    last: list[tuple[torch.Tensor, int]] = []  # the tensor that the last weight read, and its version

    def see(product: Product) -> None:
        if product.name not in names:
            return
        x = product.x
        if last and _same_memory(*last[0], x):
            stages[-1].append(product.name)
        else:
            stages.append([product.name])
        last[:] = [(x, x._version)]  # noqa: SLF001 - has no public name

    observe(pruned, part_of(pruned, graph.tracing.module), inputs, see, recurrent=False)
    times = Counter(name for stage in stages for name in stage)
    once = ([name for name in stage if times[name] == 1] for stage in stages)
    return [stage for stage in once if stage]


def _same_memory(first: torch.Tensor, version: int, second: torch.Tensor) -> bool:
    """Return whether two tensors are the same numbers in memory, and were not changed since a version of the first."""
    return (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and (first.storage_offset(), first.numel()) == (second.storage_offset(), second.numel())
        and first._version == version  # noqa: SLF001 - has no public name
    )


def paired_inputs(
    graph: Graph, pruned: nn.Module, inputs: Any, names: Collection[str], choose: Choose, see: SeePair
) -> None:
    """Call `see(name, groups, x, y)` with the activations that a weight reads in the model and in its pruned copy.

    Each run ends as soon as it has reached all of the weights. A weight that is read twice until then is left out.

    Args:
        graph: graph of the model.
        pruned: the pruned copy; its weights have the same paths.
        inputs: inputs of one batch.
        names: weights of `linear_layers`.
        choose: called with the path of the weight and the number of outputs, of all samples; returns the numbers of the
            outputs whose activations are passed to `see`, in any number of calls. None: all outputs, in one call.
        see: called with the path of the weight, the numbers of groups of a convolution in the model and in the copy
            (else 1), and the activations x and y that each output reads, shape (outputs, channels, kernel size).
    """
    first, second = (_inputs_once(model, graph, inputs, names) for model in (graph.model, pruned))
    for name in names:
        if name not in first or name not in second:
            continue
        groups = first[name].groups, second[name].groups
        x, y = first[name].windows(), second[name].windows()
        chosen = choose(name, x.count)
        if chosen is None:
            see(name, groups, x.all(), y.all())
            continue
        most = max(1, MOST_NUMBERS // (x.values.numel() // max(x.count, 1)))
        for start in range(0, len(chosen), most):
            part = chosen[start : start + most]
            see(name, groups, x.at(part), y.at(part))


def _inputs_once(model: nn.Module, graph: Graph, inputs: Any, names: Collection[str]) -> dict[str, Product]:
    """Return what the named weights read in a run of a model, without those that are read more than once."""
    read: dict[str, list[Product]] = {}

    def keep(product: Product) -> None:
        if product.name in names:  # the model may change the activations in place later
            read.setdefault(product.name, []).append(replace(product, x=product.x.clone()))
            if len(read) == len(names):
                raise SeenAll

    observe(model, part_of(model, graph.tracing.module), inputs, keep, recurrent=False)  # see `linear_layers`
    return {name: products[0] for name, products in read.items() if len(products) == 1}


def paired_outputs(graph: Graph, pruned: nn.Module, inputs: Any) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Return the floating outputs of the model and of its pruned copy that have the same name and shape.

    Hidden states and caches are left out if the model has other outputs.
    """
    first, second = (_outputs(model, inputs) for model in (graph.model, pruned))
    names = selected_outputs(list(first), () if graph.tracing.module else graph.tracing.outputs) & set(second)
    pairs = ((value, second[name]) for name, value in first.items() if name in names and value.is_floating_point())
    return [(x.double().cpu().numpy(), y.double().cpu().numpy()) for x, y in pairs if x.shape == y.shape]


def _outputs(model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    check_values(model)
    args, options = arguments_of(model, copied(tensors(inputs, model)))
    with inference(model), torch.no_grad():
        return named(call_model(model, args, options))
