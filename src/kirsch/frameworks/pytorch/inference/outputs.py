"""Named tensors in the outputs of a model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import UnknownNameError
from kirsch.frameworks.predictions import NOT_PREDICTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

PREDICTIONS = ("logits", "pred")
"""Words in the names of outputs that are predictions."""


def named(outputs: Any) -> dict[str, torch.Tensor]:
    """Return all tensors in the outputs of a model, by path: "logits", "0", "aux.0"; a single tensor is "0".

    Mappings, sequences, dataclasses and other objects with attributes are searched, each object once.
    """
    by_path: dict[str, torch.Tensor] = {}
    for path, tensor in _tensors([outputs] if isinstance(outputs, torch.Tensor) else outputs, "", set()):
        name = path
        while name in by_path:  # {"a.b": ..., "a": {"b": ...}}
            name += "'"
        by_path[name] = tensor
    return by_path


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


def selected_outputs(names: Sequence[str], selected: Sequence[str]) -> set[str]:
    """Return the outputs that must keep their shapes.

    Args:
        names: names of all outputs.
        selected: names or prefixes of outputs. If empty, all outputs are selected, but hidden states, attention weights
            and caches only if there are no predictions.

    Raises:
        UnknownNameError: no output has a selected name.
    """
    for name in selected:
        if not any(_within(path, name) for path in names):
            raise UnknownNameError("output", name, names)
    if selected:
        return {path for path in names if any(_within(path, name) for name in selected)}
    main = {path for path in names if not any(word in path for word in NOT_PREDICTIONS)}
    predicts = any(word in path for path in main for word in PREDICTIONS)
    return main if predicts else set(names)


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def class_names(model: nn.Module) -> list[str]:
    """Return the class names in the configuration of a transformers model.

    Empty for other models, and for the default names "LABEL_0", "LABEL_1", ...
    """
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, dict) or set(names) != set(range(len(names))):
        return []
    ordered = [str(names[number]) for number in range(len(names))]
    return [] if ordered == [f"LABEL_{number}" for number in range(len(names))] else ordered


def feature_mask(model: nn.Module, mask: Any) -> Any:
    """Return the mask of the positions of the hidden states, shape (N, L), from the mask of the inputs, shape (N, T).

    L equals T, except for speech models, whose convolutions have strides along the audio signal.

    Args:
        model: any model.
        mask: numpy array or tensor of shape (N, T), nonzero at valid inputs.
    """
    frames = getattr(model, "_get_feature_vector_attention_mask", None)
    if frames is None:
        return mask
    tensor = torch.as_tensor(mask)
    return frames(int(model._get_feat_extract_output_lengths(tensor.shape[-1])), tensor)  # type: ignore[operator]  # noqa: SLF001 - has no public name
