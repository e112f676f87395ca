"""Find the first parameter, layer or loss term that is NaN or infinite in a training run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from kirsch.errors import NumericError
from kirsch.frameworks.pytorch.inference.predict import arguments, called, copied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

FIX = "Lower the learning rate, or set clip_norm."


def not_finite_names(model: nn.Module) -> Iterator[str]:
    """Yield kind and path of each parameter and buffer with NaN or infinity, such as "parameter `0.weight`"."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for path, tensor in tensors:
            if not torch.isfinite(tensor).all():
                yield f"{kind} `{path}`"


def check_initial(model: nn.Module) -> set[str]:
    """Return the buffers of a model that are not finite before training, such as attention masks.

    Raises:
        NumericError: a parameter is not finite.
    """
    names = list(not_finite_names(model))
    if names and names[0].startswith("parameter"):
        raise NumericError(
            f"The {names[0]} of the model is not finite before training.",
            "Training cannot fix NaN or infinity.",
            "Load or initialize its weights again.",
        )
    return set(names)


def not_finite(model: nn.Module, inputs: Any, parts: dict[str, Any], epoch: int, batch: int) -> NumericError:
    """Return the error for a loss that is not finite. It names the parameter, layer or loss term where that begins.

    Args:
        model: the model in training.
        inputs: of the batch.
        parts: loss terms by name.
        epoch, batch: numbers for the message, from 1.
    """
    when = f"at epoch {epoch}, batch {batch}"
    for name in not_finite_names(model):
        if name.startswith("parameter"):
            return NumericError(f"The {name} is no longer finite {when}.", fix=FIX)
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point() and not torch.isfinite(inputs).all():
        return NumericError(f"The inputs contain NaN or infinity {when}.", fix="Repair the data.")
    layers: list[str] = []

    def recorder(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
            tensors = [part for part in tree_leaves(out) if isinstance(part, torch.Tensor)]
            if not all(torch.isfinite(part).all() for part in tensors):
                layers.append(f"`{path}`" if path else "the model")

        return hook

    handles = [m.register_forward_hook(recorder(path)) for path, m in model.named_modules()]
    try:
        with torch.no_grad():
            args, options = arguments(copied(inputs))
            called(model, args, options)
    finally:
        for handle in handles:
            handle.remove()
    terms = [name for name, part in parts.items() if not math.isfinite(float(part.detach()))]
    if layers:
        return NumericError(f"The output of {layers[0]} is not finite {when}.", fix=FIX)
    return NumericError(
        f"The loss term {', '.join(terms) or 'total'} is not finite {when}, and the outputs of the model are.",
        "The cause is in the teacher outputs, the labels or the loss itself.",
        "Check the teacher outputs and the labels for NaN and infinity. If it happens after some steps, lower the "
        "learning rate.",
    )
