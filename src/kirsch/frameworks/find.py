"""The framework of a model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kirsch.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from kirsch.frameworks.protocols import Framework


def framework_of(model: Any) -> Framework:
    """Return the framework of a model, by its base classes.

    Raises:
        ModelError: the model belongs to no supported framework.
        MissingExtraError: the framework's extra is not installed.
    """
    bases = {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}
    if "torch.nn.modules.module.Module" in bases:
        return pytorch()
    raise ModelError(
        f"A {type(model).__module__}.{type(model).__qualname__} is not a model of a supported framework.",
        fix="Give a torch.nn.Module.",
    )


def pytorch() -> Framework:
    """Return the PyTorch framework, which is imported on first use."""
    try:
        framework: Framework = import_module("kirsch.frameworks.pytorch.framework").PYTORCH
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "torch", "for PyTorch models") from error
    return framework
