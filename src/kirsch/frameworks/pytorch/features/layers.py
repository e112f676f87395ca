"""LayerNames of a PyTorch model: how they are found."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.layers import LayerName, pattern
from kirsch.frameworks.pytorch.features.capture import Watch, closed, layers_of
from kirsch.frameworks.pytorch.inference.predict import arguments, called, copied, inference, logits_of

if TYPE_CHECKING:
    from collections.abc import Callable


EMPTY = (nn.Identity, nn.Dropout, nn.Flatten)
"""Layers that may stand behind the last one and put out what they are given."""


def expand(model: nn.Module, text: str, inputs: Any) -> list[str]:
    """The concrete layers that a text names, in the order of the model's modules or layers: one, or all that fit.

    Args:
        model: run once in inference mode where layers must be counted, or the last layer found.
        text: a layer, perhaps with a pattern.
        inputs: one batch, for that run.

    Raises:
        UnknownNameError: nothing fits.
        UsageError: the model has no last layer, or puts out no states of layers.
    """
    layer = LayerName.read(text)
    if layer.layered and layer.index == "*":
        watch = Watch(model, [text.replace("[*]", "[0]")])
        try:
            with inference(model), torch.no_grad():
                args, options = arguments(copied(inputs))
                count = len(layers_of(model, called(model, args, options, watch._options), layer))  # noqa: SLF001 - of this file
        finally:
            watch.close()
        return [text.replace("[*]", f"[{place}]") for place in range(count)]
    if layer.path == "penultimate":
        return [f"{_last_layer(model, inputs)}:in"]
    if layer.layered or layer.of_outputs or not ("*" in layer.path or layer.index):
        return [text]
    fits = re.compile(pattern(layer.path))
    paths = [path for path, _ in model.named_modules() if path and fits.fullmatch(path)]
    if not paths:
        known = [path for path, _ in model.named_modules() if path]
        raise UnknownNameError(f"layer in {type(model).__name__}", layer.path, known)
    if layer.index and layer.index != "*":
        if not -len(paths) <= int(layer.index) < len(paths):
            raise UsageError(f"{layer.path!r} fits {len(paths)} modules; there is no [{layer.index}] of them.")
        paths = [paths[int(layer.index)]]
    behind = text[len(layer.path) :].partition("[")[0]
    return [path + behind for path in paths]


def _last_layer(model: nn.Module, inputs: Any) -> str:
    """Path of the last module with weights of its own, whose output is the scores or becomes them without others.

    Raises:
        UsageError: the scores are computed by code that is no module of its own.
    """
    made: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, path=path: made.update({path: out}))
        for path, module in model.named_modules()
        if path and not any(module.children()) and not closed(module)
    ]
    try:
        with inference(model), torch.no_grad():
            args, options = arguments(copied(inputs))
            scores = logits_of(called(model, args, options))
    finally:
        for handle in handles:
            handle.remove()
    last = [
        path
        for path, out in made.items()
        if isinstance(out, torch.Tensor)
        and out.data_ptr() == scores.data_ptr()
        and not isinstance(model.get_submodule(path), EMPTY)
    ]
    if not last:
        raise UsageError(
            f"The scores of {type(model).__name__} are made by no layer of its own, so there is no penultimate value.",
            fix='Name the place: the path of a module, with ":in" for what it is given.',
        )
    weighted = [path for path in made if any(True for _ in model.get_submodule(path).parameters())]
    if last[-1] in weighted:
        return last[-1]
    out = made[weighted[-1]] if weighted else None  # what a pooling or a softmax is given are scores, too
    if not isinstance(out, torch.Tensor) or scores.shape[-1] not in (out.shape[1], out.shape[-1]):
        raise UsageError(
            f"The last weights of {type(model).__name__} do not make its scores, so there is no penultimate value.",
            fix='Name the place: the path of a module, with ":in" for what it is given.',
        )
    return weighted[-1]


def shapes(model: nn.Module, inputs: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Path and output shape of each module that runs once, in the order in which they end; a tuple's first part."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def note(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) and out else out
            if isinstance(first, torch.Tensor):
                found.append((path, tuple(first.shape)))

        return hook

    handles = [
        module.register_forward_hook(note(path))
        for path, module in model.named_modules()
        if path and not closed(module)
    ]
    try:
        with inference(model), torch.no_grad():
            args, options = arguments(copied(inputs))
            called(model, args, options)
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(path for path, _ in found)
    return [(path, shape) for path, shape in found if times[path] == 1]
