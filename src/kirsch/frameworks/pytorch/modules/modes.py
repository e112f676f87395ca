"""The modes of a model's modules, for training or for inference, which may differ from module to module."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Set the mode of each module; containers must come first, because their `train` also sets their submodules.

    A class may do more than set `training` in its `train`, such as torchvision's feature extractors, which have a graph
    for each mode.
    """
    modes = list(modes)
    for module, training in modes:
        if module.training != training and type(module).train is not nn.Module.train:
            with contextlib.suppress(NotImplementedError):  # modules of torch.export have a fixed mode
                module.train(training)
    for module, training in modes:
        module.training = training
