"""Where in a run numbers stop being finite."""

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

    from kirsch.frameworks.data import Batch

MEND = "Lower the learning rate, or set clip_norm."


def not_finite_names(model: nn.Module) -> Iterator[str]:
    """Kind and path of each parameter and buffer that holds NaN or infinity: "parameter `0.weight`"."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for path, tensor in tensors:
            if not torch.isfinite(tensor).all():
                yield f"{kind} `{path}`"


def check_given(model: nn.Module) -> set[str]:
    """The buffers of a model that are not finite from the start, as those of attention masks; an error for parameters.

    Raises:
        NumericError: a parameter is not finite.
    """
    names = list(not_finite_names(model))
    if names and names[0].startswith("parameter"):
        raise NumericError(
            f"The {names[0]} of the model given is not finite.",
            "Training cannot fix NaN or infinity.",
            "Load or initialize its weights anew.",
        )
    return set(names)


def not_finite(model: nn.Module, given: Batch, parts: dict[str, Any], epoch: int, batch: int) -> NumericError:
    """The error for a loss that is not finite, with the first layer whose numbers are not."""
    when = f"at epoch {epoch}, batch {batch}"
    for name in not_finite_names(model):
        if name.startswith("parameter"):
            return NumericError(f"The {name} is no longer finite {when}.", fix=MEND)
    inputs = given.inputs
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point() and not torch.isfinite(inputs).all():
        return NumericError(f"The inputs hold NaN or infinity {when}.", fix="Repair the data.")
    seen: list[str] = []

    def look(path: str) -> Any:
        def hook(_module: nn.Module, _given: Any, out: Any) -> None:
            tensors = [part for part in tree_leaves(out) if isinstance(part, torch.Tensor)]
            if not all(torch.isfinite(part).all() for part in tensors) and not seen:
                seen.append(f"`{path}`" if path else "the model")

        return hook

    handles = [m.register_forward_hook(look(path)) for path, m in model.named_modules()]
    try:
        with torch.no_grad():
            args, options = arguments(copied(inputs))
            called(model, args, options)
    finally:
        for handle in handles:
            handle.remove()
    terms = [name for name, part in parts.items() if not math.isfinite(float(part.detach()))]
    if seen:
        return NumericError(f"The output of {seen[0]} is not finite {when}.", fix=MEND)
    return _of_loss(", ".join(terms) or "total", given.targets, when)


def _of_loss(terms: str, targets: Any, when: str) -> NumericError:
    """The error for a loss that is not finite although the outputs of the model are."""
    largest = _largest(targets)
    if not math.isfinite(largest):
        return NumericError(f"The labels hold NaN or infinity {when}.", fix="Repair the data.")
    what = f"The loss term {terms} is not finite {when}, while all that the model puts out is."
    if largest**2 > torch.finfo(torch.float32).max:
        return NumericError(
            what,
            f"The labels are finite and reach {largest:.0e}, whose square is beyond the numbers of float32.",
            "Scale the labels, for example to mean 0 and standard deviation 1.",
        )
    return NumericError(
        what,
        "The labels are finite; the loss itself makes it so, or what a teacher returns.",
        "Look for NaN and infinity in the outputs of the teacher, if there is one, and in the loss; after some steps, "
        "lower the learning rate.",
    )


def _largest(targets: Any) -> float:
    """The largest size of a number in the targets; NaN or infinity if one of them is not finite."""
    found = [part for part in tree_leaves(targets) if isinstance(part, torch.Tensor) and part.is_floating_point()]
    sizes = [float(part.detach().double().abs().max()) for part in found if part.numel()]
    return math.nan if any(math.isnan(size) for size in sizes) else max(sizes, default=0.0)
