"""What a model puts out, as tensors with names, and which of them count."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import UnknownNameError
from kirsch.frameworks.predictions import ASIDE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

PREDICTIONS = ("logits", "pred")
"""Words in the names of outputs that a model is trained for."""


def named(outputs: Any) -> dict[str, torch.Tensor]:
    """All tensors in what a model puts out, by path: "logits", "0", "aux.0"; a single tensor is "0".

    Mappings, sequences, dataclasses and other objects with attributes are gone through, each object once.
    """
    found: dict[str, torch.Tensor] = {}
    for path, tensor in _tensors([outputs] if isinstance(outputs, torch.Tensor) else outputs, "", set()):
        name = path
        while name in found:  # {"a.b": ..., "a": {"b": ...}}
            name += "'"
        found[name] = tensor
    return found


def _tensors(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    parts = _parts(value)
    if not parts or id(value) in seen:
        return
    seen.add(id(value))
    for name, part in parts:
        yield from _tensors(part, f"{path}.{name}" if path else str(name), seen)


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict) or hasattr(value, "items"):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return list(vars(value).items()) if hasattr(value, "__dict__") and not isinstance(value, type) else []


def counting(names: Sequence[str], asked: Sequence[str]) -> set[str]:
    """Which of these outputs count: those asked for, else all but hidden states and the like beside predictions.

    Raises:
        UnknownNameError: there is no output of a name that is asked for.
    """
    for name in asked:
        if not any(_within(found, name) for found in names):
            raise UnknownNameError("output", name, names)
    if asked:
        return {found for found in names if any(_within(found, name) for name in asked)}
    main = {found for found in names if not any(word in found for word in ASIDE)}
    predicts = any(word in found for found in main for word in PREDICTIONS)
    return main if predicts else set(names)


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def class_names(model: nn.Module) -> list[str]:
    """What the configuration of a model of transformers calls its classes; empty for its "LABEL_0" and for others."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, dict) or set(names) != set(range(len(names))):
        return []
    found = [str(names[number]) for number in range(len(names))]
    return [] if found == [f"LABEL_{number}" for number in range(len(names))] else found


def positions(model: nn.Module, mask: Any) -> Any:
    """The mask (N, L) of what a model holds inside: of frames where a model of speech strides over the sound.

    Args:
        model: any.
        mask: of its inputs, shape (N, T), of numpy or PyTorch; nonzero where there is something.
    """
    frames = getattr(model, "_get_feature_vector_attention_mask", None)
    if frames is None:
        return mask
    tensor = torch.as_tensor(mask)
    return frames(int(model._get_feat_extract_output_lengths(tensor.shape[-1])), tensor)  # type: ignore[operator]  # noqa: SLF001 - has no public name
