"""Submodules by path: their inputs in a run of the model, and copies of the model with a replaced submodule."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import ModelError, UnknownNameError
from kirsch.frameworks.pytorch.inference.predict import Call, arguments_of, inference
from kirsch.frameworks.pytorch.modules.copying import copy_of

if TYPE_CHECKING:
    from torch import nn


def part_of(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path; the model itself for "".

    Raises:
        UnknownNameError: the model has no such module.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if path not in modules:
        raise UnknownNameError("module", path, [name for name in modules if name])
    return modules[path]


def inputs_of(model: nn.Module, path: str, example_inputs: Any) -> Any:
    """Return the inputs of the first call of a submodule in a run of the model in inference mode.

    Returns:
        A tuple of positional arguments or a dict of keyword arguments; a `Call` if both are needed.

    Raises:
        ModelError: the model does not run, or does not call the submodule.
    """
    part = part_of(model, path)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = part.register_forward_pre_hook(lambda _, args, options: calls.append((args, options)), with_kwargs=True)
    args, options = arguments_of(model, example_inputs)
    try:
        with inference(model), torch.no_grad(), torch.random.fork_rng():
            model(*args, **options)
    except Exception as error:
        raise ModelError(
            f"The model {type(model).__name__} does not run.",
            f"{type(error).__name__}: {next(iter(str(error).splitlines()), '').rstrip('.')}.",
            "Check the example inputs.",
        ) from error
    finally:
        hook.remove()
    if not calls:
        raise ModelError(
            f"The part {path!r} of {type(model).__name__} is not run.",
            "The model does not call the part in inference mode.",
            "Trace the part by itself: kirsch.trace(model.part, inputs).",
        )
    args, options = calls[0]
    if not args or not options:
        return options or args
    signature = inspect.signature(part.forward)
    bound = signature.bind_partial(*args).arguments
    unnamed = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY
    positional = any(signature.parameters[name].kind in unnamed for name in bound)
    return Call(args, options) if positional else {**bound, **options}


def shared_with_rest(model: nn.Module, path: str) -> set[int]:
    """Return the ids of parameters and buffers that a submodule shares with the rest of the model."""
    prefix = f"{path}."
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    inside = {id(tensor) for name, tensor in named if name.startswith(prefix)}
    return {id(tensor) for name, tensor in named if not name.startswith(prefix)} & inside


def with_part(model: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """Return a copy of the model with the submodule at a path replaced."""
    return copy_of(model, {id(part_of(model, path)): part})
