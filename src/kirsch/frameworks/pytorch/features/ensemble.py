"""Several models as one model that combines their logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from kirsch.errors import ShapeError
from kirsch.frameworks.pytorch.inference.predict import logits_of_each
from kirsch.frameworks.pytorch.modules.copying import copy_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor


class Ensemble(nn.Module):
    """Models that run on the same inputs and whose logits are combined.

    Args:
        models: the models, which are copied.
        combine: function that takes the list of the models' logits and returns logits.
    """

    def __init__(self, models: Iterable[nn.Module], combine: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.models = nn.ModuleList(copy_of(model) for model in models)
        self.combine = combine

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """Return the combined logits.

        Raises:
            ShapeError: the numbers of classes differ.
        """
        logits = logits_of_each(self.models, args, options)
        classes = [part.shape[-1] for part in logits]
        if any(count != classes[0] for count in classes):
            raise ShapeError(
                f"The models of the ensemble have {', '.join(map(str, classes))} classes.",
                "Only logits of the same classes can be combined.",
                "Leave out models with other classes.",
            )
        return self.combine(logits)


def ensemble(models: Iterable[nn.Module], combine: Callable[[list[Tensor]], Tensor]) -> Ensemble:
    """Return copies of several models as one model in inference mode; see `Ensemble`."""
    return Ensemble(models, combine).eval()
