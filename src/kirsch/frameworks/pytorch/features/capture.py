"""A run of a PyTorch model that keeps what is computed at some layers."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.layers import LayerName
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.inference.predict import arguments, called, copied, inference, logits_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.frameworks.layers import Key

ASKED = {"hidden": "output_hidden_states", "attention": "output_attentions"}
"""By which keyword models of transformers are asked to put out what."""

OTHERS = ("logits", "penultimate", "hidden", "attention")
"""Places that are no modules."""

MOST_NAMED = 4


class Watch:
    """Runs a model and keeps what it computes at some layers. Its hooks stay until `close`.

    What is overwritten in place later in the forward, as by `nn.ReLU(inplace=True)`, is kept as it was at the layer.
    Since that is not known before, the first run copies all values, and the others those alone. So it is with the
    inputs: a model that writes into them is given copies, the first run in each mode included.

    Args:
        model: called in its present mode.
        layers: concrete ones, as `expand` gives them.

    Raises:
        UnknownNameError: the model has no such module.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model = model
        self.layers = [LayerName.read(text) for text in dict.fromkeys(layers)]
        self._options = {_asked(model, s): True for s in self.layers if s.layered}
        self._seen: dict[Key, list[Any]] = {}
        self._versions: dict[tuple[Key, int], list[tuple[torch.Tensor, int]]] = {}
        self._overwritten: dict[tuple[Key, int], bool] = {}
        self._writes: dict[bool, bool] = {}  # into its inputs, in training mode and in inference mode
        self._called: dict[str, set[str]] = {}
        self._inside: list[str] = []
        self._running = False
        places = dict.fromkeys(s.key for s in self.layers if not s.layered and not s.of_outputs)
        self._functions = {key[:2] for key in places if key[1]}
        self._handles: list[Any] = []
        modules = dict(model.named_modules())
        for path in (path for path, _, _ in places if path not in modules):  # before there is any hook
            raise UnknownNameError(f"layer in {type(model).__name__}", path, [*filter(None, modules), *OTHERS])
        for path in (path for path, _, _ in places if closed(modules[path])):
            raise UsageError(
                f"{_quoted(path) if path else 'The model'} is TorchScript, which lets nobody look inside.",
                fix="Take losses on the scores, or give the model that it was made of.",
            )
        for path, function, given in places:
            if not function:
                self._hook(modules[path], path, given=given)
        # What modules within call is not the code of the module itself: in training a norm adds to a counter, too.
        for path, module in modules.items() if self._functions else ():
            within = any(not around or f"{path}.".startswith(f"{around}.") for around, _ in self._functions)
            if within and not closed(module):
                self._hook_code(module, path)

    def _hook_code(self, module: nn.Module, path: str) -> None:
        def enter(_module: nn.Module, _args: Any) -> None:
            self._inside.append(path)

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            self._inside.pop()

        self._handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def _hook(self, module: nn.Module, path: str, *, given: bool) -> None:
        def keep_given(_module: nn.Module, args: Any, options: Any) -> None:
            self._keep((path, "", True), args[0] if args else next(iter(options.values())))

        def keep_made(_module: nn.Module, _args: Any, out: Any) -> None:
            self._keep((path, "", False), out)

        if given:
            self._handles.append(module.register_forward_pre_hook(keep_given, with_kwargs=True))
        else:
            self._handles.append(module.register_forward_hook(keep_made))

    def _keep(self, key: Key, value: Any) -> None:
        if not self._running:  # a model that others call too, or whose forward is computed again, would fill the memory
            return
        calls = self._seen.setdefault(key, [])
        place = key, len(calls)
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - has no public name; a copy is no call of the model's
            self._versions[place] = [
                (part, part._version)  # noqa: SLF001 - the only witness of a change in place
                for part in tree_leaves(value)
                if isinstance(part, torch.Tensor) and not part.is_inference()
            ]
            if self._overwritten.get(place, True):
                value = tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, value)
        calls.append(value)

    def _settle(self) -> None:
        """Learn which values were overwritten after they had been kept.

        Raises:
            UsageError: one was that never had been before, so that its value is lost.
        """
        for place, parts in self._versions.items():
            changed = any(part._version != version for part, version in parts)  # noqa: SLF001 - as above
            if changed and not self._overwritten.get(place, True):
                path, function, _ = place[0]
                where = _quoted(f"{path}/{function}" if function else path)
                raise UsageError(
                    f"The value at {where} is overwritten in place in this forward of {type(self.model).__name__}, and "
                    "was not before.",
                    fix="Name another place, or compute it without changing tensors in place.",
                )
            self._overwritten[place] = self._overwritten.get(place, False) or changed

    def __call__(self, inputs: Any) -> dict[str, Any]:
        """The values at the layers for one batch, by the text of the layer.

        Raises:
            UsageError: a place runs several times and the layer does not say which is meant, or it does not run.
            UnknownNameError: the code of a module calls no such function, or nothing of that name is put out.
        """
        mode, compiling = self.model.training, torch.compiler.is_compiling()  # which knows no versions
        apart = compiling or self._writes.get(mode, True)
        inputs = copied(inputs) if apart else inputs
        args, options = arguments(inputs)
        parts = [] if compiling else [part for part in tree_leaves(inputs) if isinstance(part, torch.Tensor)]
        versions = [_version(part) for part in parts]
        self._clear()
        self._inside.clear()
        functions: Any = contextlib.nullcontext()
        if self._functions:
            functions = _Calls(self._functions, self._inside, self._keep, self._called)
        try:
            self._running = True
            with functions:
                outputs = called(self.model, args, options, self._options)
            self._settle()
            writes = None in versions or [_version(part) for part in parts] != versions
            if writes and not apart:
                raise UsageError(
                    f"{type(self.model).__name__} writes into its inputs in this forward, and did not before.",
                    "What others are given would no longer be what is in the data.",
                    "Let its forward begin with inputs = inputs.clone().",
                )
            if not compiling:
                self._writes[mode] = writes
            return {layer.text: self._value(layer, outputs) for layer in self.layers}
        finally:
            self._running = False
            self._clear()

    def _clear(self) -> None:
        """Let go of all values, and with them of the graphs behind."""
        self._seen.clear()
        self._versions.clear()

    def _value(self, layer: LayerName, outputs: Any) -> Any:
        if layer.layered:
            layers = layers_of(self.model, outputs, layer)
            if not -len(layers) <= int(layer.index) < len(layers):
                raise UsageError(f"There is no {layer.text}: the model puts out {len(layers)} of them, from 0 on.")
            return layers[int(layer.index)]
        if layer.path == "logits":
            return logits_of(outputs)
        if layer.of_outputs:
            found = named(outputs)
            name = layer.path.removeprefix("output.")
            if name not in found:
                raise UnknownNameError("output", name, found)
            return found[name]
        return _item(self._call(layer), layer)

    def _call(self, layer: LayerName) -> Any:
        calls = self._seen.get(layer.key, [])
        what = f"{_quoted(layer.path)} {f'calls {layer.function}' if layer.function else 'runs'}"
        if not calls and layer.function and self._called:
            self._refuse_function(layer)
        if not calls:
            raise UsageError(
                f"{what} in no forward of {type(self.model).__name__}, so {layer.text!r} has no value.",
                *self._elsewhere(),
            )
        if layer.call is None and len(calls) > 1:
            raise UsageError(
                f"{what} {len(calls)} times in one forward, and {layer.text!r} does not say which is meant.",
                fix=f"Write #0 behind it for the first, up to #{len(calls) - 1}.",
            )
        if (layer.call or 0) >= len(calls):
            raise UsageError(
                f"{what} {len(calls)} times in one forward; there is no call #{layer.call}, as they count from 0."
            )
        return calls[layer.call or 0]

    def _elsewhere(self) -> tuple[str, str]:
        """Why a place may not run, and what to do."""
        if not any(isinstance(module, torch._dynamo.OptimizedModule) for module in self.model.modules()):  # noqa: SLF001 - has no public name
            return "", "Name a place that the forward goes through."
        return (
            "A compiled forward that has run knows of no place to look at.",
            "Give the model that it was made of. A loop of one's own may compile distiller.module, given as module=.",
        )

    def _refuse_function(self, layer: LayerName) -> None:
        """Raise the error for a function that a module does not call itself."""
        inner = [path for path, names in self._called.items() if layer.function in names and path != layer.path]
        if inner:
            within = ", ".join(f"`{path}`" for path in inner[:MOST_NAMED])
            raise UsageError(
                f"{_quoted(layer.path)} calls no {layer.function} itself; {within} does.",
                fix=f'Write "{inner[0]}/{layer.function}".',
            )
        raise UnknownNameError(
            f"function that {_quoted(layer.path)} calls", layer.function, self._called.get(layer.path, ())
        )

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear()


def _asked(model: nn.Module, layer: LayerName) -> str:
    """The keyword by which a model is asked to put out the states or weights of its layers.

    Raises:
        UsageError: its forward knows none.
    """
    name = ASKED[layer.layered[2]] if layer.layered else ""
    taken = inspect.signature(model.forward).parameters
    if name not in taken and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        raise UsageError(
            f"{type(model).__name__} cannot be asked for {name}, so {layer.text!r} has no value.",
            "Models of transformers take that keyword.",
            "Name the module that computes it instead.",
        )
    return name


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written into; None where PyTorch does not count."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 - the only witness of a change in place


def closed(module: nn.Module) -> bool:
    """Whether a module takes no hooks."""
    return isinstance(module, torch.jit.ScriptModule)


def _quoted(path: str) -> str:
    return f"`{path}`" if path else "the model"


class _Calls(TorchFunctionMode):
    """Keeps what some functions are given and give in the code of some modules, and which others those call."""

    def __init__(
        self,
        wanted: set[tuple[str, str]],
        inside: list[str],
        keep: Callable[[Key, Any], None],
        called: dict[str, set[str]],
    ) -> None:
        self.wanted, self.inside, self.keep, self.called = wanted, inside, keep, called

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", "").strip("_"), kwargs or {}
        if not self.inside:
            return func(*args, **options)
        path = self.inside[-1]
        if (path, name) not in self.wanted:
            out = func(*args, **options)
            if isinstance(out, torch.Tensor) and name != "get":  # under which attributes pass for functions
                self.called.setdefault(path, set()).add(name)
            return out
        self.keep((path, name, True), args[0] if args else next(iter(options.values())))
        out = func(*args, **options)
        self.keep((path, name, False), out)
        return out


def layers_of(model: nn.Module, outputs: Any, layer: LayerName) -> Sequence[Any]:
    """The states or weights of all layers among the outputs of a model of transformers.

    Raises:
        UsageError: the model puts out none.
    """
    part, kind = layer.layered.groups() if layer.layered else ("", "")
    name = {"hidden": "hidden_states", "attention": "attentions"}[kind]
    fields = [f"{part}_{name}"] if part else [name, f"decoder_{name}", f"encoder_{name}"]
    found = next((getattr(outputs, field) for field in fields if getattr(outputs, field, None)), None)
    if found is None or any(layer is None for layer in found):
        raise UsageError(
            f"{type(model).__name__} puts out no {' or '.join(fields)}, so {layer.text!r} has no value.",
            "Fused attention never has weights to put out." if kind == "attention" else "",
            'Build it with attn_implementation="eager".' if kind == "attention" else "Name a module instead.",
        )
    layers: Sequence[Any] = found
    return layers


def _item(value: Any, layer: LayerName) -> Any:
    """The tensor that is meant of what a module puts out: itself, or the named, numbered or first part of several."""
    if isinstance(value, torch.Tensor):
        return value
    parts = named(value)
    name = layer.item or next(iter(parts), "")
    if name not in parts:
        raise UnknownNameError(f"part of what `{layer.path}` puts out", name, parts)
    return parts[name]


def dry_run(model: nn.Module, layers: Sequence[str], inputs: Any) -> dict[str, Any]:
    """The values at some layers for one batch, in inference mode and without gradient; the model is left as it is."""
    watch = Watch(model, layers)
    try:
        with inference(model), torch.no_grad():
            return watch(inputs)
    finally:
        watch.close()
