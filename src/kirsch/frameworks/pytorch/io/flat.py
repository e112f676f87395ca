"""Wrap a model as a function of positional tensors, and name its inputs and outputs."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.inference.predict import arguments_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CONSTANTS = (type(None), bool, int, float, str)
"""Types of non-tensor inputs, which become constants of the exported function."""

TENSORS_WITH_BATCH = "Give tensors whose first axis is the batch."


class Flat(nn.Module):
    """A model that takes its input tensors as positional arguments and returns a tuple of tensors.

    The tensors are inserted into lists, dicts and keyword arguments as in the example inputs. None, numbers, booleans
    and strings keep the values that they have in the example inputs.

    Args:
        model: the module to wrap.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, which may be nested.

    Attributes:
        inputs: name → example tensor.

    Raises:
        ModelError: an input is neither a tensor with a batch axis nor a constant.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.model = model
        leaves, self._structure = tree_flatten_with_path(arguments_of(model, example_inputs))
        names = _positional_names(model)
        self._leaves: list[Any] = []
        self.inputs: dict[str, torch.Tensor] = {}
        for path, leaf in leaves:
            description, name = _input_name(path, names)
            if isinstance(leaf, torch.Tensor):
                _check(description, leaf)
                self.inputs[unique(name, self.inputs)] = leaf
            elif not isinstance(leaf, CONSTANTS):
                raise ModelError(f"{description} is of type {type(leaf).__name__}.", fix=TENSORS_WITH_BATCH)
            self._leaves.append(None if isinstance(leaf, torch.Tensor) else (leaf,))
        if not self.inputs:
            raise ModelError("The example inputs contain no tensor.", fix=TENSORS_WITH_BATCH)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return all tensors in the outputs of the model."""
        return tuple(self.by_path(*inputs).values())

    def by_path(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return all tensors in the outputs of the model, by path; see `named`."""
        args, options = self.arguments(*inputs)
        return named(self.model(*args, **options))

    def arguments(self, *inputs: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments for a call of the model."""
        tensors = iter(inputs)
        leaves = [next(tensors) if leaf is None else leaf[0] for leaf in self._leaves]
        args, options = tree_unflatten(leaves, self._structure)
        return args, options


def output_names(paths: Sequence[str], taken: Iterable[str]) -> list[str]:
    """Return a valid ONNX name for each output, such as `logits`, `aux_0` or `output_1`; `output` for a single tensor.

    Args:
        paths: paths of the outputs; see `named`.
        taken: names of the inputs.
    """
    names: list[str] = []
    for path in paths:
        name = "output" if list(paths) == ["0"] else identifier(path, "output")
        names.append(unique(name, {*taken, *names}))
    return names


def identifier(path: str, kind: str) -> str:
    """Return a path as a C identifier, as the ONNX specification requires, with the prefix `kind` before a digit."""
    name = re.sub(r"\W", "_", path, flags=re.ASCII)
    return name if name and not name[0].isdigit() else f"{kind}_{name}"


def unique(name: str, taken: Iterable[str]) -> str:
    """Return the name, with the first free number appended if it is taken."""
    candidate, number = name, 1
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate


def _positional_names(model: nn.Module) -> list[str]:
    """Return the names of the positional parameters of a `forward`."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code has no signature
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _input_name(path: tuple[Any, ...], positional: Sequence[str]) -> tuple[str, str]:
    """Return a description of an input for errors, and its name in a file."""
    kind, first, *rest = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
    inner = "".join(f".{key}" for key in rest)
    if kind == 1:  # an entry of kwargs in (args, kwargs)
        return f"{first}{inner}", identifier(f"{first}{inner}", "input")
    base = positional[first] if first < len(positional) else f"input{first or ''}"
    return f"Input {first}{inner}", identifier(f"{base}{inner}", "input")


def _check(description: str, tensor: torch.Tensor) -> None:
    if not tensor.dim():
        raise ModelError(f"{description} is a tensor without axes.", fix=TENSORS_WITH_BATCH)
    if tensor.is_meta:
        raise ModelError(f"{description} is on the meta device and has no values.", fix="Give a tensor with values.")
    if not tensor.numel():
        raise ModelError(f"{description} has shape {tuple(tensor.shape)} and is empty.", fix=TENSORS_WITH_BATCH)
