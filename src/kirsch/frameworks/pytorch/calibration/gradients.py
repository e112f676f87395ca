"""Gradients of a loss for the weights of a traced model, and products of its Hessian with vectors."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from kirsch.frameworks.pytorch.inference.placement import to_device
from kirsch.frameworks.pytorch.inference.predict import arguments_of, call_model, copied, inference, logits_of
from kirsch.frameworks.pytorch.modules.submodule import part_of, with_part
from kirsch.frameworks.pytorch.surgery.cut import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

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

    The model runs in inference mode. Gradients that the model already has are not changed. The lookups of an embedding
    table that also multiplies activations, as in tied embeddings, do not count. The gradients of a model with float16
    weights are float32.
    """
    parameters = _parameters(graph)
    scale = _loss_scale(parameters)
    with _differentiable(graph, parameters):
        value = _loss(graph.model, batch, loss) * scale
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return _unscaled(parameters, found, scale)


def hessian_products(
    graph: Graph, batch: Batch, loss: Loss, vectors: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the product of the Hessian of the loss of a batch with each vector, as arrays by parameter.

    The loss and its gradient are computed once for all vectors.

    Args:
        graph: graph of the model.
        batch: batch with targets.
        loss: function of logits and targets.
        vectors: vectors, which have an array for each of some parameters, and are 0 for the others. The product is
            computed for these parameters.
    """
    parameters = _parameters(graph)
    scale = _loss_scale(parameters)
    # Only the plain implementation of attention has second derivatives.
    with _differentiable(graph, parameters), sdpa_kernel(SDPBackend.MATH):
        value = _loss(graph.model, batch, loss) * scale
        found = torch.autograd.grad(value, list(parameters.values()), create_graph=True, allow_unused=True)
        first = dict(zip(parameters, found, strict=True))
        for vector in vectors:
            chosen = {name: parameters[name] for name in vector}
            pairs = [(g, v) for name, v in vector.items() if (g := first[name]) is not None and g.requires_grad]
            second: Sequence[torch.Tensor | None] = [None] * len(chosen)
            if pairs:
                product = sum((g * v.to(g)).sum() for g, v in pairs)
                second = torch.autograd.grad(product, list(chosen.values()), retain_graph=True, allow_unused=True)
            yield _unscaled(chosen, second, scale)


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


def _loss_scale(parameters: Mapping[str, nn.Parameter]) -> float:
    """Return the factor of the loss, so that the gradients of float16 models do not round to 0."""
    return 2.0**10 if any(parameter.dtype == torch.float16 for parameter in parameters.values()) else 1.0


def _unscaled(
    parameters: Mapping[str, nn.Parameter], gradients: Sequence[torch.Tensor | None], scale: float
) -> dict[str, torch.Tensor]:
    """Return gradients by name, without the factor of the loss; zeros for parameters that the loss does not use."""
    found = {
        name: torch.zeros_like(value) if gradient is None else gradient.detach()
        for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
    }
    return found if scale == 1 else {name: value.float() / scale for name, value in found.items()}


class _ConstantLookups(TorchFunctionMode):
    """Treats the embeddings that are looked up in some tables as constants."""

    def __init__(self, tables: Collection[nn.Parameter]) -> None:
        super().__init__()
        self._tables = {id(table) for table in tables}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.embedding, nn.functional.embedding):
            args = [value.detach() if id(value) in self._tables else value for value in args]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _differentiable(graph: Graph, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Set the model to inference mode and let gradients reach these parameters within the block.

    The lookups of an embedding table that also multiplies activations get no gradient.
    """
    model = graph.model
    multiplied = {name for name, axis in graph.axes if graph.has_mark((name, axis), "contracted")}
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    with contextlib.ExitStack() as stack:
        stack.enter_context(inference(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_ConstantLookups([value for name, value in parameters.items() if name in multiplied]))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # The recurrent layers of cuDNN have no gradient in inference mode.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        for parameter in frozen:
            parameter.requires_grad = True
            stack.callback(setattr, parameter, "requires_grad", False)
        yield
