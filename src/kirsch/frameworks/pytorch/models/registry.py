"""Registry of built-in PyTorch models, which recipes refer to by name: `digits:teacher`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kirsch.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

MODELS: Registry[Callable[[], nn.Module]] = Registry("model")
"""Functions without arguments that return a new model; the names have the form "DATA:ROLE"."""
