"""Hold masks in a PyTorch model by parametrizations, and fold them into the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.modules.copying import STATE, copy_of
from kirsch.frameworks.pytorch.modules.tuners import allow_merges, refuse_merges

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray


class Mask(nn.Module):
    """A parametrization that sets the weights to zero where the mask is False.

    The parameter keeps its identity, so that optimizers, tied layers and moving averages go on using it. Its gradient
    is zero where the mask is False.

    Args:
        mask: bool tensor of the shape of the weight.
        order: names of the parameters of the layer when the mask was registered, in the order that `fold` restores.

    Attributes:
        zeros: float16 tensor, not 0 where the weight is zero; a buffer, so that it is in the state dict and moves with
            the model. A moving average of it, with any decay, is exactly 0 where the weight was never masked, and not
            0 elsewhere. Since masks only grow, that is the mask of the trained model.
        pattern: pattern of the zeros.
    """

    zeros: torch.Tensor

    def __init__(self, mask: torch.Tensor, order: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.order, self.pattern = order, ""
        self.register_buffer("zeros", (~mask).half())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the masked weight; `where`, unlike a product, also hides NaN and infinity."""
        return torch.where(self.zeros == 0, weight, 0.0)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the parameter for a weight that is assigned to the layer."""
        return weight


def masked_parameters(model: nn.Module) -> Iterator[tuple[str, str, parametrize.ParametrizationList]]:
    """Yield path of the layer, name in the layer, and list of parametrizations of each masked parameter."""
    for path, module in model.named_modules():
        for name, part in (
            getattr(module, "parametrizations", {}).items() if parametrize.is_parametrized(module) else ()
        ):
            if is_mask_list(part):
                yield path, name, part


def is_mask_list(module: nn.Module) -> TypeGuard[parametrize.ParametrizationList]:
    """Return whether a module is the list of parametrizations of a weight with a mask."""
    return isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], Mask)


def masks(model: nn.Module) -> dict[str, NDArray[np.bool_]]:
    """Return the masks of a model, by the name of the parameter without the mask; tied parameters once."""
    seen: set[int] = set()
    found = {}
    for path, name, part in masked_parameters(model):
        if id(part.original) not in seen:
            seen.add(id(part.original))
            found[f"{path}.{name}".lstrip(".")] = (_mask_of(part).zeros == 0).cpu().numpy()
    return found


def patterns(model: nn.Module) -> dict[str, str]:
    """Return the patterns that `set_patterns` stored, by the name of the parameter; empty texts for other masks."""
    return {f"{path}.{name}".lstrip("."): _mask_of(part).pattern for path, name, part in masked_parameters(model)}


def set_patterns(model: nn.Module, names: Mapping[str, str]) -> None:
    """Store the pattern of the zeros of masked parameters, by name; copies of the model have them, too."""
    found = {f"{path}.{name}".lstrip("."): part for path, name, part in masked_parameters(model)}
    for name, pattern in names.items():
        _mask_of(found[name]).pattern = pattern


def mask_bytes(model: nn.Module) -> int:
    """Return the size of the masks in the state of a model."""
    return sum(_mask_of(part).zeros.nbytes for _, _, part in masked_parameters(model))


@torch.no_grad()
def hold(
    model: nn.Module, masks: Mapping[str, NDArray[np.bool_]], values: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Give weights of a model masks, or replace the masks that they have; the model is changed in place.

    Args:
        model: the model.
        masks: name of a parameter → its mask, False where the weight is zero.
        values: name of a parameter → its new values, with or without a mask; the others are not changed.

    Raises:
        ModelError: a module stores the parameter a second time, where the mask would have no effect.
    """
    places, parameters = _places(model)
    _require_one_place(model, {id(parameters[name]): name for name in masks})
    for name, new in (values or {}).items():
        parameters[name].copy_(torch.from_numpy(new))
    for name, array in masks.items():
        parameter = parameters[name]
        mask = torch.from_numpy(array.copy()).to(parameter.device)
        parameter.copy_(torch.where(mask, parameter, 0.0))
        for path, attribute in places[id(parameter)]:
            _mask(model.get_submodule(path), attribute, mask)
    refuse_merges(model)


def fold(model: nn.Module) -> nn.Module:
    """Return a copy of a model without masks, whose weights are zero where the masks were False."""
    folded = copy_of(model)
    for path, name, part in list(masked_parameters(folded)):
        module, order = folded.get_submodule(path), _mask_of(part).order
        _separate_class(module)
        parametrize.remove_parametrizations(module, name)
        for other in order:  # `remove_parametrizations` appends the parameter to those of the module
            if other in module._parameters:  # noqa: SLF001 - has no public name
                module._parameters[other] = module._parameters.pop(other)  # noqa: SLF001 - as above
        if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
            module._init_flat_weights()  # noqa: SLF001 - the list that `_mask` replaced with a property
    allow_merges(folded)
    return folded


def _mask_of(part: parametrize.ParametrizationList) -> Mask:
    mask: Any = part[0]
    return cast(Mask, mask)


def _mask(module: nn.Module, name: str, mask: torch.Tensor) -> None:
    """Give a parameter of a module a mask, or replace its mask."""
    if parametrize.is_parametrized(module, name):
        listed: Any = module.parametrizations
        _mask_of(listed[name]).zeros.copy_(~mask)
        return
    if parametrize.is_parametrized(module):
        _separate_class(module)
    known = [_mask_of(part).order for path, _, part in masked_parameters(module) if not path]
    order = known[0] if known else tuple(module._parameters)  # noqa: SLF001 - has no public name
    parametrize.register_parametrization(module, name, Mask(mask, order))
    if isinstance(module, nn.RNNBase) and "_flat_weights" in vars(module):
        # A recurrent layer passes a list of its weights to C++. The list must be made from the masked weights whenever
        # it is read; as an attribute, it would hold tensors with a gradient history, which cannot be copied.
        vars(module).pop("_flat_weights")
        setattr(type(module), "_flat_weights", property(_flat_weights, _ignore))  # noqa: B010 - not known to mypy


def _separate_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    A parametrized weight is a property of a class that PyTorch makes for the module, and a copy of the module has the
    same class. Without a class of its own, a weight that is registered or removed in the copy would change the
    original.
    """
    kind = type(module)
    contents = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, contents)


def _flat_weights(module: nn.RNNBase) -> list[torch.Tensor | None]:
    """Return the weights of a recurrent layer, masked, in the order in which C++ expects them."""
    return [getattr(module, name, None) for name in module._flat_weights_names]  # noqa: SLF001 - has no public name


def _ignore(_module: nn.RNNBase, _weights: Any) -> None:
    """Ignore a list of weights that PyTorch stores; `_flat_weights` makes the list anew."""


def _places(model: nn.Module) -> tuple[dict[int, list[tuple[str, str]]], dict[str, nn.Parameter]]:
    """Return the layers and names that hold each parameter, by its id; and the parameters by each of their names."""
    places: dict[int, list[tuple[str, str]]] = {}
    parameters: dict[str, nn.Parameter] = {}
    masked = {(path, name): part.original for path, name, part in masked_parameters(model)}
    plain = {
        (path, name): value
        for path, module in model.named_modules()
        if not isinstance(module, parametrize.ParametrizationList)
        for name, value in module._parameters.items()  # noqa: SLF001 - of this module alone
        if value is not None
    }
    for (path, name), value in (plain | masked).items():
        places.setdefault(id(value), []).append((path, name))
        parameters[f"{path}.{name}".lstrip(".")] = cast(nn.Parameter, value)
    return places, parameters


def _require_one_place(model: nn.Module, names: Mapping[int, str]) -> None:
    """Refuse a module that stores a parameter in another attribute, too, where a mask has no effect.

    Args:
        model: the model.
        names: id of a parameter → its name.

    Raises:
        ModelError: a module has such an attribute. The message names it.
    """
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            recurrent = attribute == "_flat_weights" and isinstance(module, nn.RNNBase)
            if attribute in STATE or recurrent:
                continue
            parts = (
                value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
            )
            again = next((names[id(part)] for part in parts if id(part) in names), None)
            if again is not None:
                raise ModelError(
                    f"The weight `{again}` cannot be masked.",
                    f"`{path or 'The model'}` stores it a second time, in its attribute `{attribute}`, and would read "
                    "it there without the mask.",
                    f"Read it from its layer in `forward` and delete `{attribute}`, or exclude the layer.",
                )
