"""Example inputs as a plan stores them, and inputs of the same form to trace a model with."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from kirsch.errors import PlanError
from kirsch.frameworks.pytorch.inference.predict import Call, device_of
from kirsch.graph.graph import InputSpec, InputValue, NestedInput
from kirsch.graph.inputs import storable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from kirsch.graph.graph import Input

KINDS: dict[type[Any], str] = {list: "list", tuple: "tuple", dict: "dict", OrderedDict: "dict"}
"""Containers that can be made again from plain data; a subclass may be read in ways of its own."""
LARGEST = 2**63 - 2
"""A stand-in is drawn from 0 to this, and the end of the range must be an int64."""
COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that a layer computes in, so that its inputs must have the type of its parameters."""


def specification(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Input, ...]:
    """Example inputs as a plan stores them, of tensors without their values; empty where one cannot be stored."""
    given = [("", value) for value in args] + list(options.items())
    found = [_described(name, value) for name, value in given]
    stored = [item for item in found if item is not None]
    return tuple(stored) if len(stored) == len(found) else ()


def _described(name: str, value: Any) -> Input | None:
    """One example input; None where it cannot be stored."""
    if isinstance(value, torch.Tensor):
        plain = value.layout is torch.strided and not value.is_quantized and not value.is_nested
        dtype = str(value.dtype).removeprefix("torch.")
        return InputSpec(name, tuple(value.shape), dtype, _highest(value)) if plain else None
    if storable(value):
        return InputValue(name, value)
    if type(value) not in KINDS:
        return None
    keyed = isinstance(value, dict)
    pairs = list(value.items()) if keyed else [("", item) for item in value]
    items = [_described(key, item) if type(key) is str else None for key, item in pairs]
    stored = [item for item in items if item is not None]
    return NestedInput(name, KINDS[type(value)], tuple(stored)) if len(stored) == len(items) else None


def _highest(value: torch.Tensor) -> int:
    """The largest value of an integer tensor, so that a stand-in for an index stays in range; 0 for any other."""
    if value.is_floating_point() or value.is_complex() or value.is_meta or not value.numel():
        return 0
    highest = int(value.to(torch.int64).max())  # PyTorch has no maximum of unsigned integers of 16 bits and more
    return min(max(highest, 0), LARGEST)


def stand_ins(specification: Sequence[Input], model: nn.Module) -> Any:
    """Example inputs of stored shapes and types: those with a name are keyword arguments.

    They lie where the model lies. Floating ones are of its type where none of theirs is, since what was pruned may have
    been converted, as by `model.half()`, and the model given may not be.

    Raises:
        PlanError: a type is unknown.
    """
    generator = torch.Generator().manual_seed(0)
    values = _moved([(given.name, _made(given, generator)) for given in specification], model)
    args, options = tuple(value for name, value in values if not name), {name: value for name, value in values if name}
    return Call(args, options) if args and options else options or args


def _made(given: Input, generator: torch.Generator) -> Any:
    if isinstance(given, InputValue):
        return given.value
    if isinstance(given, NestedInput):
        items = [_made(item, generator) for item in given.items]
        if given.kind == "dict":
            return {item.name: value for item, value in zip(given.items, items, strict=True)}
        return items if given.kind == "list" else tuple(items)
    dtype = getattr(torch, given.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise PlanError(
            f"The plan has an input of the type {given.dtype!r}.",
            "PyTorch has no such type.",
            "Give example_inputs=..., or make a new plan.",
        )
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(given.shape, generator=generator, dtype=wide).to(dtype)
    highest = min(max(given.high, 0), LARGEST)
    return torch.randint(0, highest + 1, given.shape, generator=generator).to(dtype)


def _moved(inputs: Any, model: nn.Module) -> Any:
    """Inputs where a model lies, and of its floating type where none of theirs is one of its own."""
    own = {p.dtype for p in model.parameters() if p.dtype in COMPUTED_IN}
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dtype in COMPUTED_IN]
    other = bool(own and leaves) and own.isdisjoint(leaf.dtype for leaf in leaves)
    first = next((p.dtype for p in model.parameters() if p.dtype in COMPUTED_IN), None)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device_of(model), first if other and value.dtype in COMPUTED_IN else value.dtype)

    return tree_map(moved, inputs)
