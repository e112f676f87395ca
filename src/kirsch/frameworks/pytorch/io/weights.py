"""Save the weights of a PyTorch model to a safetensors file, and load them bit for bit."""

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

BUFFER_TYPES = "kirsch.buffers"
"""Metadata key of the dtypes of non-persistent floating-point and complex buffers, as JSON."""

WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
"""Stored dtype → wider dtypes that can represent all its values."""

MOST_NAMED = 3


def save_weights(model: nn.Module, path: Path) -> None:
    """Write all parameters and buffers of the state dict to a safetensors file.

    A tied tensor is stored once, under the first of its names in sorted order. Equal models give equal bytes, unlike
    with `safetensors.torch.save_model`, which writes its metadata on tied tensors in random order.

    Raises:
        ModelError: an entry of the state dict cannot be stored in a safetensors file. The error names it.
        OutputError: the file cannot be written.
    """
    first_names: dict[Any, str] = {}
    tensors = {}
    addresses: set[int] = set()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor) or not _has_values(value):
            without = " without values" if isinstance(value, torch.Tensor) else ""
            raise _unwritable(model, name, f"a {type(value).__name__}{without}")
        if value.layout == torch.strided and value.numel() and first_names.setdefault(_memory(value), name) != name:
            continue
        plain = value.detach().resolve_conj().resolve_neg().contiguous()
        if value.layout == torch.strided and plain.numel():
            start = plain.untyped_storage().data_ptr()
            plain = plain.clone() if start in addresses else plain  # safetensors rejects overlapping tensors
            addresses.add(start)
        tensors[name] = plain
    buffer_types = _buffer_types(model)
    metadata = {BUFFER_TYPES: json.dumps(buffer_types)} if buffer_types else None
    try:
        safetensors.torch.save_file(tensors, str(path), metadata)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        for name, value in tensors.items():
            try:
                safetensors.torch.save({name: value})
            except Exception:  # noqa: BLE001 - whatever safetensors raises for this tensor
                raise _unwritable(model, name, f"a tensor of {_dtype_name(value.dtype)}, {value.layout}") from error
        raise OutputError(
            f"{path} cannot be written.", error_text(error), "Free space or choose another folder."
        ) from error


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of a model by name; a tied parameter has several names."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


def match_dtypes(model: nn.Module, path: Path) -> bool:
    """Convert the floating-point and complex tensors of a model to the dtypes in a file of `save_weights`.

    Returns:
        Whether any tensor was converted.

    Raises:
        LoadError: the file cannot be read.
    """
    stored, buffer_types = _read(path)
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    changed = False
    for name, dtype in ({name: value.dtype for name, value in stored.items()} | buffer_types).items():
        value = tensors.get(name)
        if value is None or is_lazy(value) or not (_is_floating(value.dtype) and _is_floating(dtype)):
            continue
        if value.dtype != dtype:
            real = value.is_complex() and not dtype.is_complex  # `model.to(torch.float16)` also drops imaginary parts
            value.data = (value.data.real if real else value.data).to(dtype)
            changed = True
    return changed


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a safetensors file into a model; names and shapes must agree.

    Args:
        model: the model, which is changed in place.
        path: a file of `save_weights`, or of another program. Its dtypes must be those of the model, or narrower
            floating-point ones, because other conversions would change values.

    Raises:
        LoadError: the file cannot be read or does not fit the model. The error names tensors, shapes and dtypes.
    """
    meta = next((n for n, v in [*model.named_parameters(), *model.named_buffers()] if v.is_meta), None)
    if meta is not None:
        raise LoadError(
            f"Weights cannot be loaded into the {type(model).__name__}.",
            f"Its {meta!r} is on the meta device, which stores no values.",
            'Build it on another device, such as the CPU, without `with torch.device("meta")`.',
        )
    stored, _ = _read(path)
    current = model.state_dict()
    differences = [text for name, value in stored.items() if (text := _difference(name, value, current))]
    if differences:
        raise _unfit(model, path, " ".join(differences[:MOST_NAMED]))
    state = OrderedDict(stored)
    # Some models (torchvision's MNASNet) need the version of their weights, which the file does not contain.
    state._metadata = getattr(current, "_metadata", None)  # type: ignore[attr-defined]  # noqa: SLF001 - as PyTorch does
    try:
        keys = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines()[:3]]  # the first line is a title
        raise _unfit(model, path, " ".join(lines)) from error
    # A missing name is allowed if the model ties its tensor to one that is in the file.
    nonempty = {name: value for name, value in current.items() if _has_values(value) and value.numel()}
    loaded = {_memory(nonempty[name]) for name in stored if name in nonempty}
    missing = [name for name in keys.missing_keys if name not in nonempty or _memory(nonempty[name]) not in loaded]
    state_after = model.state_dict()
    other = [name for name, value in stored.items() if name in state_after and not _same_bits(state_after[name], value)]
    problems = (
        ("The file lacks {}.", missing),
        ("The model has no {}.", keys.unexpected_keys),
        ("The loaded values of {} differ from the file, because the model ties tensors that differ in it.", other),
    )
    if any(names for _, names in problems):
        why = " ".join(sentence.format(", ".join(names[:MOST_NAMED])) for sentence, names in problems if names)
        raise _unfit(model, path, why)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.dtype]]:
    """Return the tensors of a file, and the dtypes of non-persistent buffers."""
    if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe would block
        raise LoadError(f"The weights {path} are not a file.", fix="Give the path of a safetensors file.")
    _check_format(path)
    try:
        stored = safetensors.torch.load_file(str(path))
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=_unique_keys)
        names = json.loads(header.get("__metadata__", {}).get(BUFFER_TYPES, "{}"), object_pairs_hook=_unique_keys)
        buffer_types = {str(name): getattr(torch, dtype) for name, dtype in names.items()}
    except Exception as error:
        raise LoadError(
            f"The weights {path} cannot be read.",
            error_text(error),
            "Give a valid safetensors file, as kirsch.save and safetensors.torch.save_model write it.",
        ) from error
    if not all(isinstance(dtype, torch.dtype) for dtype in buffer_types.values()):
        raise LoadError(f"The weights {path} cannot be read.", f"Their metadata {BUFFER_TYPES!r} names unknown types.")
    return stored, buffer_types


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. A repeated key raises a ValueError, because readers differ in which value they use."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the header names {next(name for name in names if names.count(name) > 1)!r} twice")
    return entries


def _difference(name: str, value: torch.Tensor, current: dict[str, Any]) -> str:
    """Return how a stored tensor differs from the model's in shape or dtype, as a sentence; empty if it fits."""
    target = current.get(name)
    if not isinstance(target, torch.Tensor):  # load_state_dict reports the name, or a hook of the model renames it
        types = {other.dtype for other in current.values() if isinstance(other, torch.Tensor)}
        dtype = _dtype_name(value.dtype)
        return "" if value.dtype in types else f"{name} is {dtype} in the file; the model has no tensor of this type."
    if is_lazy(target):
        return ""
    if target.shape != value.shape:
        return f"{name} has shape {tuple(value.shape)} in the file and {tuple(target.shape)} in the model."
    if target.dtype == value.dtype or target.dtype in WIDER.get(value.dtype, ()):
        return ""
    return f"{name} is {_dtype_name(value.dtype)} in the file and {_dtype_name(target.dtype)} in the model."


def _buffer_types(model: nn.Module) -> dict[str, str]:
    """Return the dtypes of the non-persistent floating-point and complex buffers, by name."""
    stored = model.state_dict()
    buffers = sorted(model.named_buffers(remove_duplicate=False))
    return {name: _dtype_name(b.dtype) for name, b in buffers if name not in stored and _is_floating(b.dtype)}


def _is_floating(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _memory(value: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for two names of the same tensor."""
    return value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype


def _same_bits(loaded: torch.Tensor, stored: torch.Tensor) -> bool:
    first, second = (t.detach().cpu().to(loaded.dtype).contiguous().reshape(-1) for t in (loaded, stored))
    return first.shape == second.shape and bool(torch.equal(first.view(torch.uint8), second.view(torch.uint8)))


def _has_values(value: Any) -> bool:
    """Return whether a value is a tensor with memory."""
    return isinstance(value, torch.Tensor) and not is_lazy(value) and not value.is_meta


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_format(path: Path) -> None:
    """Raise a LoadError that names the format of a file, unless it is safetensors."""
    form = describe(path)
    if form is None:
        raise LoadError(
            f"The file of weights {path} cannot be read.",
            "It does not exist." if not os.path.lexists(path) else "Its permissions or links do not allow it.",
            "Give a safetensors file.",
        )
    if form.why:
        raise LoadError(f"The file of weights {path} cannot be loaded: it is {form.what}.", form.why, form.as_weights)


def _unwritable(model: nn.Module, name: str, what: str) -> ModelError:
    return ModelError(
        f"The weights of {type(model).__name__} cannot be written.",
        f"{name} is {what}; a safetensors file stores dense tensors of common types.",
        "Convert it, make get_extra_state return a tensor, or exclude it from the state dict: "
        "register_buffer(..., persistent=False).",
    )


def _unfit(model: nn.Module, path: Path, why: str) -> LoadError:
    what = f"The weights in {path} do not fit a {type(model).__name__}."
    return LoadError(what, why, "Give the model from which they were saved, with the same shapes and types.")
