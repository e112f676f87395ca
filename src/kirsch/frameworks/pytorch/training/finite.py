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


def not_finite(model: nn.Module, inputs: Any, parts: dict[str, Any], epoch: int, batch: int) -> NumericError:
    """The error for a loss that is not finite, with the first layer whose numbers are not."""
    when = f"at epoch {epoch}, batch {batch}"
    for name in not_finite_names(model):
        if name.startswith("parameter"):
            return NumericError(f"The {name} is no longer finite {when}.", fix=MEND)
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
    return NumericError(
        f"The loss term {', '.join(terms) or 'total'} is not finite {when}, while all that the model puts out is.",
        "It is made so by what the model is held against, or by the loss itself.",
        "Look for NaN and infinity in what the teacher puts out, and in the labels; after some steps, lower the "
        "learning rate.",
    )
