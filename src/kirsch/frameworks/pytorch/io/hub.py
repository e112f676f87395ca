"""Create models of other libraries by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.errors import LoadError, MissingExtraError, RequirementError, UnknownNameError, error_text
from kirsch.frameworks.pytorch.io.vision import import_beside

if TYPE_CHECKING:
    from torch import nn


def from_hub(library: str, name: str, *, pretrained: bool) -> nn.Module:
    """Return a model of another library by its name.

    Raises:
        UnknownNameError: the library is not timm.
        MissingExtraError, RequirementError, LoadError: see `from_timm`.
    """
    if library != "timm":
        raise UnknownNameError("library of models", library, ["timm"])
    return from_timm(name, pretrained=pretrained)


def from_timm(name: str, *, pretrained: bool) -> nn.Module:
    """Return a timm model by its name.

    Raises:
        MissingExtraError: timm is not installed.
        RequirementError: timm is installed and cannot be imported.
        LoadError: timm has no such model, or its weights cannot be downloaded.
    """
    try:
        timm = import_beside("timm")
    except ModuleNotFoundError as error:
        raise MissingExtraError("timm", "zoo", "for models named timm:NAME") from error
    except (ImportError, RuntimeError, OSError) as error:
        raise RequirementError(
            "timm is installed and cannot be imported.",
            error_text(error),
            "Reinstall timm, and the torchvision version that belongs to this version of torch.",
        ) from error
    if not timm.is_model(name):
        unknown = UnknownNameError("timm model", name, timm.list_models())
        raise LoadError(unknown.what, unknown.why, unknown.fix)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # the client of the hub has its own exception classes
        what = f"The weights of timm:{name} cannot be downloaded." if pretrained else f"timm:{name} cannot be built."
        fix = "Check the network, give a safetensors file, or use random weights." if pretrained else ""
        raise LoadError(what, error_text(error), fix) from error
    return model
