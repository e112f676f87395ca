"""Weights of a PyTorch model in a safetensors file, and back, bit for bit."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch.nn.parameter import is_lazy

from kirsch.errors import LoadError, ModelError, OutputError, error_text
from kirsch.frameworks.formats import describe

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

BESIDE = "kirsch.buffers"
"""Metadata key: the types of the floating buffers that a state dict leaves out, as JSON."""

WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
"""Conversions that keep every value."""

MOST_NAMED = 3


def save_weights(model: nn.Module, path: Path) -> None:
    """Write all parameters and buffers of the state dict to a safetensors file.

    Names that share one tensor are stored once, under the first of them in sorted order. The bytes of the file follow
    from the model alone; `safetensors.torch.save_model` orders its notes on shared tensors at random.

    Raises:
        ModelError: the state holds something that a safetensors file cannot; names it.
        OutputError: the file cannot be written.
    """
    kept: dict[Any, str] = {}
    tensors = {}
    memory: set[int] = set()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor) or not _has_values(value):
            without = " without values" if isinstance(value, torch.Tensor) else ""
            raise _unwritable(model, name, f"a {type(value).__name__}{without}")
        if value.layout == torch.strided and value.numel() and kept.setdefault(_memory(value), name) != name:
            continue
        plain = value.detach().resolve_conj().resolve_neg().contiguous()
        if value.layout == torch.strided and plain.numel():
            start = plain.untyped_storage().data_ptr()
            plain = plain.clone() if start in memory else plain  # safetensors refuses tensors that overlap
            memory.add(start)
        tensors[name] = plain
    beside = _types_beside(model)
    try:
        safetensors.torch.save_file(tensors, str(path), {BESIDE: json.dumps(beside)} if beside else None)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        for name, value in tensors.items():
            try:
                safetensors.torch.save({name: value})
            except Exception:  # noqa: BLE001 - whatever safetensors raises for this tensor
                raise _unwritable(model, name, f"a tensor of {_plain(value.dtype)}, {value.layout}") from error
        raise OutputError(
            f"{path} cannot be written.", error_text(error), "Free space or choose another folder."
        ) from error


def take_types(model: nn.Module, path: Path) -> bool:
    """Give the floating and complex tensors of a model the types that they have in a file of `save_weights`.

    Returns:
        Whether any of them had another type.

    Raises:
        LoadError: the file cannot be read.
    """
    stored, beside = _read(path)
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    changed = False
    for name, dtype in ({name: value.dtype for name, value in stored.items()} | beside).items():
        value = tensors.get(name)
        if value is None or is_lazy(value) or not (_is_floating(value.dtype) and _is_floating(dtype)):
            continue
        if value.dtype != dtype:
            real = value.is_complex() and not dtype.is_complex  # as `model.to(torch.float16)` makes it
            value.data = (value.data.real if real else value.data).to(dtype)
            changed = True
    return changed


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model with the weights of a safetensors file; names and shapes must agree.

    Args:
        model: changed in place.
        path: a file of `save_weights`, or of another program. Its types must be those of the model, or narrower
            floating ones: a conversion that changes values is refused.

    Raises:
        LoadError: the file cannot be read or does not fit the model; names tensors, shapes and types.
    """
    meta = next((n for n, v in [*model.named_parameters(), *model.named_buffers()] if v.is_meta), None)
    if meta is not None:
        raise LoadError(
            f"The {type(model).__name__} cannot take weights.",
            f"Its {meta!r} lies on the meta device, which stores nothing.",
            'Build it on another device, such as the CPU, without `with torch.device("meta")`.',
        )
    stored, _ = _read(path)
    own = model.state_dict()
    wrong = [text for name, value in stored.items() if (text := _difference(name, value, own))]
    if wrong:
        raise _unfit(model, path, " ".join(wrong[:MOST_NAMED]))
    state = OrderedDict(stored)
    # Some models (torchvision's MNASNet) ask for the version of their weights, which the file does not carry.
    state._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]  # noqa: SLF001 - as PyTorch does
    try:
        keys = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines()[:3]]  # a title, then what does not fit
        raise _unfit(model, path, " ".join(lines)) from error
    # A name that is missing is no loss where the model shares its tensor with one that is in the file.
    full = {name: value for name, value in own.items() if _has_values(value) and value.numel()}
    found = {_memory(full[name]) for name in stored if name in full}
    missing = [name for name in keys.missing_keys if name not in full or _memory(full[name]) not in found]
    now = model.state_dict()
    other = [name for name, value in stored.items() if name in now and not _same_bits(now[name], value)]
    unfit = (
        ("The file lacks {}.", missing),
        ("The model has no {}.", keys.unexpected_keys),
        ("The model holds other values in {}: it shares tensors that the file keeps apart.", other),
    )
    if any(names for _, names in unfit):
        why = " ".join(sentence.format(", ".join(names[:MOST_NAMED])) for sentence, names in unfit if names)
        raise _unfit(model, path, why)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.dtype]]:
    """The tensors of a file, and the types of the buffers beside them."""
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would be waited for
        raise LoadError(f"The weights {path} are not a file.", fix="Give the path of a safetensors file.")
    _refuse_other_formats(path)
    try:
        stored = safetensors.torch.load_file(str(path))
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=_once)
        said_beside = json.loads(header.get("__metadata__", {}).get(BESIDE, "{}"), object_pairs_hook=_once)
        beside = {str(name): getattr(torch, kind) for name, kind in said_beside.items()}
    except Exception as error:
        raise LoadError(
            f"The weights {path} cannot be read.",
            error_text(error),
            "Give a sound safetensors file: kirsch.save and safetensors.torch.save_model write them.",
        ) from error
    if not all(isinstance(kind, torch.dtype) for kind in beside.values()):
        raise LoadError(f"The weights {path} cannot be read.", f"Their metadata {BESIDE!r} names unknown types.")
    return stored, beside


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a repeated name is an error, since readers differ in which of its values they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the header names {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _difference(name: str, value: torch.Tensor, own: dict[str, Any]) -> str:
    """How a stored tensor differs from the model's own in shape or type, as a sentence; empty if it fits."""
    target = own.get(name)
    if not isinstance(target, torch.Tensor):  # load_state_dict says so, or a hook of the model renames it
        types = {other.dtype for other in own.values() if isinstance(other, torch.Tensor)}
        return "" if value.dtype in types else f"No tensor of the model is {_plain(value.dtype)}, as {name} is."
    if is_lazy(target):
        return ""
    if target.shape != value.shape:
        return f"{name} has shape {tuple(value.shape)} in the file and {tuple(target.shape)} in the model."
    if target.dtype == value.dtype or target.dtype in WIDER.get(value.dtype, ()):
        return ""
    return f"{name} is {_plain(value.dtype)} in the file and {_plain(target.dtype)} in the model."


def _types_beside(model: nn.Module) -> dict[str, str]:
    """The types of the floating and complex buffers that the state dict leaves out, by name."""
    stored = model.state_dict()
    buffers = sorted(model.named_buffers(remove_duplicate=False))
    return {name: _plain(b.dtype) for name, b in buffers if name not in stored and _is_floating(b.dtype)}


def _is_floating(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _memory(value: torch.Tensor) -> tuple[Any, ...]:
    """What two names have in common that are the same tensor."""
    return value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype


def _same_bits(own: torch.Tensor, value: torch.Tensor) -> bool:
    first, second = (t.detach().cpu().to(own.dtype).contiguous().reshape(-1) for t in (own, value))
    return first.shape == second.shape and bool(torch.equal(first.view(torch.uint8), second.view(torch.uint8)))


def _has_values(value: Any) -> bool:
    """Whether something is a tensor with memory of its own."""
    return isinstance(value, torch.Tensor) and not is_lazy(value) and not value.is_meta


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_other_formats(path: Path) -> None:
    """Raise a LoadError that says what a file is, unless it is one of safetensors."""
    found = describe(path)
    if found is None:
        raise LoadError(
            f"The file of weights {path} cannot be read.",
            "It does not exist." if not os.path.lexists(path) else "Its permissions or its links do not allow it.",
            "Give a safetensors file.",
        )
    if found.why:
        raise LoadError(f"The weights in {path} cannot be loaded: it is {found.what}.", found.why, found.as_weights)


def _unwritable(model: nn.Module, name: str, what: str) -> ModelError:
    return ModelError(
        f"The weights of {type(model).__name__} cannot be written.",
        f"{name} is {what}; a safetensors file holds dense tensors of common types.",
        "Convert it, make get_extra_state return a tensor, or keep it out of the state dict: "
        "register_buffer(..., persistent=False).",
    )


def _unfit(model: nn.Module, path: Path, why: str) -> LoadError:
    what = f"The weights in {path} do not fit a {type(model).__name__}."
    return LoadError(what, why, "Give the model that they were saved from, in its shapes and types.")
