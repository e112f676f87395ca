"""Capture the features of some layers while a PyTorch model runs."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from kirsch.errors import UnknownNameError, UsageError
from kirsch.frameworks.layers import OUTPUT, LayerName
from kirsch.frameworks.pytorch.inference.outputs import named
from kirsch.frameworks.pytorch.inference.predict import arguments, call_model, copied, inference, logits_of, tensors
from kirsch.frameworks.pytorch.modules.unsupported import check_values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kirsch.frameworks.layers import Key

OUTPUT_KEYWORDS = {"hidden": "output_hidden_states", "attention": "output_attentions"}
"""Keywords by which models of the transformers library return hidden states and attention weights."""

OUTPUT_NAMES = ("logits", "penultimate", "hidden", "attention")
"""Names of layers that are not modules."""

MAX_LISTED = 4

FUSED_ATTENTION = "scaled_dot_product_attention"
EAGER = 'Build the model without fused attention; in the transformers library, with attn_implementation="eager".'


class FeatureCapture:
    """Runs a model and returns the features of some layers. The hooks stay in the model until `close`.

    A feature may be overwritten in place later in the forward pass, as by `nn.ReLU(inplace=True)`. The feature is
    returned as it was at the layer. The first run copies all features and records which of them are overwritten; later
    runs copy only these features. Likewise, the inputs are copied in the first run of each mode, and in later runs only
    if the model writes into them.

    Args:
        model: the model, which is called in its current mode.
        layers: layers without patterns, as returned by `expand`.

    Raises:
        UnknownNameError: the model has no such module.
        UsageError: a layer is TorchScript, which does not support hooks, or the model cannot return hidden states.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model = model
        self.layers = [LayerName.read(text) for text in dict.fromkeys(layers)]
        self._options = {_output_keyword(model, layer): True for layer in self.layers if layer.layered}
        self._values: dict[Key, list[Any]] = {}
        self._versions: dict[tuple[Key, int], list[tuple[torch.Tensor, int]]] = {}
        self._overwritten: dict[tuple[Key, int], bool] = {}
        self._writes: dict[bool, bool] = {}  # training mode or not → whether the model writes into its inputs
        self._called: dict[str, set[str]] = {}
        self._inside: list[str] = []
        self._running = False
        keys = dict.fromkeys(layer.key for layer in self.layers if not layer.layered and not layer.of_outputs)
        self._functions = {key[:2] for key in keys if key[1]}
        self._handles: list[Any] = []
        modules = dict(model.named_modules())
        for path in (path for path, _, _ in keys if path not in modules):  # checked before any hook is set
            raise UnknownNameError(
                f"layer in {type(model).__name__} named", path, [*filter(None, modules), *OUTPUT_NAMES]
            )
        for path in (path for path, _, _ in keys if is_torchscript(modules[path])):
            raise UsageError(
                f"{_quoted(path) if path else 'The model'} is TorchScript, which does not support hooks.",
                fix="Use losses on the logits, or the model from which it was compiled.",
            )
        for path, function, of_input in keys:
            if not function:
                self._hook(modules[path], path, of_input=of_input)
        # A function that the code of a submodule calls does not count as called by the module: a batch norm adds to a
        # counter, for example, and this is not an `add` of the module that contains it.
        for path, module in modules.items() if self._functions else ():
            is_inside = any(not parent or f"{path}.".startswith(f"{parent}.") for parent, _ in self._functions)
            if is_inside and not is_torchscript(module):
                self._track_running(module, path)

    def _track_running(self, module: nn.Module, path: str) -> None:
        def enter(_module: nn.Module, _args: Any) -> None:
            self._inside.append(path)

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            self._inside.pop()

        self._handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def _hook(self, module: nn.Module, path: str, *, of_input: bool) -> None:
        def keep_input(_module: nn.Module, args: Any, options: Any) -> None:
            self._keep((path, "", True), args[0] if args else next(iter(options.values())))

        def keep_output(_module: nn.Module, _args: Any, out: Any) -> None:
            self._keep((path, "", False), out)

        if of_input:
            self._handles.append(module.register_forward_pre_hook(keep_input, with_kwargs=True))
        else:
            self._handles.append(module.register_forward_hook(keep_output))

    def _keep(self, key: Key, value: Any) -> None:
        if not self._running:  # values of calls by other code, or of a recomputed checkpoint, would fill the memory
            return
        calls = self._values.setdefault(key, [])
        call = key, len(calls)
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - not public; the `clone` below is not a call by the model
            self._versions[call] = [
                (part, part._version)  # noqa: SLF001 - nothing else shows a change in place
                for part in tree_leaves(value)
                if isinstance(part, torch.Tensor) and not part.is_inference()
            ]
            if self._overwritten.get(call, True):
                value = tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, value)
        calls.append(value)

    def _check_overwritten(self) -> None:
        """Record which features were overwritten after they were captured.

        Raises:
            UsageError: a feature was overwritten and had not been copied, because earlier runs did not overwrite it.
        """
        for call, parts in self._versions.items():
            changed = any(part._version != version for part, version in parts)  # noqa: SLF001 - as above
            if changed and not self._overwritten.get(call, True):
                path, function, _ = call[0]
                location = _quoted(f"{path}/{function}" if function else path)
                raise UsageError(
                    f"The value at {location} is overwritten in place in this forward pass of "
                    f"{type(self.model).__name__}, and was not overwritten in earlier ones.",
                    fix="Choose another layer, or compute the value without in-place operations.",
                )
            self._overwritten[call] = self._overwritten.get(call, False) or changed

    def __call__(self, inputs: Any) -> dict[str, Any]:
        """Return the features for one batch, by layer name.

        Raises:
            UsageError: a layer runs several times and its name does not state which call, or a layer does not run.
            UnknownNameError: the code of a module does not call the function, or an output has no such name.
        """
        # While PyTorch compiles the model, tensors have no version counters, so that no write is detected.
        mode, compiling = self.model.training, torch.compiler.is_compiling()
        copies = compiling or self._writes.get(mode, True)
        inputs = copied(inputs) if copies else inputs
        args, options = arguments(inputs)
        parts = [] if compiling else [part for part in tree_leaves(inputs) if isinstance(part, torch.Tensor)]
        versions = [_version(part) for part in parts]
        self._clear()
        self._inside.clear()
        functions: Any = contextlib.nullcontext()
        if self._functions:
            functions = _FunctionCapture(self._functions, self._inside, self._keep, self._called)
        try:
            self._running = True
            with functions:
                outputs = call_model(self.model, args, options, self._options)
            self._check_overwritten()
            writes = None in versions or [_version(part) for part in parts] != versions
            if writes and not copies:
                raise UsageError(
                    f"{type(self.model).__name__} writes into its inputs in this forward pass, unlike in earlier ones.",
                    "Other models would get changed data.",
                    "Start its `forward` method with inputs = inputs.clone().",
                )
            if not compiling:
                self._writes[mode] = writes
            return {layer.text: self._value(layer, outputs) for layer in self.layers}
        finally:
            self._running = False
            self._clear()

    def _clear(self) -> None:
        """Release all features and their graphs."""
        self._values.clear()
        self._versions.clear()

    def _value(self, layer: LayerName, outputs: Any) -> Any:
        if layer.layered:
            layers = layers_of(self.model, outputs, layer)
            if not -len(layers) <= int(layer.index) < len(layers):
                raise UsageError(f"There is no {layer.text}: the model returns {len(layers)} layers, numbered from 0.")
            return layers[int(layer.index)]
        if layer.path == "logits":
            return logits_of(outputs)
        if layer.of_outputs:
            available = named(outputs)
            name = layer.path.removeprefix(OUTPUT)
            if name not in available:
                raise UnknownNameError("output", name, available)
            return available[name]
        return _item(self._call(layer), layer)

    def _call(self, layer: LayerName) -> Any:
        calls = self._values.get(layer.key, [])
        subject = f"{_quoted(layer.path)} {f'calls {layer.function}' if layer.function else 'runs'}"
        if not calls and layer.function and self._called:
            raise self._function_error(layer)
        if not calls:
            raise UsageError(
                f"{subject} in no forward pass of {type(self.model).__name__}, so {layer.text!r} has no value.",
                *self._reason_and_fix(),
            )
        if layer.call is None and len(calls) > 1:
            raise UsageError(
                f"{subject} {len(calls)} times in one forward pass, and {layer.text!r} does not state which call.",
                fix=f"Append #0 for the first call, up to #{len(calls) - 1}.",
            )
        if (layer.call or 0) >= len(calls):
            raise UsageError(
                f"{subject} {len(calls)} times in one forward pass; "
                f"calls are numbered from 0, so #{layer.call} does not exist."
            )
        return calls[layer.call or 0]

    def _reason_and_fix(self) -> tuple[str, str]:
        """Return why a layer may not run, and how to fix it."""
        if not any(isinstance(module, torch._dynamo.OptimizedModule) for module in self.model.modules()):  # noqa: SLF001 - has no public name
            return "", "Choose a layer that runs in the forward pass."
        return (
            "A compiled model that has run does not call hooks that are added later.",
            (
                "Pass the model before compilation. To compile in a loop with kirsch.Distiller, compile "
                "distiller.module and call distiller(batch, epoch, module=compiled)."
            ),
        )

    def _function_error(self, layer: LayerName) -> Exception:
        """Return the error for a function that the code of a module does not call."""
        inner = [path for path, names in self._called.items() if layer.function in names and path != layer.path]
        if inner:
            listed = ", ".join(f"`{path}`" for path in inner[:MAX_LISTED])
            return UsageError(
                f"{_quoted(layer.path)} does not call {layer.function} itself; {listed} does.",
                fix=f'Write "{inner[0]}/{layer.function}".',
            )
        called_functions = self._called.get(layer.path, ())
        if FUSED_ATTENTION in called_functions:
            return UsageError(
                f"{_quoted(layer.path)} does not call {layer.function}: it calls {FUSED_ATTENTION}.",
                "Fused attention returns no attention scores or weights.",
                EAGER,
            )
        return UnknownNameError(f"function that {_quoted(layer.path)} calls", layer.function, called_functions)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear()


def _output_keyword(model: nn.Module, layer: LayerName) -> str:
    """Return the keyword by which a model returns the hidden states or attention weights of its layers.

    Raises:
        UsageError: the `forward` of the model has no such keyword.
    """
    name = OUTPUT_KEYWORDS[layer.layered[2]] if layer.layered else ""
    parameters = inspect.signature(model.forward).parameters
    if name not in parameters and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise UsageError(
            f"{type(model).__name__} does not take the keyword {name}, so {layer.text!r} has no value.",
            "Models of the transformers library take this keyword.",
            "Choose the module that computes the value.",
        )
    return name


def _version(tensor: torch.Tensor) -> int | None:
    """Return how often a tensor was written into; None if PyTorch does not count it."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 - nothing else shows a change in place


def is_torchscript(module: nn.Module) -> bool:
    """Return whether a module is TorchScript, which does not support hooks."""
    return isinstance(module, torch.jit.ScriptModule)


def _quoted(path: str) -> str:
    return f"`{path}`" if path else "the model"


class _FunctionCapture(TorchFunctionMode):
    """Captures the input and output of functions that the code of modules calls.

    Args:
        captured: path of a module and name of a function, for each function to capture.
        inside: paths of the modules whose code is running, the innermost last.
        keep: called with the key and the value of each captured input and output.
        called: path of a module → names of the other functions that its code calls; filled by this class.
    """

    def __init__(
        self,
        captured: set[tuple[str, str]],
        inside: list[str],
        keep: Callable[[Key, Any], None],
        called: dict[str, set[str]],
    ) -> None:
        self.captured, self.inside, self.keep, self.record_name = captured, inside, keep, called

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", "").strip("_"), kwargs or {}
        if not self.inside:
            return func(*args, **options)
        path = self.inside[-1]
        if (path, name) not in self.captured:
            out = func(*args, **options)
            if isinstance(out, torch.Tensor) and name != "get":  # "get" is the name of an attribute access
                self.record_name.setdefault(path, set()).add(name)
            return out
        self.keep((path, name, True), args[0] if args else next(iter(options.values())))
        out = func(*args, **options)
        self.keep((path, name, False), out)
        return out


def layers_of(model: nn.Module, outputs: Any, layer: LayerName) -> Sequence[Any]:
    """Return the hidden states or attention weights of all layers from the outputs of a transformers model.

    Raises:
        UsageError: the outputs do not contain the hidden states or attention weights.
    """
    part, kind = layer.layered.groups() if layer.layered else ("", "")
    name = {"hidden": "hidden_states", "attention": "attentions"}[kind]
    fields = [f"{part}_{name}"] if part else [name, f"decoder_{name}", f"encoder_{name}"]
    values = next((getattr(outputs, field) for field in fields if getattr(outputs, field, None)), None)
    if values is None or any(value is None for value in values):
        raise UsageError(
            f"{type(model).__name__} returns no {' or '.join(fields)}, so {layer.text!r} has no value.",
            "Fused attention does not compute weights." if kind == "attention" else "",
            EAGER if kind == "attention" else "Choose a module instead.",
        )
    layers: Sequence[Any] = values
    return layers


def _item(value: Any, layer: LayerName) -> Any:
    """Return the output of a module, or the named, numbered or first part of several outputs."""
    if isinstance(value, torch.Tensor):
        return value
    parts = named(value)
    name = layer.item or next(iter(parts), "")
    if name not in parts:
        raise UnknownNameError(f"output of `{layer.path}` named", name, parts)
    return parts[name]


def dry_run(model: nn.Module, layers: Sequence[str], inputs: Any) -> dict[str, Any]:
    """Return the features of layers for one batch, in inference mode and without gradient; the model is not changed."""
    capture = FeatureCapture(model, layers)
    try:
        with inference(model), torch.no_grad():
            return capture(inputs)
    finally:
        capture.close()


def extract(model: nn.Module, layers: Sequence[str], inputs: Any) -> dict[str, Any]:
    """Return the features of layers for one batch; see `dry_run`.

    Raises:
        ModelError: a parameter is on the meta device and has no values.
    """
    check_values(model)
    return dry_run(model, layers, tensors(inputs, model))


def capture(model: nn.Module, layers: Sequence[str]) -> FeatureCapture:
    """Return a function inputs → features by layer, which runs the model."""
    return FeatureCapture(model, layers)
