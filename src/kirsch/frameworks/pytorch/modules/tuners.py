"""Layers of the PEFT library, such as LoRA, that run small trained matrices beside a base layer.

PEFT gives all of them the same interface, by which they are recognized, so that PEFT is not imported.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

OUTPUTS_FIRST = (nn.Linear, nn.modules.conv._ConvNd)  # noqa: SLF001 - the common base of all convolutions has no public name
"""Layers whose weight has the shape (outputs, inputs, ...); the weight of others has the shape (inputs, outputs)."""
BASE_AXES = {
    "lora_A": (1, "inputs"),
    "lora_B": (0, "outputs"),
    "lora_embedding_A": (1, "inputs"),
    "lora_embedding_B": (0, "outputs"),
    "lora_magnitude_vector": (0, "outputs"),
}
"""Part of a LoRA layer → the axis of its tensors that has the inputs or the outputs of the base layer."""


def tuners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield path and module of each layer with adapters beside its base layer."""
    for path, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(module, "adapter_layer_names"):
            yield path, module


def copied_modules(model: nn.Module) -> Iterator[tuple[str, str, list[str]]]:
    """Yield each module that PEFT trains as a whole: its path, the path of the original, and those of the copies.

    Such are the modules of `modules_to_save`, often the classifier. The original runs while the adapter is disabled.
    """
    for path, module in model.named_modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and isinstance(getattr(module, "original_module", None), nn.Module):
            yield path, f"{path}.original_module", [f"{path}.modules_to_save.{name}" for name in copies]


def adapter_tensors(model: nn.Module) -> frozenset[str]:
    """Return the paths of the parameters and buffers of adapters, without modules that are trained as a whole."""
    found = set[str]()
    for path, layer in tuners(model):
        for part in layer.adapter_layer_names:
            inside = getattr(layer, part, None)
            if isinstance(inside, nn.Module):
                prefix = f"{path}.{part}" if path else part
                found.update(f"{prefix}.{name}" for name, _ in inside.named_parameters(remove_duplicate=False))
                found.update(f"{prefix}.{name}" for name, _ in inside.named_buffers(remove_duplicate=False))
    return frozenset(found)


def base_weight_of(layer: Any) -> tuple[str, dict[str, int]]:
    """Return the path of the weight of the base layer, from a layer with adapters, and its axes by their meaning."""
    path, base = "base_layer", layer.base_layer
    while isinstance(getattr(base, "base_layer", None), nn.Module):
        path, base = f"{path}.base_layer", base.base_layer
    first = isinstance(base, OUTPUTS_FIRST)
    return f"{path}.weight", {"inputs": int(first), "outputs": int(not first)}


def update_tuner_widths(model: nn.Module) -> None:
    """Set the widths and ranks that the layers with adapters of a pruned model state to the sizes of their tensors.

    PEFT reads them when another adapter is added. A changed rank is stated in the configuration of the adapter, too,
    with the factor that keeps the scale of its output.
    """
    root = next((module for module in model.modules() if isinstance(getattr(module, "peft_config", None), dict)), None)
    configurations: dict[str, Any] = {} if root is None else root.peft_config  # type: ignore[assignment]
    prefix = path_of_base_model(model)
    for path, layer in tuners(model):
        name, axes = base_weight_of(layer)
        weight = next((value for key, value in layer.named_parameters() if key == name), None)
        if weight is not None:
            for meaning, attribute in (("inputs", "in_features"), ("outputs", "out_features")):
                if attribute in vars(layer):
                    setattr(layer, attribute, weight.shape[axes[meaning]])
        for adapter, rank in list(getattr(layer, "r", {}).items()):
            size = _rank(layer, adapter)
            if size not in (None, rank):
                layer.r[adapter] = size
                _state_rank(configurations.get(adapter), path.removeprefix(prefix), size, layer.scaling[adapter])


def _rank(layer: nn.Module, adapter: str) -> int | None:
    """Return the number of rows of the first matrix of an adapter; None if the layer does not have the adapter."""
    for part in ("lora_A", "lora_embedding_A"):
        inside = getattr(layer, part, {})
        if adapter in inside:
            value = getattr(inside[adapter], "weight", inside[adapter])
            return int(value.shape[0])
    return None


def _state_rank(configuration: Any, path: str, rank: int, scaling: float) -> None:
    """Set the rank of one layer in the configuration of an adapter, and the factor that gives the same scaling."""
    if hasattr(configuration, "rank_pattern") and hasattr(configuration, "alpha_pattern"):
        root = rank**0.5 if getattr(configuration, "use_rslora", False) else rank
        # PEFT uses the first pattern that matches the path of a layer.
        configuration.rank_pattern = {path: rank} | {k: v for k, v in configuration.rank_pattern.items() if k != path}
        configuration.alpha_pattern = {path: scaling * root} | {
            k: v for k, v in configuration.alpha_pattern.items() if k != path
        }


def base_model_of(model: nn.Module) -> nn.Module:
    """Return the model inside the wrapper of PEFT, with its adapters; a model that is not wrapped is returned."""
    inner = getattr(model, "get_base_model", None)
    return cast(nn.Module, inner()) if callable(inner) and hasattr(model, "peft_config") else model


def path_of_base_model(model: nn.Module) -> str:
    """Return the path of the model inside the wrapper of PEFT, with a dot at its end; "" if it is not wrapped."""
    inner = base_model_of(model)
    return next(f"{path}." if path else "" for path, module in model.named_modules() if module is inner)


def has_tuners(model: nn.Module) -> bool:
    """Return whether a model has adapters of PEFT, or modules that PEFT trains as a whole."""
    return next(tuners(model), None) is not None or next(copied_modules(model), None) is not None


def without_tuners(model: nn.Module) -> nn.Module:
    """Return the model without adapters: base layers, and the trained modules where PEFT trains them as a whole.

    Its tensors, and the modules that have no adapters inside, are those of the model.
    """
    return _plain(base_model_of(model))


def _plain(module: Any) -> nn.Module:
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module) and hasattr(module, "adapter_layer_names"):
        return _plain(base)
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and isinstance(getattr(module, "original_module", None), nn.Module):
        active = [name for name in getattr(module, "active_adapters", ()) if name in copies]
        return _plain(copies[active[0]] if active else module.original_module)
    if not has_tuners(module):
        return cast(nn.Module, module)
    plain: nn.Module = copy.copy(module)
    vars(plain)["_modules"] = {
        name: None if child is None else _plain(child) for name, child in vars(module)["_modules"].items()
    }
    for flag in ("_hf_peft_config_loaded", "peft_config"):
        vars(plain).pop(flag, None)
    return plain


def plain_names(model: nn.Module) -> dict[str, str]:
    """Return path of each tensor of `without_tuners(model)` → its path in the model."""
    by_identity: dict[int, list[str]] = {}
    for name, value in _tensors(model):
        by_identity.setdefault(id(value), []).append(name)
    return {name: by_identity[id(value)][0] for name, value in _tensors(without_tuners(model))}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@dataclass(frozen=True)
class RefusedMerge:
    """Object that replaces the method `merge` of a layer with adapters whose base weight has a mask.

    PEFT would add the product of the adapter to a temporary result of the mask, and the adapter would be lost without
    an error.
    """

    layer: str

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Raise the error."""
        raise UsageError(
            f"The adapter of `{self.layer}` cannot be merged: the weight of its base layer has a mask.",
            "The weight is computed from the parameter and the mask, and the sum with the adapter would be lost.",
            "Fold the masks first: kirsch.fold_masks(model). The merged weights are then no longer sparse.",
        )


def refuse_merges(model: nn.Module) -> None:
    """Let `merge` of each layer with adapters raise an error if the weight of its base layer has a mask."""
    for path, layer in tuners(model):
        if is_parametrized(layer.get_submodule(base_weight_of(layer)[0].rpartition(".")[0]), "weight"):
            vars(layer)["merge"] = RefusedMerge(path)


def allow_merges(model: nn.Module) -> None:
    """Undo `refuse_merges`."""
    for _, layer in tuners(model):
        if isinstance(vars(layer).get("merge"), RefusedMerge):
            del vars(layer)["merge"]
