"""Sites of a PyTorch model: how they are found, and a run that keeps what is computed there."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.pytorch.outputs import named
from kirsch.frameworks.pytorch.predict import arguments, inference, logits_of
from kirsch.frameworks.sites import Site, pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.frameworks.sites import Key

EMPTY = (nn.Identity, nn.Dropout, nn.Flatten)
"""Layers that may stand behind the last one and put out what they are given."""

ASKED = {"hidden": "output_hidden_states", "attention": "output_attentions"}
"""By which keyword models of transformers are asked to put out what."""


class Watch:
    """Runs a model and keeps what it computes at some sites. Its hooks stay until `close`.

    Args:
        model: called in its present mode.
        sites: concrete ones, as `expand` gives them.

    Raises:
        UnknownNameError: the model has no such module.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str]) -> None:
        self.model = model
        self.sites = [Site.read(text) for text in dict.fromkeys(sites)]
        self._options = {ASKED[s.layered[2]]: True for s in self.sites if s.layered}
        self._seen: dict[Key, list[Any]] = {}
        self._inside: list[str] = []
        places = dict.fromkeys(s.key for s in self.sites if not s.layered and not s.of_outputs)
        self._functions = {key[:2] for key in places if key[1]}
        self._handles: list[Any] = []
        modules = dict(model.named_modules())
        # A module needs one hook for all functions that its forward calls.
        for path, inside, given in dict.fromkeys((path, bool(f), given and not f) for path, f, given in places):
            if path not in modules:
                raise UnknownNameError(f"site in {type(model).__name__}", path, [name for name in modules if name])
            self._hook(modules[path], path, given=given, inside=inside)

    def _hook(self, module: nn.Module, path: str, *, given: bool, inside: bool) -> None:
        def enter(_module: nn.Module, _args: Any) -> None:
            self._inside.append(path)

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            self._inside.pop()

        def keep_given(_module: nn.Module, args: Any, options: Any) -> None:
            self._keep((path, "", True), args[0] if args else next(iter(options.values())))

        def keep_made(_module: nn.Module, _args: Any, out: Any) -> None:
            self._keep((path, "", False), out)

        if inside:
            self._handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        elif given:
            self._handles.append(module.register_forward_pre_hook(keep_given, with_kwargs=True))
        else:
            self._handles.append(module.register_forward_hook(keep_made))

    def _keep(self, key: Key, value: Any) -> None:
        self._seen.setdefault(key, []).append(value)

    def __call__(self, inputs: Any) -> dict[str, Any]:
        """The values at the sites for one batch, by the text of the site.

        Raises:
            UsageError: a place runs several times and the site does not say which is meant, or it does not run.
        """
        args, options = arguments(inputs)
        self._seen.clear()
        self._inside.clear()
        functions = _Calls(self._functions, self._inside, self._keep) if self._functions else contextlib.nullcontext()
        try:
            with functions:
                outputs = self.model(*args, **options, **self._options)
            return {site.text: self._value(site, outputs) for site in self.sites}
        finally:
            self._seen.clear()

    def _value(self, site: Site, outputs: Any) -> Any:
        if site.layered:
            layers = layers_of(self.model, outputs, site)
            if not -len(layers) <= int(site.index) < len(layers):
                raise UsageError(f"There is no {site.text}: the model puts out {len(layers)} of them, from 0 on.")
            return layers[int(site.index)]
        if site.path == "logits":
            return logits_of(outputs)
        if site.of_outputs:
            found = named(outputs)
            name = site.path.removeprefix("output.")
            if name not in found:
                raise UnknownNameError("output", name, found)
            return found[name]
        return _item(self._call(site), site)

    def _call(self, site: Site) -> Any:
        calls = self._seen.get(site.key, [])
        what = f"`{site.path}` calls {site.function}" if site.function else f"`{site.path}` runs"
        if not calls:
            raise UsageError(
                f"{what} in no forward of {type(self.model).__name__}, so {site.text!r} has no value.",
                mend="Name a place that the forward goes through.",
            )
        if site.call is None and len(calls) > 1:
            raise UsageError(
                f"{what} {len(calls)} times in one forward, and {site.text!r} does not say which is meant.",
                mend=f"Write #0 behind it for the first, up to #{len(calls) - 1}.",
            )
        if (site.call or 0) >= len(calls):
            raise UsageError(
                f"{what} {len(calls)} times in one forward; there is no call #{site.call}, as they count from 0."
            )
        return calls[site.call or 0]

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()


class _Calls(TorchFunctionMode):
    """Keeps what some functions are given and give, in the forward of some modules."""

    def __init__(self, wanted: set[tuple[str, str]], inside: list[str], keep: Callable[[Key, Any], None]) -> None:
        self.wanted, self.inside, self.keep = wanted, inside, keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        where = (self.inside[-1] if self.inside else "", getattr(func, "__name__", "").strip("_"))
        options = kwargs or {}
        if where not in self.wanted:
            return func(*args, **options)
        self.keep((*where, True), args[0] if args else next(iter(options.values())))
        out = func(*args, **options)
        self.keep((*where, False), out)
        return out


def layers_of(model: nn.Module, outputs: Any, site: Site) -> Sequence[Any]:
    """The states or weights of all layers among the outputs of a model of transformers.

    Raises:
        UsageError: the model puts out none.
    """
    part, kind = site.layered.groups() if site.layered else ("", "")
    name = {"hidden": "hidden_states", "attention": "attentions"}[kind]
    fields = [f"{part}_{name}"] if part else [name, f"decoder_{name}", f"encoder_{name}"]
    found = next((getattr(outputs, field) for field in fields if getattr(outputs, field, None)), None)
    if found is None or any(layer is None for layer in found):
        raise UsageError(
            f"{type(model).__name__} puts out no {' or '.join(fields)}, so {site.text!r} has no value.",
            "Fused attention never has weights to put out." if kind == "attention" else "",
            'Build it with attn_implementation="eager".' if kind == "attention" else "Name a module instead.",
        )
    layers: Sequence[Any] = found
    return layers


def _item(value: Any, site: Site) -> Any:
    """The tensor that is meant of what a module puts out: itself, or the named, numbered or first part of several."""
    if isinstance(value, torch.Tensor):
        return value
    parts = named(value)
    name = site.item or next(iter(parts), "")
    if name not in parts:
        raise UnknownNameError(f"part of what `{site.path}` puts out", name, parts)
    return parts[name]


def expand(model: nn.Module, text: str, inputs: Any) -> list[str]:
    """The concrete sites that a text names, in the order of the model's modules or layers: one, or all that fit.

    Args:
        model: run once in inference mode where layers must be counted, or the last layer found.
        text: a site, perhaps with a pattern.
        inputs: one batch, for that run.

    Raises:
        UnknownNameError: nothing fits.
        UsageError: the model has no last layer, or puts out no states of layers.
    """
    site = Site.read(text)
    if site.layered and site.index == "*":
        watch = Watch(model, [text.replace("[*]", "[0]")])
        try:
            with inference(model), torch.no_grad():
                args, options = arguments(inputs)
                count = len(layers_of(model, model(*args, **options, **watch._options), site))  # noqa: SLF001 - of this file
        finally:
            watch.close()
        return [text.replace("[*]", f"[{place}]") for place in range(count)]
    if site.path == "penultimate":
        return [f"{_last_layer(model, inputs)}:in"]
    if site.layered or site.of_outputs or not ("*" in site.path or site.index):
        return [text]
    fits = re.compile(pattern(site.path))
    paths = [path for path, _ in model.named_modules() if path and fits.fullmatch(path)]
    if not paths:
        known = [path for path, _ in model.named_modules() if path]
        raise UnknownNameError(f"site in {type(model).__name__}", site.path, known)
    if site.index and site.index != "*":
        if not -len(paths) <= int(site.index) < len(paths):
            raise UsageError(f"{site.path!r} fits {len(paths)} modules; there is no [{site.index}] of them.")
        paths = [paths[int(site.index)]]
    behind = text[len(site.path) :].partition("[")[0]
    return [path + behind for path in paths]


def _last_layer(model: nn.Module, inputs: Any) -> str:
    """Path of the module whose output is the scores.

    Raises:
        UsageError: the scores are computed by code that is no module of its own.
    """
    made: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, path=path: made.update({path: out}))
        for path, module in model.named_modules()
        if path and not any(module.children())
    ]
    try:
        with inference(model), torch.no_grad():
            args, options = arguments(inputs)
            scores = logits_of(model(*args, **options))
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
            mend='Name the place: the path of a module, with ":in" for what it is given.',
        )
    return last[-1]


def shapes(model: nn.Module, inputs: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Path and output shape of each module that puts out one tensor and runs once, in the order in which they end."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def note(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, torch.Tensor):
                found.append((path, tuple(out.shape)))

        return hook

    handles = [module.register_forward_hook(note(path)) for path, module in model.named_modules() if path]
    try:
        with inference(model), torch.no_grad():
            args, options = arguments(inputs)
            model(*args, **options)
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(path for path, _ in found)
    return [(path, shape) for path, shape in found if times[path] == 1]


def dry_run(model: nn.Module, sites: Sequence[str], inputs: Any) -> dict[str, Any]:
    """The values at some sites for one batch, in inference mode and without gradient; the model is left as it is."""
    watch = Watch(model, sites)
    try:
        with inference(model), torch.no_grad():
            return watch(inputs)
    finally:
        watch.close()
