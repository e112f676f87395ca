"""Hash the weights of a model."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


def fingerprint(model: nn.Module) -> str:
    """Return the sha256 of the state dict and the non-persistent buffers, as 64 hexadecimal digits.

    The hash covers names, shapes, dtypes and bytes. It does not depend on the device or the order of the names, and
    does not cover code or other attributes.
    """
    digest = hashlib.sha256()
    buffers = dict(model.named_buffers(remove_duplicate=False))  # the state dict lacks non-persistent buffers
    for name, value in sorted((buffers | model.state_dict()).items()):
        if not isinstance(value, torch.Tensor):  # the result of a module's get_extra_state
            digest.update(f"{name} {type(value).__qualname__} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()
