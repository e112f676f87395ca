"""Costs, freezes and values of the parameters and buffers of a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import ModelError, UnknownNameError
from kirsch.graph.facts import UNUSED, Operation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import nn

    from kirsch.graph.facts import Facts
    from kirsch.graph.labels import Tensor


def add_costs(model: nn.Module, facts: Facts, tensors: dict[str, Tensor]) -> None:
    """Record the number of each parameter, and the bytes of each parameter and buffer, as costs of their module."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        tensor, owner = tensors[name], name.rpartition(".")[0]
        constant = math.prod(size for size, axis in zip(tensor.shape, tensor.axes, strict=True) if axis is None)
        if name in parameters:
            facts.cost("parameters", constant, tensor.axes, owner)
        facts.cost("size", constant * value.element_size(), tensor.axes, owner)


def freeze_unused(unused: set[int], facts: Facts, tensors: dict[str, Tensor]) -> None:
    """Freeze parameters and buffers that no traced forward pass uses, because other code may depend on their shapes."""
    for name, tensor in tensors.items():
        if id(tensor) in unused:
            facts.begin(Operation("parameter", name.rpartition(".")[0]))
            for axis in tensor.axes:
                facts.freeze(axis, UNUSED)


def freeze_shared(shared: set[int], model: nn.Module, facts: Facts, tensors: dict[str, Tensor]) -> None:
    """Freeze the tensors of the traced part that the rest of the model also uses."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if id(value) in shared:
            facts.begin(Operation("parameter", name.rpartition(".")[0]))
            for axis in tensors[name].axes:
                facts.freeze(axis, "the rest of the model also uses the parameter")


def values_of(parameters: Mapping[str, nn.Parameter], name: str, model: str) -> NDArray[Any]:
    """Return the values of a parameter as floats.

    Args:
        parameters: the parameters of the model by path, on any device.
        name: path of the parameter.
        model: name of the model, for the error message.

    Raises:
        ModelError: the parameter is on the meta device and has no values.
        UnknownNameError: the model has no such parameter.
    """
    if name not in parameters:
        raise UnknownNameError("parameter", name, parameters)
    parameter = parameters[name]
    if parameter.is_meta:
        raise ModelError(
            f"The parameter {name!r} of {model} has no values.",
            "It is on the meta device, and an importance by magnitude needs values.",
            'Give the model values, or plan with importance="random".',
        )
    value: NDArray[Any] = parameter.detach().to("cpu", torch.float32).numpy()
    return value


def identities(model: nn.Module) -> dict[str, int]:
    """Return the `id` of each parameter by path."""
    return {name: id(parameter) for name, parameter in model.named_parameters()}
