"""Raise errors for models that cannot be traced, trained or exported, before any work is done."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.modules.interpreted import graph_in

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized", "bitsandbytes")
"""Packages of modules with quantized weights."""

OBSERVING = ("torch.ao.quantization", "torchao.quantization")
"""Packages of modules that observe activations for quantization."""

EXPORT_FIRST = "Export the floating-point model, and quantize the file: onnxruntime.quantization.quantize_dynamic."
PRUNE_FIRST = "Prune the floating-point model first, and quantize the pruned one."


def check(model: nn.Module) -> None:
    """Raise an error if a model is of a kind that cannot be traced and cut.

    Raises:
        ModelError: the model is of such a kind. The message names the part, its kind, and what to use instead.
    """
    for why, fix in reasons(model):
        raise _untraceable(model, why, fix)
    shared = _overlapping(model)
    if shared is not None:
        raise _untraceable(
            model,
            f"Its parameters `{shared[0]}` and `{shared[1]}` are two objects in the same memory. A cut would copy them "
            "and separate their values.",
            f"Assign the same parameter to both, or copy the memory of `{shared[1]}`: .data.clone().",
        )


def check_trainable(model: nn.Module) -> None:
    """Raise an error if the parameters of a model cannot be trained.

    Raises:
        ModelError: a parameter cannot be trained. The message names the parameter, and what to use instead.
    """
    check_values(model)
    name = type(model).__name__
    for path, value in model.named_parameters():
        for why, _ in [] if is_lazy(value) else _tensor_reasons(path, value):
            fix = "Train the model with plain floating-point tensors, and quantize or shard it afterwards."
            raise ModelError(f"The model {name} cannot be trained.", why, fix)


def check_values(model: nn.Module) -> None:
    """Raise an error if a parameter of a model is on the meta device.

    Raises:
        ModelError: a parameter is on the meta device. The message names the first such parameter.
    """
    empty = next((name for name, value in model.named_parameters() if value.is_meta), None)
    if empty is not None:
        raise ModelError(
            f"The model {type(model).__name__} cannot be run.",
            f"Its parameter `{empty}` is on the meta device and has no values.",
            "Load its weights first.",
        )


def check_exportable(model: nn.Module) -> None:
    """Raise an error if a model is wrapped, compiled or quantized, so that `torch.export` cannot follow its `forward`.

    Raises:
        ModelError: `torch.export` cannot follow the `forward`. The message names the part, its kind, and what to use
            instead.
    """
    check_values(model)
    for path, module in model.named_modules():
        for why, fix in _opaque_reasons(module, f"Its part `{path}` is" if path else "It is", path):
            fix = EXPORT_FIRST if fix == PRUNE_FIRST else fix  # noqa: PLW2901 - another fix for the same reason
            raise ModelError(f"A {type(model).__name__} cannot be exported.", why, fix)


def reasons(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (why, fix) for each module and tensor that cannot be traced and cut."""
    for path, module in model.named_modules():
        yield from _module_reasons(module, f"Its part `{path}` is" if path else "It is", path)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        yield from _tensor_reasons(name, value)


def _untraceable(model: nn.Module, why: str, fix: str) -> ModelError:
    return ModelError(f"The model {type(model).__name__} cannot be traced.", why, fix)


def _opaque_reasons(module: nn.Module, where: str, path: str) -> Iterator[tuple[str, str]]:
    """Yield (why, fix) if `torch.export` cannot follow the `forward` of a module."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
    inner = f"model.{path}.module" if path else "model.module"
    if isinstance(module, torch.jit.ScriptModule):
        yield (
            f"{where} TorchScript, whose compiled code cannot be followed.",
            "Use the Python module from which it was compiled.",
        )
    if isinstance(module, nn.parallel.DistributedDataParallel):
        yield f"{where} wrapped in DistributedDataParallel.", f"Use {inner}, and wrap the result again."
    if any(kind.startswith("torch.distributed.fsdp.") for kind in kinds):
        yield (
            f"{where} sharded by FSDP, so that no process has full parameters.",
            "Use the model before it is sharded, with a full state dict, and shard the pruned one.",
        )
    if any(kind.startswith("keras.") for kind in kinds):
        yield (
            f"{where} a Keras model, whose layers keep their weights outside of PyTorch's parameters.",
            "Use a PyTorch model with the same weights, written with torch.nn.",
        )
    if any(kind.startswith(QUANTIZED) for kind in kinds):
        yield f"{where} a quantized {type(module).__name__}, whose weights are packed integers.", PRUNE_FIRST


def _module_reasons(module: nn.Module, where: str, path: str) -> Iterator[tuple[str, str]]:
    """Yield (why, fix) if a module cannot be traced."""
    yield from _opaque_reasons(module, where, path)
    graph = graph_in(module)
    converted = [node for node in (graph.nodes if graph is not None else ()) if "dequantize" in str(node.target)]
    if converted:
        yield f"{where} a converted graph with quantized operations ({converted[0].target}).", PRUNE_FIRST
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__]
    if any(kind.startswith(OBSERVING) and ("Observer" in kind or "Fake" in kind) for kind in kinds):
        yield (
            f"{where} a {type(module).__name__}, which observes activations for quantization.",
            "Prune the model first, and prepare the pruned one for quantization.",
        )


def _tensor_reasons(name: str, value: torch.Tensor) -> Iterator[tuple[str, str]]:
    """Yield (why, fix) if a parameter or buffer cannot be cut."""
    kind = type(value)
    if is_lazy(value):
        yield f"Its {name!r} is lazy and has no shape yet.", "Run the model once on an example input."
    elif kind.__module__.startswith(("torchao", "bitsandbytes")):
        yield f"Its `{name}` is a quantized {kind.__name__}.", PRUNE_FIRST
    elif isinstance(value, nn.Parameter) and value.dtype.itemsize == 1 and value.dtype is not torch.bool:
        yield f"Its parameter `{name}` has dtype {value.dtype}, which packed quantized weights have.", PRUNE_FIRST
    elif kind.__module__.startswith("torch.distributed"):
        yield (
            f"Its `{name}` is a {kind.__name__}, of which each process has only a part.",
            "Use the model before it is distributed.",
        )
    elif is_traceable_wrapper_subclass(value):
        yield (
            f"Its `{name}` is a {kind.__name__}, a tensor subclass that cannot be sliced.",
            "Replace it with a plain tensor, as with .dequantize() or .to_padded_tensor(0.0).",
        )
    elif value.layout is not torch.strided or value.is_nested:
        layout, dense = ("nested", ".to_padded_tensor(0.0)") if value.is_nested else (value.layout, ".to_dense()")
        yield f"Its `{name}` is {layout}, not a dense tensor.", f"Store it as a dense tensor: {dense}."


def _overlapping(model: nn.Module) -> tuple[str, str] | None:
    """Return the names of two parameters that are different objects with common memory; None if there are none.

    Views such as `w[:, ::2]` and `w[:, 1::2]` take turns in one range of memory, but have no common element.
    """
    spans: dict[int, list[tuple[int, int, str, torch.Tensor]]] = {}
    for name, value in model.named_parameters():
        if value.layout is torch.strided and not value.is_meta and value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            begin = int(value.storage_offset()) * value.itemsize
            end = begin + int(last + 1) * value.itemsize
            spans.setdefault(value.untyped_storage().data_ptr(), []).append((begin, end, name, value))
    for in_storage in spans.values():
        in_storage.sort(key=lambda span: span[:3])
        if any(second[0] < first[1] for first, second in itertools.pairwise(in_storage)):
            common = _with_common_element([(name, value) for _, _, name, value in in_storage])
            if common is not None:
                return common
    return None


def _with_common_element(parameters: list[tuple[str, torch.Tensor]]) -> tuple[str, str] | None:
    """Return the names of two parameters of one storage that share an element; None if no two of them do."""
    cell = min(value.itemsize for _, value in parameters)  # bytes; the parameters may have different dtypes
    cells = -(-parameters[0][1].untyped_storage().nbytes() // cell)
    owner = torch.full((cells,), -1, dtype=torch.int32)  # index of the parameter that occupies each cell
    for index, (name, value) in enumerate(parameters):
        width = value.itemsize // cell
        sizes = [size if stride else 1 for size, stride in zip(value.shape, value.stride(), strict=True)]
        strides = [stride * width for stride in value.stride()]
        own = owner.as_strided((*sizes, width), (*strides, 1), value.storage_offset() * width)
        other = int(own.max())
        if other >= 0:
            return parameters[other][0], name
        own.fill_(index)
    return None


def reason_of(names: Collection[str], error: BaseException) -> tuple[str, str] | None:
    """Return (why, fix) for a model that could not be exported; None if the reason is not known.

    Args:
        names: functions that `forward` called.
        error: the exception of the exporter.
    """
    if "_pack_padded_sequence" in names:
        return (
            "It packs sequences (pack_padded_sequence), which torch.export does not trace.",
            "Give a model whose forward passes the padded batch to the recurrent layer.",
        )
    signs = ("nested_tensor", "is not tracked with proxy")  # errors about a ragged size contain the second text
    if any("nested" in name for name in names) or any(sign in str(error) for sign in signs):
        return (
            "It computes with nested tensors, which torch.export does not trace.",
            "Give a model whose forward computes with a padded batch and a mask.",
        )
    if ".numpy() is not supported" in str(error):
        return (
            "Its forward converts a tensor to numpy, which torch.export does not trace.",
            "Compute with torch functions, and make constants in __init__: self.register_buffer(name, tensor).",
        )
    if "fake tensor in the exported program constant" in str(error):
        return (
            "Its forward creates a tensor that torch.export does not trace, as torch.from_numpy does.",
            "Create the tensor in __init__, and register it: self.register_buffer(name, tensor).",
        )
    return None
