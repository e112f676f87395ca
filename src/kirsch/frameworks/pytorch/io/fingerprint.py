"""One hash for the weights of a model."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


def fingerprint(model: nn.Module) -> str:
    """The sha256 over names, shapes, types and bytes of a state dict and all other buffers, as 64 hexadecimal digits.

    Equal for equal bits on whatever device, in whatever order the names stand. What else a module keeps, code and
    settings, is not seen.
    """
    digest = hashlib.sha256()
    beside = dict(model.named_buffers(remove_duplicate=False))  # a state dict leaves out those that are not persistent
    for name, value in sorted((beside | model.state_dict()).items()):
        if not isinstance(value, torch.Tensor):  # what a module's get_extra_state gives
            digest.update(f"{name} {type(value).__qualname__} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()
