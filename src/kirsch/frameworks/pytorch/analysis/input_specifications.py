"""Specifications of example inputs for plans, and random inputs from a specification."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from kirsch.errors import PlanError
from kirsch.frameworks.pytorch.inference.predict import Call, device_of
from kirsch.graph.inputs import InputSpec, InputValue, NestedInput, storable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from kirsch.graph.inputs import Input

CONTAINERS: dict[type[Any], str] = {list: "list", tuple: "tuple", dict: "dict", OrderedDict: "dict"}
"""Containers that can be rebuilt from plain data. Subclasses cannot be rebuilt, because a model may read their other
attributes."""
LARGEST = 2**63 - 2
"""Largest random integer. `torch.randint` takes the next integer as the end of the range, which must fit into int64."""
COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that layers compute in; inputs of these types must have the type of the parameters."""


def specification(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Input, ...]:
    """Return example inputs as a plan stores them, without values of tensors; empty if an input cannot be stored."""
    inputs = [("", value) for value in args] + list(options.items())
    described = [_described(name, value) for name, value in inputs]
    stored = [item for item in described if item is not None]
    return tuple(stored) if len(stored) == len(described) else ()


def _described(name: str, value: Any) -> Input | None:
    """Return the specification of one example input; None if it cannot be stored."""
    if isinstance(value, torch.Tensor):
        plain = value.layout is torch.strided and not value.is_quantized and not value.is_nested
        dtype = str(value.dtype).removeprefix("torch.")
        return InputSpec(name, tuple(value.shape), dtype, _highest(value)) if plain else None
    if storable(value):
        return InputValue(name, value)
    if type(value) not in CONTAINERS:
        return None
    keyed = isinstance(value, dict)
    pairs = list(value.items()) if keyed else [("", item) for item in value]
    items = [_described(key, item) if type(key) is str else None for key, item in pairs]
    stored = [item for item in items if item is not None]
    return NestedInput(name, CONTAINERS[type(value)], tuple(stored)) if len(stored) == len(items) else None


def _highest(value: torch.Tensor) -> int:
    """Return the largest value of an integer tensor, so that random indices stay in range; 0 for any other type."""
    if value.is_floating_point() or value.is_complex() or value.is_meta or not value.numel():
        return 0
    highest = int(value.to(torch.int64).max())  # PyTorch has no maximum of unsigned integers of 16 bits and more
    return min(max(highest, 0), LARGEST)


def inputs_like(specification: Sequence[Input], model: nn.Module) -> Any:
    """Return random inputs of the specified shapes and types, on the device of a model.

    If no floating input has a type of the parameters, the floating inputs get the type of the first parameter: the
    pruned model may have been converted, as by `model.half()`.

    Args:
        specification: specification of each input; inputs with a name are keyword arguments.
        model: the model that takes the inputs.

    Raises:
        PlanError: a type is unknown to PyTorch.
    """
    generator = torch.Generator().manual_seed(0)
    values = _moved([(each.name, _random(each, generator)) for each in specification], model)
    args, options = tuple(value for name, value in values if not name), {name: value for name, value in values if name}
    return Call(args, options) if args and options else options or args


def _random(spec: Input, generator: torch.Generator) -> Any:
    if isinstance(spec, InputValue):
        return spec.value
    if isinstance(spec, NestedInput):
        items = [_random(item, generator) for item in spec.items]
        if spec.kind == "dict":
            return {item.name: value for item, value in zip(spec.items, items, strict=True)}
        return items if spec.kind == "list" else tuple(items)
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise PlanError(
            f"The plan has an input of type {spec.dtype!r}.",
            "PyTorch does not have this type.",
            "Pass example_inputs=..., or make a new plan.",
        )
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(spec.shape, generator=generator, dtype=wide).to(dtype)
    highest = min(max(spec.high, 0), LARGEST)
    return torch.randint(0, highest + 1, spec.shape, generator=generator).to(dtype)


def _moved(inputs: Any, model: nn.Module) -> Any:
    """Return inputs on the device of a model, in its floating type if no input has a floating type of the model."""
    types = {p.dtype for p in model.parameters() if p.dtype in COMPUTED_IN}
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dtype in COMPUTED_IN]
    other = bool(types and leaves) and types.isdisjoint(leaf.dtype for leaf in leaves)
    first = next((p.dtype for p in model.parameters() if p.dtype in COMPUTED_IN), None)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device_of(model), first if other and value.dtype in COMPUTED_IN else value.dtype)

    return tree_map(moved, inputs)
