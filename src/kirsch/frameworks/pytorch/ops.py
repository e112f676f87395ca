"""Array operations for PyTorch; see `kirsch.ops.operations` for what each function returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import (  # noqa: F401 - these have the names and arguments of the operations
    abs,
    broadcast_to,
    einsum,
    exp,
    isfinite,
    log,
    logaddexp,
    matmul,
    maximum,
    minimum,
    moveaxis,
    ones_like,
    reshape,
    sign,
    sqrt,
    swapaxes,
    where,
    zeros_like,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    Axis = int | tuple[int, ...] | None

CHANNEL_AXIS = 1

DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def clip(x: Tensor, x_min: float | None = None, x_max: float | None = None) -> Tensor:
    return torch.clip(x, x_min, x_max)


def sum(x: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return torch.sum(x, dim=axis, keepdim=keepdims)


def mean(x: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return torch.mean(x, dim=axis, keepdim=keepdims)


def amax(x: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return torch.amax(x, dim=() if axis is None else axis, keepdim=keepdims)


def amin(x: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return torch.amin(x, dim=() if axis is None else axis, keepdim=keepdims)


def any(x: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return torch.any(x) if axis is None else torch.any(x, dim=axis, keepdim=keepdims)


def all(x: Tensor, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    return torch.all(x) if axis is None else torch.all(x, dim=axis, keepdim=keepdims)


def count_nonzero(x: Tensor, axis: Axis = None) -> Tensor:
    return torch.count_nonzero(x, dim=axis)


def argmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.argmax(x, dim=axis)


def argsort(x: Tensor, axis: int = -1) -> Tensor:
    return torch.argsort(x, dim=axis)


def sort(x: Tensor, axis: int = -1) -> Tensor:
    return torch.sort(x, dim=axis).values


def concatenate(arrays: Sequence[Tensor], axis: int = 0) -> Tensor:
    return torch.cat(list(arrays), dim=axis)


def stack(arrays: Sequence[Tensor], axis: int = 0) -> Tensor:
    return torch.stack(list(arrays), dim=axis)


def diagonal(x: Tensor) -> Tensor:
    return torch.diagonal(x)


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u, s, vh


def take_along_axis(x: Tensor, indices: Any, axis: int = -1) -> Tensor:
    return torch.take_along_dim(x, torch.as_tensor(indices, device=x.device).long(), dim=axis)


def segment_max(x: Tensor, segment_ids: Any, num_segments: int) -> Tensor:
    ids = torch.as_tensor(segment_ids, device=x.device).long()
    return x.new_full((num_segments,), -torch.inf).scatter_reduce(0, ids, x, "amax")


def segment_sum(x: Tensor, segment_ids: Any, num_segments: int) -> Tensor:
    ids = torch.as_tensor(segment_ids, device=x.device).long()
    return x.new_zeros(num_segments).index_add(0, ids, x)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(x, k, dim=-1)
    return values, indices


def one_hot(indices: Tensor, num_classes: int, dtype: str) -> Tensor:
    return (indices[..., None] == torch.arange(num_classes, device=indices.device)).to(DTYPES[dtype])


def multi_hot(indices: Tensor, num_classes: int, dtype: str) -> Tensor:
    zeros = torch.zeros((*indices.shape[:-1], num_classes), dtype=DTYPES[dtype], device=indices.device)
    return zeros.scatter(-1, indices.long(), 1)


def convert_to_tensor(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)


def convert_to_numpy(x: Tensor) -> Any:
    return x.detach().cpu().numpy()


def dtype(x: Tensor) -> str:
    return NAMES.get(x.dtype) or str(x.dtype).removeprefix("torch.")


def cast(x: Tensor, dtype: str) -> Tensor:
    return x.to(DTYPES[dtype])


def widest_float(x: Tensor) -> str:
    return dtype(x) if x.device.type == "mps" else "float64"


def stop_gradient(x: Tensor) -> Tensor:
    return x.detach()


def is_traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or x.device.type == "meta"


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(x.device.type, enabled=False)
