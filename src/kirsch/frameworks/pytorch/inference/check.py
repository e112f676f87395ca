"""Check whether a model runs on its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from kirsch.data.images import AXES, has_channels_last, order_fix
from kirsch.data.structure import summary
from kirsch.errors import KirschError, ModelError, UsageError
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
    given = tensors(inputs, model)
    try:
        _run(model, given, training=training)
    except (MemoryError, OSError):  # the cause may be the machine, which the caller reports
        raise
    except (ModelError, UsageError) as error:
        raise _error_of_layout(model, given, error) or error from error.__cause__
    except KirschError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise not_running(model, inputs, error) from error


def _run(model: nn.Module, inputs: Any, *, training: bool) -> None:
    args, options = arguments(copied(inputs))
    if not training:
        with inference(model), torch.no_grad():
            called(model, args, options)
        return
    with torch.random.fork_rng(), torch.no_grad():
        called(copy_of(model).train(), args, options)


def _error_of_layout(model: nn.Module, inputs: Any, error: KirschError) -> KirschError | None:
    """Return the error for images with channels last if the model takes them with channels first; None otherwise."""
    images = [part for part in tree_leaves(inputs) if has_channels_last(getattr(part, "shape", ()))]
    if not images:
        return None
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)

    def channels_first(part: Any) -> Any:
        if not isinstance(part, torch.Tensor) or not has_channels_last(part.shape):
            return part
        return part.permute(AXES).to(dtype if part.dtype == torch.uint8 else part.dtype)

    try:
        _run(model, tree_map(channels_first, inputs), training=False)
    except Exception:  # noqa: BLE001 - whatever the model's own code raises: the order of the axes is not the cause
        return None
    return type(error)(
        f"{type(model).__name__} takes images with channels first, (N, C, H, W); its inputs are {summary(inputs)}, "
        "with channels last.",
        error.why,
        order_fix(uint8=any(image.dtype == torch.uint8 for image in images)),
    )
