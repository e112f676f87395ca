"""Gradients of a loss for the weights of a traced model, and products of its Hessian with vectors."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kirsch.frameworks.pytorch.inference.placement import to_device
from kirsch.frameworks.pytorch.inference.predict import arguments_of, call_model, copied, inference, logits_of
from kirsch.frameworks.pytorch.modules.submodule import part_of, with_part
from kirsch.frameworks.pytorch.surgery.cut import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from kirsch.data.batches import Batch
    from kirsch.graph.graph import Graph

    Loss = Callable[[Any, Any], Any]


def weights(graph: Graph) -> dict[str, torch.Tensor]:
    """Return the parameters of the traced model by path, without gradient; tied parameters once."""
    return {name: value.detach() for name, value in _parameters(graph).items()}


def gradients(graph: Graph, batch: Batch, loss: Loss) -> dict[str, torch.Tensor]:
    """Return the gradient of the loss of a batch for each parameter of the traced model, also for frozen parameters.

    The model runs in inference mode. Gradients that the model already has are not changed.
    """
    parameters = _parameters(graph)
    with _differentiable(graph.model, parameters):
        value = _loss(graph.model, batch, loss)
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient.detach()
        for (name, value), gradient in zip(parameters.items(), found, strict=True)
    }


def hessian_products(graph: Graph, batch: Batch, loss: Loss, vectors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the products of the Hessian of the loss of a batch with a vector, as arrays by parameter.

    Args:
        graph: graph of the model.
        batch: batch with targets.
        loss: function of logits and targets.
        vectors: the vector, an array for each parameter.
    """
    parameters = _parameters(graph)
    chosen = [parameters[name] for name in vectors]
    # Only the plain implementation of attention has second derivatives.
    with _differentiable(graph.model, parameters), sdpa_kernel(SDPBackend.MATH):
        value = _loss(graph.model, batch, loss)
        first = torch.autograd.grad(value, chosen, create_graph=True, allow_unused=True)
        pairs = [(g, v) for g, v in zip(first, vectors.values(), strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return {name: torch.zeros_like(parameters[name]) for name in vectors}
        product = sum((g * v.to(g)).sum() for g, v in pairs)
        second = torch.autograd.grad(product, chosen, allow_unused=True)
    return {
        name: torch.zeros_like(parameters[name]) if gradient is None else gradient.detach()
        for name, gradient in zip(vectors, second, strict=True)
    }


def loss_without(graph: Graph, batch: Batch, loss: Loss, keep: NDArray[np.bool_]) -> float:
    """Return the loss of a batch after the removal of components; see `kirsch.frameworks.pytorch.surgery.cut`."""
    path = graph.tracing.module
    pruned = cut(part_of(graph.model, path), graph, keep)
    model = with_part(graph.model, path, pruned) if path else pruned
    with torch.no_grad(), inference(model):
        return float(_loss(model, batch, loss))


def _parameters(graph: Graph) -> dict[str, nn.Parameter]:
    named = dict(part_of(graph.model, graph.tracing.module).named_parameters())
    return {name: named[name] for name in graph.parameters}


def _loss(model: nn.Module, batch: Batch, loss: Loss) -> torch.Tensor:
    moved = to_device(batch, model)
    args, options = arguments_of(model, copied(moved.inputs))
    value: torch.Tensor = loss(logits_of(call_model(model, args, options)), moved.targets)
    return value


@contextlib.contextmanager
def _differentiable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Set a model to inference mode and let gradients reach these parameters within the block."""
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    with contextlib.ExitStack() as stack:
        stack.enter_context(inference(model))
        stack.enter_context(torch.enable_grad())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # The recurrent layers of cuDNN have no gradient in inference mode.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        for parameter in frozen:
            parameter.requires_grad = True
            stack.callback(setattr, parameter, "requires_grad", False)
        yield
