"""A model as a function of tensors by place, with a name for each input and each output."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.inference.predict import arguments

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CONSTANTS = (type(None), bool, int, float, str)
"""Types of inputs that are no tensors and become a part of the function."""


class Flat(nn.Module):
    """A model whose inputs are its tensors one after the other, and whose output is a tuple of tensors.

    Lists, dicts and keyword arguments are taken apart and put together again. None, numbers, flags and texts stay as
    they were in the example inputs.

    Args:
        model: any module; it is called as the example inputs say.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, which may be nested.

    Attributes:
        inputs: name → example tensor.

    Raises:
        ModelError: an input is neither a tensor with a batch axis nor a constant.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.model = model
        leaves, self._structure = tree_flatten_with_path(arguments(example_inputs))
        names = _positional_names(model)
        self._leaves: list[Any] = []
        self.inputs: dict[str, torch.Tensor] = {}
        for path, leaf in leaves:
            told, name = _input_name(path, names)
            if isinstance(leaf, torch.Tensor):
                _check(told, leaf)
                self.inputs[unique(name, self.inputs)] = leaf
            elif not isinstance(leaf, CONSTANTS):
                raise ModelError(
                    f"{told} is of type {type(leaf).__name__}.", fix="Give tensors whose first axis is the batch."
                )
            self._leaves.append(None if isinstance(leaf, torch.Tensor) else (leaf,))
        if not self.inputs:
            raise ModelError("The example inputs hold no tensor.", fix="Give tensors whose first axis is the batch.")

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return all tensors among the model's outputs."""
        return tuple(self.by_path(*inputs).values())

    def by_path(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return all tensors among the model's outputs by their path; see `named`."""
        args, options = self.arguments(*inputs)
        return named(self.model(*args, **options))

    def arguments(self, *inputs: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the model is called with, by place and by name."""
        given = iter(inputs)
        leaves = [next(given) if leaf is None else leaf[0] for leaf in self._leaves]
        args, options = tree_unflatten(leaves, self._structure)
        return args, options


def output_names(paths: Sequence[str], taken: Iterable[str]) -> list[str]:
    """Return a name for each output that an ONNX file may hold: `logits`, `aux_0`, `output_1`; `output` for one tensor.

    Args:
        paths: of the outputs, as `named` gives them.
        taken: names that the inputs have already.
    """
    found: list[str] = []
    for path in paths:
        name = "output" if list(paths) == ["0"] else identifier(path, "output")
        found.append(unique(name, {*taken, *found}))
    return found


def identifier(path: str, kind: str) -> str:
    """Return a path as a C identifier, which the ONNX specification asks of names; after `kind` if it is a number."""
    name = re.sub(r"\W", "_", path, flags=re.ASCII)
    return name if name and not name[0].isdigit() else f"{kind}_{name}"


def unique(name: str, taken: Iterable[str]) -> str:
    """Return the name, with a number after it if it is taken."""
    found, number = name, 1
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    return found


def _positional_names(model: nn.Module) -> list[str]:
    """The parameters of a forward that may be given by place."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code has no signature
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _input_name(path: tuple[Any, ...], positional: Sequence[str]) -> tuple[str, str]:
    """An input in the words of an error, and its name in a file."""
    side, first, *rest = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
    inner = "".join(f".{key}" for key in rest)
    if side == 1:
        return f"{first}{inner}", identifier(f"{first}{inner}", "input")
    base = positional[first] if first < len(positional) else f"input{first or ''}"
    return f"Input {first}{inner}", identifier(f"{base}{inner}", "input")


def _check(told: str, tensor: torch.Tensor) -> None:
    fix = "Give tensors whose first axis is the batch."
    if not tensor.dim():
        raise ModelError(f"{told} is a tensor without axes.", fix=fix)
    if tensor.is_meta:
        raise ModelError(f"{told} lies on the meta device and has no values.", fix="Give a tensor with values.")
    if not tensor.numel():
        raise ModelError(f"{told} has shape {tuple(tensor.shape)} and holds no numbers.", fix=fix)
