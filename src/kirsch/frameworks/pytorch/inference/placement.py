"""Move arrays and models to the device of a model, and convert arrays to tensors."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from kirsch.frameworks.pytorch.inference.predict import array_to_device, device_of, tensors
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.modules.unsupported import check_values

if TYPE_CHECKING:
    from torch import nn

    from kirsch.data.batches import Batch


def from_numpy(arrays: Any, *, like: Any = None) -> Any:
    """Convert a numpy array, or each array in a tuple or dict, to a tensor, on the device of `like` if it is given."""
    device = torch.device("cpu") if like is None else like.device
    return tree_map(partial(array_to_device, device), arrays)


def to_device(batch: Batch, model: nn.Module) -> Batch:
    """Return a batch as tensors on the device of a model."""
    inputs, targets, ids = (tensors(part, model) for part in (batch.inputs, batch.targets, batch.ids))
    return dataclasses.replace(batch, inputs=inputs, targets=targets, ids=ids)


def inference_mode(model: nn.Module) -> nn.Module:
    """Set a model to inference mode, and return it."""
    return model.eval()


def frozen_copy(model: nn.Module, like: nn.Module) -> nn.Module:
    """Return a copy of a model in inference mode without gradients, on the device of the model `like`.

    Raises:
        ModelError: the model cannot be copied, or a parameter is on the meta device and has no values.
    """
    check_values(model)
    copied = copy_of(model)
    copied.eval()
    for parameter in copied.parameters():  # TorchScript modules lack requires_grad_
        parameter.requires_grad = False
    return copied.to(device_of(like))
