"""Whether a model runs on its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import KirschError
from kirsch.frameworks.pytorch.inference.calling import not_running
from kirsch.frameworks.pytorch.inference.predict import arguments, called, copied, inference, tensors
from kirsch.frameworks.pytorch.modules.copying import copy_of

if TYPE_CHECKING:
    from torch import nn


def check_runs(model: nn.Module, inputs: Any, *, training: bool = False) -> None:
    """Raise an error that describes the inputs if a model does not run on them; the model is not changed.

    Args:
        model: any model.
        inputs: one batch.
        training: run a copy of the model in training mode.

    Raises:
        KirschError: the model does not run.
    """
    try:
        args, options = arguments(copied(tensors(inputs, model)))
        if not training:
            with inference(model), torch.no_grad():
                called(model, args, options)
            return
        with torch.random.fork_rng(), torch.no_grad():
            called(copy_of(model).train(), args, options)
    except (KirschError, MemoryError, OSError):  # the cause may be the machine, which the caller reports
        raise
    except Exception as error:  # whatever the model's own code raises
        raise not_running(model, inputs, error) from error
