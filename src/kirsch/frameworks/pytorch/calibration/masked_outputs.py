"""Outputs of a traced model without some of its units or residual blocks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from kirsch.frameworks.predictions import is_prediction, logits_output
from kirsch.frameworks.pytorch.analysis.blocks import skipping
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.inference.predict import arguments_of, call_model, copied, inference, tensors
from kirsch.frameworks.pytorch.modules.submodule import part_of, with_part
from kirsch.frameworks.pytorch.surgery.cut import cut
from kirsch.frameworks.pytorch.surgery.graph_module import graph_module

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from numpy.typing import NDArray
    from torch import nn

    from kirsch.graph.graph import Graph


def outputs_without(
    graph: Graph, batches: Iterable[Any], keep: Any, without: Collection[str] = ()
) -> Iterator[list[NDArray[Any]]]:
    """Yield the floating outputs of the model after the removal of components for each batch, the logits first.

    The units are cut once, from a copy that shares all other tensors with the model, which is not traced again. The
    model runs in inference mode, with the same random numbers for each batch. Hidden states, attention weights and
    caches are not returned.

    Args:
        graph: graph of the model.
        batches: inputs of each batch, numpy arrays or tensors.
        keep: mask of the components (sets of coupled labels) that stay, bool of shape (components,).
        without: paths of residual blocks that return their inputs.

    Raises:
        UsageError: it is not known which of the outputs holds the logits.
    """
    model = _cut_model(graph, keep)
    skipped = [block for block in graph.traced.blocks if block.path in without]
    for inputs in batches:
        args, options = arguments_of(model, copied(tensors(inputs, model)))
        with _repeatable(model), skipping(part_of(model, graph.tracing.module), skipped):
            found = named(call_model(model, args, options))
        first = logits_output(list(found))
        names = [first, *(name for name in found if name != first and is_prediction(name))]
        yield [_array(found[name]) for name in names if found[name].is_floating_point()]


def _cut_model(graph: Graph, keep: Any) -> nn.Module:
    """Return the model without components; the model itself if all are kept."""
    model: nn.Module = graph.model
    if keep.all():
        return model
    path = graph.tracing.module
    pruned = (graph_module if graph.tracing.as_graph else cut)(part_of(model, path), graph, keep)
    return with_part(model, path, pruned) if path else pruned


@contextlib.contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """Run a model in inference mode, without gradient, and with the same random numbers each time."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with inference(model), torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def _array(value: torch.Tensor) -> NDArray[Any]:
    """Return a tensor as a numpy array of at least 32 bits; numpy has no bfloat16."""
    wide = value if value.dtype in (torch.float32, torch.float64) else value.float()
    found: NDArray[Any] = wide.detach().cpu().numpy()
    return found
