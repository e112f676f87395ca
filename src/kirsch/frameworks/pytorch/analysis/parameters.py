"""Costs, freezes and values of the parameters and buffers of a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import ModelError, UnknownNameError
from kirsch.frameworks.pytorch.modules.tuners import BASE_AXES, base_weight_of, copied_modules, tuners
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


def freeze_unused(unused: set[int], model: nn.Module, facts: Facts, tensors: dict[str, Tensor]) -> None:
    """Freeze parameters and buffers that no traced forward pass uses, because other code may depend on their shapes.

    Adapters that are not active have the inputs and outputs of the layers beside which they run.
    """
    coupled = _couple_adapters(unused, model, facts, tensors)
    for name, tensor in tensors.items():
        if id(tensor) in unused:
            facts.begin(Operation("parameter", name.rpartition(".")[0]))
            for number, axis in enumerate(tensor.axes):
                if (id(tensor), number) not in coupled:
                    facts.freeze(axis, UNUSED)


def _couple_adapters(
    unused: set[int], model: nn.Module, facts: Facts, tensors: dict[str, Tensor]
) -> set[tuple[int, int]]:
    """Equate the axes of unused tensors of PEFT with those of the tensors that are used in their place.

    These are adapters that are not active or are merged, and modules with a copy that is trained as a whole.

    Returns:
        `id` of the tensor and number of each axis that was equated.
    """
    coupled = set[tuple[int, int]]()

    def equate(name: str, axis: int, other: str, other_axis: int) -> None:
        tensor, used = tensors[name], tensors[other]
        if id(tensor) in unused and id(used) not in unused and tensor.shape[axis] == used.shape[other_axis]:
            facts.begin(Operation("adapter", name.rpartition(".")[0]))
            facts.equate(tensor.axes[axis], used.axes[other_axis])
            coupled.add((id(tensor), axis))

    for path, layer in tuners(model):
        weight, axes = base_weight_of(layer)
        for part, (axis, meaning) in BASE_AXES.items():
            prefix = f"{path}.{part}."
            for name in [name for name in tensors if name.startswith(prefix)]:
                if axis < len(tensors[name].axes) and f"{path}.{weight}" in tensors:
                    equate(name, axis, f"{path}.{weight}", axes[meaning])
    for _, original, copies in copied_modules(model):
        places = [original, *copies]
        for name in [name for name in tensors if name.startswith(tuple(f"{place}." for place in places))]:
            place = next(place for place in places if name.startswith(f"{place}."))
            others = [f"{other}{name.removeprefix(place)}" for other in places]
            used = next((other for other in others if other in tensors and id(tensors[other]) not in unused), None)
            for axis in range(len(tensors[name].axes)) if used else ():
                equate(name, axis, str(used), axis)
    return coupled


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
