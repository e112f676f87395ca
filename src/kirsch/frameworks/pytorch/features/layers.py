"""Layers of a PyTorch model: patterns, the last layer, and output shapes."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.layers import OUTPUT, LayerName, pattern
from kirsch.frameworks.pytorch.features.capture import FeatureCapture, is_torchscript, layers_of
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.inference.predict import arguments, call_model, copied, inference, logits_of, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


PASS_THROUGH = (nn.Identity, nn.Dropout, nn.Flatten)
"""Layers that may follow the last layer and return their input."""


def expand(model: nn.Module, text: str, inputs: Any) -> list[str]:
    """Return the layer that a name denotes, or the layers that match a pattern, in the order of the model's modules.

    Args:
        model: the model. It is run once in inference mode if layers or outputs must be counted, or the last layer must
            be found.
        text: a layer name, possibly with a pattern.
        inputs: one batch for this run.

    Raises:
        UnknownNameError: no layer matches.
        UsageError: the model has no last layer, or does not return hidden states.
    """
    layer, inputs = LayerName.read(text), tensors(inputs, model)
    if layer.layered and layer.index == "*":
        capture = FeatureCapture(model, [text.replace("[*]", "[0]")])
        try:
            with inference(model), torch.no_grad():
                args, options = arguments(copied(inputs))
                count = len(layers_of(model, call_model(model, args, options, capture._options), layer))  # noqa: SLF001 - of this package
        finally:
            capture.close()
        return [text.replace("[*]", f"[{number}]") for number in range(count)]
    if layer.path == f"{OUTPUT}*":
        with inference(model), torch.no_grad():
            args, options = arguments(copied(inputs))
            return [f"{OUTPUT}{name}" for name in named(call_model(model, args, options))]
    if layer.path == "penultimate":
        return [f"{_last_layer(model, inputs)}:in"]
    if layer.layered or layer.of_outputs or not ("*" in layer.path or layer.index):
        return [text]
    matcher = re.compile(pattern(layer.path))
    paths = [path for path, _ in _layers(model) if matcher.fullmatch(path)]
    if not paths:
        known = [path for path, _ in _layers(model)]
        raise UnknownNameError(f"layer in {type(model).__name__} named", layer.path, known)
    if layer.index and layer.index != "*":
        if not -len(paths) <= int(layer.index) < len(paths):
            raise UsageError(f"{layer.path!r} matches {len(paths)} modules; there is no [{layer.index}].")
        paths = [paths[int(layer.index)]]
    suffix = text[len(layer.path) :].partition("[")[0]
    return [path + suffix for path in paths]


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of each part of a model, except of modules that compute weights, such as masks."""
    computing = {
        id(inner)
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for inner in cast(nn.ModuleDict, module.parametrizations).modules()
    }
    return ((path, module) for path, module in model.named_modules() if path and id(module) not in computing)


def _last_layer(model: nn.Module, inputs: Any) -> str:
    """Return the path of the last module with parameters; only operations without parameters may follow it.

    Raises:
        UsageError: the logits are not computed from the output of such a module.
    """
    outputs: dict[str, Any] = {}
    layers = dict(_layers(model))
    handles = [
        module.register_forward_hook(lambda _m, _a, out, path=path: outputs.update({path: out}))
        for path, module in layers.items()
        if not any(other.startswith(f"{path}.") for other in layers) and not is_torchscript(module)
    ]
    try:
        with inference(model), torch.no_grad():
            args, options = arguments(copied(inputs))
            logits = logits_of(call_model(model, args, options))
    finally:
        for handle in handles:
            handle.remove()
    last = [
        path
        for path, out in outputs.items()
        if isinstance(out, torch.Tensor)
        and out.data_ptr() == logits.data_ptr()
        and not isinstance(model.get_submodule(path), PASS_THROUGH)
    ]
    if not last:
        raise UsageError(
            f"The logits of {type(model).__name__} are not the output of a module, so there is no penultimate value.",
            fix='Write the path of a module, followed by ":in" for its input.',
        )
    weighted = [path for path in outputs if any(True for _ in model.get_submodule(path).parameters())]
    if last[-1] in weighted:
        return last[-1]
    out = outputs[weighted[-1]] if weighted else None  # a pooling or a softmax may follow
    if not isinstance(out, torch.Tensor) or logits.shape[-1] not in (out.shape[1], out.shape[-1]):
        raise UsageError(
            f"The last module of {type(model).__name__} with parameters does not compute the logits, so there is no "
            "penultimate value.",
            fix='Write the path of a module, followed by ":in" for its input.',
        )
    return weighted[-1]


def shapes(model: nn.Module, inputs: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Return path and output shape of each module that runs once, in the order of completion.

    If a module returns a tuple, the shape is that of the first element.
    """
    outputs: list[tuple[str, tuple[int, ...]]] = []

    def record(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) and out else out
            if isinstance(first, torch.Tensor):
                outputs.append((path, tuple(first.shape)))

        return hook

    handles = [
        module.register_forward_hook(record(path)) for path, module in _layers(model) if not is_torchscript(module)
    ]
    try:
        with inference(model), torch.no_grad():
            args, options = arguments(copied(tensors(inputs, model)))
            call_model(model, args, options)
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(path for path, _ in outputs)
    return [(path, shape) for path, shape in outputs if times[path] == 1]
