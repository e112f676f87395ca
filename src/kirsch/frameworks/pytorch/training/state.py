"""Arrays of a training state: convert tensors to numpy arrays and back, and load them into a model."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from kirsch.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from kirsch.frameworks.training import TrainingState


def to_array(value: torch.Tensor) -> Any:
    """Return a tensor as a numpy array with the same bits; bfloat16, which numpy lacks, as int16."""
    plain = value.detach().cpu()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().copy()


def to_tensor(array: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the tensor of an array of `to_array`; an int16 array is a bfloat16 tensor unless `dtype` is int16."""
    value = torch.from_numpy(np.array(array))
    return value.view(torch.bfloat16) if value.dtype == torch.int16 and dtype != torch.int16 else value


def load_arrays(model: nn.Module, state: TrainingState, prefix: str) -> None:
    """Load the arrays of a state whose names have a prefix into a model."""
    current = model.state_dict()
    stored = {n.removeprefix(prefix): a for n, a in state.arrays.items() if n.startswith(prefix)}
    if set(current) != set(stored) or any(tuple(current[n].shape) != a.shape for n, a in stored.items()):
        raise CheckpointError("The checkpoint is of another model.", fix="Start the run again.")
    model.load_state_dict({name: to_tensor(array, current[name].dtype) for name, array in stored.items()})


def digest(values: Any) -> str:
    """Return a hash of nested values."""
    hasher = hashlib.sha256()
    for leaf in tree_leaves(values):
        array = to_array(leaf) if isinstance(leaf, torch.Tensor) else leaf
        hasher.update(np.ascontiguousarray(array).tobytes() if hasattr(array, "shape") else repr(array).encode())
    return hasher.hexdigest()
