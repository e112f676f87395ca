"""Find the first parameter, layer or loss term that is NaN or infinite in a training run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from kirsch.errors import NumericError
from kirsch.frameworks.pytorch.inference.predict import arguments, call_model, copied

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from kirsch.data.batches import Batch

FIX = "Lower the learning rate, or set max_grad_norm."


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


def not_finite(model: nn.Module, batch: Batch, parts: Mapping[str, float], epoch: int, number: int) -> NumericError:
    """Return the error for a loss that is not finite. It names the first such parameter, layer or loss term.

    Args:
        model: the model in training.
        batch: inputs and targets of the step.
        parts: values of the loss terms by name.
        epoch, number: numbers of the epoch and of the batch for the message, from 1.
    """
    when = f"at epoch {epoch}, batch {number}"
    for name in not_finite_names(model):
        if name.startswith("parameter"):
            return NumericError(f"The {name} is no longer finite {when}.", fix=FIX)
    inputs = batch.inputs
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point() and not torch.isfinite(inputs).all():
        return NumericError(f"The inputs contain NaN or infinity {when}.", fix="Repair the data.")
    if any(isinstance(part, torch.Tensor) and torch.isnan(part).any() for part in tree_leaves(inputs)):
        return NumericError(f"The inputs contain NaN {when}.", fix="Repair the data.")
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
            call_model(model, args, options)
    finally:
        for handle in handles:
            handle.remove()
    terms = [name for name, part in parts.items() if not math.isfinite(part)]
    if layers:
        return NumericError(f"The output of {layers[0]} is not finite {when}.", fix=FIX)
    return _loss_error(", ".join(terms) or "total", batch.targets, when, first=(epoch, number) == (1, 1))


def _loss_error(terms: str, targets: Any, when: str, *, first: bool) -> NumericError:
    """Return the error for a loss that is not finite although the outputs of the model are finite.

    `first`: whether this is the first batch of the run.
    """
    largest = _largest(targets)
    if not math.isfinite(largest):
        return NumericError(f"The labels contain NaN or infinity {when}.", fix="Repair the data.")
    what = f"The loss term {terms} is not finite {when}, although the outputs of the model are finite."
    if largest**2 > torch.finfo(torch.float32).max:
        return NumericError(
            what,
            f"The labels are finite and reach {largest:.0e}, whose square exceeds the range of float32.",
            "Scale the labels, for example to mean 0 and standard deviation 1.",
        )
    check = "Check the loss and the outputs of the teacher, if there is one, for NaN and infinity."
    if first:
        why = "The labels are finite, so the cause is in the loss itself or in the teacher outputs."
        return NumericError(what, why, check)
    return NumericError(
        what,
        "The labels are finite, and so was the loss of the batches before. The most frequent cause is that training "
        "diverges: the learning rate is too high for the weight of the term.",
        f"Lower the learning rate or the weight of the term, or set max_grad_norm. If this does not help: {check}",
    )


def _largest(targets: Any) -> float:
    """Return the largest absolute value in the targets; NaN or infinity if one of them is not finite."""
    parts = [part for part in tree_leaves(targets) if isinstance(part, torch.Tensor) and part.is_floating_point()]
    sizes = [float(part.detach().double().abs().max()) for part in parts if part.numel()]
    return math.nan if any(math.isnan(size) for size in sizes) else max(sizes, default=0.0)
