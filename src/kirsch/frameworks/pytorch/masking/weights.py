"""Weights of a PyTorch model that can be masked, by the types of their layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from kirsch.errors import ModelError
from kirsch.frameworks.masking import WeightMatrix
from kirsch.frameworks.pytorch.masking.hold import is_mask_list
from kirsch.frameworks.pytorch.modules.tuners import adapter_tensors
from kirsch.frameworks.pytorch.modules.unsupported import check_values, reasons

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
INPUTS_FIRST = "transformers.pytorch_utils.Conv1D"
"""A linear layer that multiplies its input with the weight itself, not with the transposed weight."""

AN_EMBEDDING = "an embedding, of which a sample reads a few rows"
A_VECTOR = "a bias or a scale: few values, and not a matrix"
COMPUTED = "its layer computes the weight from it (weight normalization and the like)"
UNKNOWN = "its layer is of no known type, so that the axis of its inputs is not known"
AN_ADAPTER = "an adapter beside a layer: zeros in it would not be zeros of the merged weight"
A_STACK = (
    "a stack of matrices, such as those of the experts of a mixture; the scores of each would need the inputs that are "
    "routed to it, and only weights of single layers are masked"
)
NOT_FLOATING = "its values are not floating-point numbers"


def weight_matrices(model: nn.Module) -> list[WeightMatrix]:
    """Return all parameters of a model; `kept` is the reason why a parameter is kept dense, else empty.

    A tied parameter is listed once, under its first name.

    Raises:
        ModelError: the model has no values, or is of a kind whose weights cannot be replaced.
    """
    check_values(model)
    for why, fix in reasons(model):
        raise ModelError(f"The weights of a {type(model).__name__} cannot be masked.", why, fix)
    found: dict[int, WeightMatrix] = {}
    adapters = adapter_tensors(model)
    for path, module, name, value in parameters(model):
        matrix = _matrix(path, module, name, value)
        if matrix.name in adapters:
            matrix = replace(matrix, kept=AN_ADAPTER)
        earlier = found.get(id(value))
        if earlier is None:
            found[id(value)] = matrix
            continue
        kept = earlier.kept
        if matrix.kept and not kept:
            kept = f"tied to `{matrix.name}`, {matrix.kept}"
        elif (earlier.input_axis, earlier.groups) != (matrix.input_axis, matrix.groups):
            kept = kept or f"tied to `{matrix.name}`, which reads another axis"
        found[id(value)] = replace(earlier, kept=kept, tied=(*earlier.tied, matrix.name))
    return list(found.values())


def values(model: nn.Module, name: str) -> NDArray[Any]:
    """Return the values of a parameter, with zeros where a mask holds, as float32 or float64."""
    layer, _, tensor = name.rpartition(".")
    value: torch.Tensor = getattr(model.get_submodule(layer), tensor).detach()
    return np.array((value if value.dtype is torch.float64 else value.float()).cpu().numpy())  # not a view of the model


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield the path and module of each parameter, its name, and the parameter; a masked one with its plain name."""
    for path, module in model.named_modules():
        masked: Any = dict(getattr(module, "parametrizations", {})) if is_parametrized(module) else {}
        masked = {name: part.original for name, part in masked.items() if is_mask_list(part)}
        for name, value in ({} if is_mask_list(module) else {**masked, **module._parameters}).items():  # noqa: SLF001 - of this module alone
            if value is not None:
                yield path, module, name, value


def _matrix(path: str, module: nn.Module, name: str, value: torch.Tensor) -> WeightMatrix:
    """Return the description of one parameter of a module."""
    kind = type(module).__name__.removeprefix("Parametrized" if hasattr(module, "parametrizations") else "")
    matrix = WeightMatrix(f"{path}.{name}".lstrip("."), path, kind, tuple(value.shape))
    reason = _reason(module, name, value)
    if reason:
        return replace(matrix, kept=reason)
    if isinstance(module, _ConvNd):
        return replace(matrix, input_axis=0 if isinstance(module, _ConvTransposeNd) else 1, groups=module.groups)
    return replace(matrix, input_axis=1 if _reads_columns(module, name) else 0)


def _reason(module: nn.Module, name: str, value: torch.Tensor) -> str:
    """Return why a parameter is kept dense; empty if it may be masked."""
    if not value.is_floating_point():
        return NOT_FLOATING
    if value.dim() < 2:  # noqa: PLR2004 - rows and columns
        return A_VECTOR
    computes = module._forward_pre_hooks and name.endswith(("_v", "_orig"))  # noqa: SLF001 - has no public name
    if isinstance(module, ParametrizationList) or computes:
        return COMPUTED
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return AN_EMBEDDING
    convolution = name == "weight" and isinstance(module, _ConvNd)
    if convolution or _reads_columns(module, name) or _reads_rows(module, name):
        return ""
    return A_STACK if value.dim() == 3 and len(value) > 1 else UNKNOWN  # noqa: PLR2004 - experts, rows and columns


def _reads_columns(module: nn.Module, name: str) -> bool:
    """Return whether a weight has the shape (outputs, inputs)."""
    return (
        (name == "weight" and isinstance(module, nn.Linear))
        or (name.startswith("weight_") and isinstance(module, (nn.RNNBase, nn.RNNCellBase)))
        or (name in ATTENTION_WEIGHTS and isinstance(module, nn.MultiheadAttention))
    )


def _reads_rows(module: nn.Module, name: str) -> bool:
    """Return whether a weight has the shape (inputs, outputs)."""
    kinds = {f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__}
    return name == "weight" and INPUTS_FIRST in kinds
