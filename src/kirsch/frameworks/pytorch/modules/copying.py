"""Copies of models: what `copy.deepcopy` cannot copy is either copied another way, or named."""

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

OWN = ("_parameters", "_buffers", "_modules")
"""Where a module keeps its state, which copies as it is."""


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None, name: str = "") -> nn.Module:
    """A deep copy of a model.

    Results of a forward that the model keeps (the weight of `torch.nn.utils.weight_norm`, a cache) are copied without
    their history, and locks are made anew.

    Args:
        model: any.
        memo: identity of an object of the model → what stands in its place in the copy.
        name: of the model in errors; that of its class if empty.

    Raises:
        ModelError: an attribute cannot be copied; names it.
    """
    own = dict(memo or {})
    for value in _values(model):
        if isinstance(value, FakeTensor):
            own.setdefault(id(value), value)
        elif isinstance(value, torch.Tensor) and not value.is_leaf:
            own.setdefault(id(value), value.detach().clone())
        elif type(value) in LOCKS:
            own.setdefault(id(value), LOCKS[type(value)]())
    try:
        with warnings.catch_warnings(), torch.no_grad():  # no_grad for TorchScript, whose copies depend on it otherwise
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's about its own classes
            made: nn.Module = copy.deepcopy(model, own)
    except Exception as error:
        raise ModelError(*_reason(model, name or type(model).__name__, error)) from error
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        for old, new in zip(model.parameters(), made.parameters(), strict=True):
            new.requires_grad = old.requires_grad
    # `torch.fx` makes the containers of a copied graph anew, and feature extractors of torchvision start in training.
    modes = {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
    replaced = {id(value) for value in (memo or {}).values()}
    copied = [(path, module) for path, module in made.named_modules() if id(module) not in replaced]
    set_modes((module, modes[path]) for path, module in copied if path in modes)
    return made


@contextlib.contextmanager
def kept_by_hooks(model: nn.Module) -> Iterator[None]:
    """Give back what a model holds as it was: a hook that points at it writes what a trace of a copy computes."""
    held = [(module, dict(_attributes(module))) for module in model.modules()]
    stores = [(value, copy.copy(value)) for value in _values(model) if isinstance(value, (dict, list))]
    try:
        yield
    finally:
        for module, before in held:
            for name, value in _attributes(module):
                if isinstance(value, FakeTensor) and before.get(name) is not value:
                    setattr(module, name, before[name]) if name in before else delattr(module, name)
        for store, was in stores:
            if any(isinstance(value, FakeTensor) for value in (store.values() if isinstance(store, dict) else store)):
                store.clear()
                store.update(was) if isinstance(store, dict) else store.extend(was)


def _values(model: nn.Module) -> Iterator[Any]:
    """What the modules of a model hold beside parameters, buffers and modules, and what is in it."""
    seen: set[int] = set()
    waiting = [value for module in model.modules() for _, value in _attributes(module)]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (nn.Module, type)):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        elif isinstance(value, fx.Graph):
            waiting += [node.meta for node in value.nodes]
        elif isinstance(value, fx.Node):
            waiting += [value.meta, value.graph, *value.all_input_nodes, *value.users, value.prev, value.next]
        elif not isinstance(value, torch.Tensor):
            waiting += getattr(value, "__dict__", {}).values()


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    found = [(name, value) for name, value in vars(module).items() if name not in OWN]
    graph = graph_in(module)
    return found if graph is None else [*found, ("graph", graph)]


def _reason(model: nn.Module, name: str, error: Exception) -> tuple[str, str, str]:
    """What, why and fix: the kind of the model, or the first attribute that cannot be copied."""
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
            except Exception as own:  # noqa: BLE001 - whatever copying a part of the model raises
                where = f"{path}.{attribute}".lstrip(".")
                return (
                    what,
                    f"Its attribute `{where}`, a {type(value).__name__}, cannot be: {error_text(own)}",
                    "Set the attribute to None or delete it, or give its class a __deepcopy__.",
                )
    return what, error_text(error), "Make copy.deepcopy(model) work, for instance by giving the class a __deepcopy__."


def renew_weights(module: nn.Module) -> None:
    """Compute the weight anew that a hook of `weight_norm`, `spectral_norm` or `prune` keeps in a module.

    Its hooks compute it at each forward; until the next one, a module whose parameters were cut would show the old one.
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
