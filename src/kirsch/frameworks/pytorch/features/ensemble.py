"""Several models as one whose scores are made of theirs."""

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
    """Models that run on the same inputs.

    Args:
        models: copies of them are held.
        combine: list of the scores of each → scores.
    """

    def __init__(self, models: Iterable[nn.Module], combine: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.models = nn.ModuleList(copy_of(model) for model in models)
        self.combine = combine

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """The combined scores.

        Raises:
            ShapeError: the models put out different numbers of classes.
        """
        scores = logits_of_each(self.models, args, options)
        classes = [part.shape[-1] for part in scores]
        if any(count != classes[0] for count in classes):
            raise ShapeError(
                f"The models of the ensemble put out {', '.join(map(str, classes))} classes.",
                "What they say can be combined only of the same classes.",
                "Leave out those of other classes.",
            )
        return self.combine(scores)
