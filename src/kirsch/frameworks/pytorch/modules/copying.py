"""Copy models, also those that `copy.deepcopy` cannot copy by itself."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from kirsch.errors import ModelError, error_text
from kirsch.frameworks.pytorch.modules import unsupported
from kirsch.frameworks.pytorch.modules.interpreted import graph_in
from kirsch.frameworks.pytorch.modules.modes import set_modes

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCKS = {type(make()): make for make in (threading.Lock, threading.RLock)}

STATE = ("_parameters", "_buffers", "_modules")
"""Attributes with the state of a module, which `copy.deepcopy` can copy."""


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None, name: str = "") -> nn.Module:
    """Return a deep copy of a model.

    Tensors that the model stores from a forward pass (the weight of `torch.nn.utils.weight_norm`, a cache) are copied
    without their gradient history. Locks are replaced with new ones.

    Args:
        model: the module to copy.
        memo: id of an object of the model → its replacement in the copy.
        name: name of the model in errors; if empty, the name of its class.

    Raises:
        ModelError: an attribute cannot be copied. The error names it.
    """
    replacements = dict(memo or {})
    for value in _values(model):
        if isinstance(value, FakeTensor):
            replacements.setdefault(id(value), value)
        elif isinstance(value, torch.Tensor) and not value.is_leaf:
            replacements.setdefault(id(value), value.detach().clone())
        elif type(value) in LOCKS:
            replacements.setdefault(id(value), LOCKS[type(value)]())
    try:
        with warnings.catch_warnings(), torch.no_grad():  # copies of TorchScript modules would record gradients
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch warns about its own classes
            copied: nn.Module = copy.deepcopy(model, replacements)
    except Exception as error:
        raise ModelError(*_reason(model, name or type(model).__name__, error)) from error
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        for old, new in zip(model.parameters(), copied.parameters(), strict=True):
            new.requires_grad = old.requires_grad
    # The copy may have other modes: `torch.fx` creates new containers in a copied graph module, and copies of the
    # feature extractors of torchvision start in training mode.
    modes = {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
    replaced = {id(value) for value in (memo or {}).values()}
    new_modules = [(path, module) for path, module in copied.named_modules() if id(module) not in replaced]
    set_modes((module, modes[path]) for path, module in new_modules if path in modes)
    return copied


@contextlib.contextmanager
def restoring_attributes(model: nn.Module) -> Iterator[None]:
    """Restore, after a `with` block, the attributes, dicts and lists of a model in which hooks stored fake tensors.

    The hooks of a copy may be bound methods of the original. A trace of the copy then writes into the original.
    """
    attributes = [(module, dict(_attributes(module))) for module in model.modules()]
    containers = [(value, copy.copy(value)) for value in _values(model) if isinstance(value, (dict, list))]
    try:
        yield
    finally:
        for module, before in attributes:
            for name, value in _attributes(module):
                if isinstance(value, FakeTensor) and before.get(name) is not value:
                    setattr(module, name, before[name]) if name in before else delattr(module, name)
        for container, contents in containers:
            values = container.values() if isinstance(container, dict) else container
            if any(isinstance(value, FakeTensor) for value in values):
                container.clear()
                container.update(contents) if isinstance(container, dict) else container.extend(contents)


def _values(model: nn.Module) -> Iterator[Any]:
    """Yield the attributes of all modules except their state, and the objects reachable from these attributes.

    Each object is yielded once.
    """
    seen: set[int] = set()
    pending = [value for module in model.modules() for _, value in _attributes(module)]
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, (nn.Module, type)):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += value
        elif isinstance(value, fx.Graph):
            pending += [node.meta for node in value.nodes]
        elif isinstance(value, fx.Node):
            pending += [value.meta, value.graph, *value.all_input_nodes, *value.users, value.prev, value.next]
        elif not isinstance(value, torch.Tensor):
            pending += getattr(value, "__dict__", {}).values()


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    attributes = [(name, value) for name, value in vars(module).items() if name not in STATE]
    graph = graph_in(module)
    return attributes if graph is None else [*attributes, ("graph", graph)]


def _reason(model: nn.Module, name: str, error: Exception) -> tuple[str, str, str]:
    """Return what, why and fix of the error: an unsupported kind, or the first attribute that cannot be copied."""
    what = f"A {name} cannot be copied."
    for why, fix in unsupported.reasons(model):
        return what, why, fix
    modules = {id(module): module for module in model.modules()}
    for path, module in model.named_modules():
        for attribute, value in _attributes(module):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    copy.deepcopy(value, dict(modules))
            except Exception as cause:  # noqa: BLE001 - whatever copying a part of the model raises
                where = f"{path}.{attribute}".lstrip(".")
                return (
                    what,
                    f"Its attribute `{where}`, a {type(value).__name__}, cannot be copied: {error_text(cause)}",
                    "Set the attribute to None or delete it, or give its class a __deepcopy__.",
                )
    return what, error_text(error), "Make copy.deepcopy(model) work, for instance by giving the class a __deepcopy__."


def recompute_weights(module: nn.Module) -> None:
    """Recompute the weight that a hook of `weight_norm`, `spectral_norm` or `prune` stores in a module.

    The hook updates the weight only in a forward pass. Until then, a cut module would have a weight of the old shape.
    """
    with torch.no_grad():
        for hook in module._forward_pre_hooks.values():  # noqa: SLF001 - has no public name
            if isinstance(hook, WeightNorm):
                setattr(module, hook.name, hook.compute_weight(module))
            elif isinstance(hook, SpectralNorm):
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
            elif isinstance(hook, BasePruningMethod):
                weight = hook.apply_mask(module)  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
                setattr(module, hook._tensor_name, weight)  # noqa: SLF001 - likewise
